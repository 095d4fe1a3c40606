"""What the choice of a token costs in an engine: its program, a mask of the vocabulary, and a
constrained request beside a free one; and the first token behind a short prompt.

    python benchmarks/choosing.py [--rows 1 4 16] [--tokens 40] [--requests 1 8]

One line each, milliseconds:

sample      the quickest of some calls on logits that lie there. "always": filters are done whether
            a sequence asks for them or not; "where asked": as an engine has it
mask        the median of a text's tokens: which may come next, by a JSON schema
gap         between the tokens of requests that run together, the mean of each round, the least of
            all; free ones and constrained ones take turns
first       from the request to its first token, the median, by the length of the prompt
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import facts

import alaya_jax as aj
from alaya_jax.runtime.sampling.constraint import Allowed
from alaya_jax.runtime.sampling.sampler import init_sampler, kind_of, sample

SCHEMA = {"type": "array", "items": {"type": "string"}, "minItems": 50}
KEPT = aj.Constraint(json_schema=SCHEMA)
ASKED = {
    "greedy": aj.Greedy(),
    "temperature": aj.Sampling(),
    "filters": aj.Sampling(top_p=0.9, top_k=50, min_p=0.05),
    "alternatives": aj.Greedy(logprobs=3),
    "greedy, masked": aj.Greedy(min_tokens=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    say({"facts": facts("jax", "jaxlib"), "options": vars(options)})
    model = aj.load(options.model)
    samples(model.config.vocab_size, options.rows)
    masks(model)
    with tempfile.TemporaryDirectory() as place, aj.DB(place, model) as db, aj.Engine(db) as engine:
        gaps(engine, options.requests, options.tokens, options.rounds)
        for length in (8, 64):
            times = [first(engine, length, seed) for seed in range(2 * options.rounds)]
            say({"what": "first", "prompt": length, "ms": 1e3 * float(np.median(times))})


def samples(size: int, rows: list[int]) -> None:
    for batch in rows:
        logits = jnp.asarray(np.random.default_rng(0).standard_normal((batch, size), np.float32))
        for name, sampling in ASKED.items():
            for how in ("always", "where asked"):
                kind = kind_of([sampling], size)
                kept = dataclasses.replace(kind.processors, where_asked=how == "where asked")
                kind = dataclasses.replace(kind, processors=kept)
                processors, state = init_sampler([sampling] * batch, [[]] * batch, size, kind=kind)
                if state.mask is not None:
                    state = dataclasses.replace(state, mask=jnp.full_like(state.mask, 2**32 - 1))
                run = jax.jit(sample, static_argnums=0)
                took = quickest(lambda p=processors, s=state, run=run: run(p, s, logits))  # noqa: B023
                say({"what": "sample", "rows": batch, "asked": name, "how": how, "ms": took})


def quickest(call: Callable[[], Any], calls: int = 20) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def masks(model: aj.Model) -> None:
    began = time.perf_counter()
    asked = KEPT, 0, model.eos_ids, model.tokenizer, model.config.vocab_size
    allowed = Allowed(*asked)
    read = time.perf_counter()
    Allowed(*asked)
    ready = time.perf_counter() - read
    text = model.encode('["rivers", "seas and lakes", "mountains"', add_special_tokens=False)
    times = []
    for id in text.tolist():
        started = time.perf_counter()
        allowed.mask()
        times.append(time.perf_counter() - started)
        allowed.accept(id)
    say({"what": "vocabulary", "ms": 1e3 * (read - began)})
    say({"what": "schema", "ms": 1e3 * ready})
    say({"what": "mask", "ms": 1e3 * float(np.median(times))})


def gaps(engine: aj.Engine, counts: list[int], tokens: int, rounds: int) -> None:
    random = np.random.default_rng(0)
    ways = {"free": aj.Greedy(ignore_eos=True), "constrained": aj.Greedy(constraint=KEPT)}
    for count in counts:
        least: dict[str, float] = {}
        for number in range(rounds + 1):
            for name, sampling in ways.items():
                prompts = random.integers(5, 4000, (count, 30))
                asked = [aj.Request(prompt, tokens, sampling=sampling) for prompt in prompts]
                results = list(engine.run(asked))
                gap = np.mean([r.timing.decode_s / (len(r.tokens) - 1) for r in results])
                if number:  # the first compiles
                    least[name] = min(least.get(name, np.inf), float(gap))
        for name, gap in least.items():
            say({"what": "gap", "requests": count, "asked": name, "ms": 1e3 * gap})


def first(engine: aj.Engine, length: int, seed: int) -> float:
    prompt = np.random.default_rng(seed).integers(5, 4000, length)
    found = engine.submit(aj.Request(prompt, 1)).result().timing.first_token_s
    assert found is not None
    return found


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
