"""Requests through an engine's slots beside the same requests one after another, in one run.

    python benchmarks/serving.py [--requests 16] [--prompt 512] [--new 64] [--shared 0]

Both ways run on one model and one database, after one round that compiles. Prompts are different
stretches of a text (`--shared`: behind so many tokens that they have in common, which neither way
has stored). Prints JSON lines, for each way the least of the rounds: seconds in all, new tokens a
second, and where the time went. A prompt costs a CPU the same in both ways, since a chunk of it is
enough work for all cores; what slots can save is in the steps that choose tokens. So the line of
the engine says also how much faster these were. Wants a quiet machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import ROOT, facts
from ours import Ours

import alaya_jax as aj

TEXT = ROOT / "tests" / "data" / "declaration.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="stored")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--shared", type=int, default=0, help="tokens that all prompts begin with")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    length = options.prompt + options.new
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch), options.requests, length
        ours = Ours(options.model, options.weights, *place)
        prompts = stretches(ours, options)
        print(json.dumps({"facts": facts("jax", "jaxlib"), "options": vars(options)}), flush=True)
        rounds = [run(ours.db, prompts, options) for _ in range(1 + options.rounds)][1:]
    alone = min((one for one, _ in rounds), key=lambda one: one["seconds"])
    slots = min((two for _, two in rounds), key=lambda two: two["seconds"])
    same = sum(a == b for a, b in zip(alone.pop("ids"), slots.pop("ids"), strict=True))
    slots["faster"] = alone["seconds"] / slots["seconds"]
    slots["decode_faster"] = slots["decode_only_tokens_per_s"] / alone["decode_tokens_per_s"]
    slots["answers_that_are_the_same"] = same
    for line in (alone, slots):
        print(json.dumps(line), flush=True)


def stretches(ours: Ours, options: argparse.Namespace) -> list[list[int]]:
    """A prompt for each request; no two have more in common than is asked."""
    ids = ours.tokenize(TEXT.read_text("utf-8"))
    own = options.prompt - options.shared
    behind = ids[options.shared :] * (1 + (options.requests * 37 + own) // len(ids))
    return [
        [*ids[: options.shared], 100 + i, *behind[37 * i : 37 * i + own - 1]]
        for i in range(options.requests)
    ]


def run(db: aj.DB, prompts: list[list[int]], options: argparse.Namespace) -> tuple[dict, dict]:
    """Both ways, once."""
    return one_after_another(db, prompts, options), through_slots(db, prompts, options)


def one_after_another(db: aj.DB, prompts: list[list[int]], options: argparse.Namespace) -> dict:
    ids, prefill, decode, first = [], 0.0, 0.0, []
    started = time.perf_counter()
    for prompt in prompts:
        session, rest = db.create_session(prompt)
        with session:
            sampling = aj.Greedy(ignore_eos=True)
            answer = aj.generate(session, rest, max_new_tokens=options.new, sampling=sampling)
            tokens = [next(answer)]
            first.append(time.perf_counter() - started)
            tokens += answer
            prefill += answer.timing.first_token_s
            decode += answer.timing.decode_s
        ids.append([token.id for token in tokens])
    seconds = time.perf_counter() - started
    new = sum(map(len, ids))
    return {
        "way": "one after another",
        "seconds": seconds,
        "tokens_per_s": new / seconds,
        "first_token_s": {"median": statistics.median(first), "last": first[-1]},
        "prefill_s": prefill,
        "prefill_tokens_per_s": sum(map(len, prompts)) / prefill,
        "decode_s": decode,
        "decode_tokens_per_s": (new - len(ids)) / decode,
        "ids": ids,
    }


def through_slots(db: aj.DB, prompts: list[list[int]], options: argparse.Namespace) -> dict:
    """Its tokens come while others' prompts are read; those that come behind the last first token
    are decoding alone.
    """
    with aj.Engine(db, slots=options.slots, chunk=options.chunk) as engine:
        started = time.perf_counter()
        came: list[list[float]] = [[] for _ in prompts]
        sampling = aj.Greedy(ignore_eos=True)
        running = [
            engine.submit(
                aj.Request(prompt, options.new, sampling=sampling),
                lambda _, own=own: own.append(time.perf_counter() - started),
            )
            for prompt, own in zip(prompts, came, strict=True)
        ]
        results = [each.result() for each in running]
        seconds = time.perf_counter() - started
        stats = engine.stats()
    first = sorted(result.timing.first_token_s for result in results)
    behind = sorted(at for own in came for at in own if at > first[-1])
    new = sum(len(result.ids) for result in results)
    gaps = sorted(gap for own in came for gap in np.diff(own).tolist())
    return {
        "way": "through slots",
        "seconds": seconds,
        "tokens_per_s": new / seconds,
        "first_token_s": {"median": statistics.median(first), "last": first[-1]},
        "between_tokens_s": {"p50": statistics.median(gaps), "p99": gaps[len(gaps) * 99 // 100]},
        "prefill_tokens": stats.tokens_prefilled,
        "reused_tokens": stats.tokens_reused,
        "while_prompts_are_read_s": first[-1],
        "decode_only_s": behind[-1] - first[-1],
        "decode_only_tokens_per_s": len(behind) / (behind[-1] - first[-1]),
        "steps": stats.steps,
        "preemptions": stats.preemptions,
        "programs": sum(result.programs for result in results),
        "ids": [list(result.ids) for result in results],
    }


if __name__ == "__main__":
    main()
