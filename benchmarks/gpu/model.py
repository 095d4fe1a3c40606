"""A whole model on a device, random weights of a known shape: decode steps behind a long context by
plan, chunks of a prefill, and a session as a user has it; beside cuDNN attention in the same step.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import alaya_jax as aj
from alaya_jax import configs
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.cache.pool import Lent
from alaya_jax.frame import Frame
from alaya_jax.index import Indexed, Sketch
from alaya_jax.models import LlamaConfig, llama
from alaya_jax.query import DIPR, Full, Tiles
from alaya_jax.query.plan import Plan
from alaya_jax.runtime.programs import Fed, Going
from alaya_jax.runtime.sampling.sampler import init_sampler
from alaya_jax.runtime.stack import Stack

PAGE = 16
STEPS = 16
PLANS = {
    "Full": Plan(Full()),
    "DIPR(38) @ Sketch": Plan(DIPR(beta=38.0), Sketch()),
    "recovery 0.9 @ Sketch by page": Plan(DIPR(recovery=0.9), Sketch(), "page", "group"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Which model, of how many layers, behind how many tokens."""

    model: str
    layers: int
    context: int

    def __str__(self) -> str:
        return f"{self.model}, {self.layers} layers, {self.context:,} tokens"


CASES = (Case("llama-3-8b", 4, 131072), Case("llama-3-8b", 32, 131072))
TOY = Case("llama-tiny", 2, 448)
SESSIONS = ("llama-3.2-1b",)


def _config(name: str, layers: int | None = None) -> LlamaConfig:
    fields = configs.load(name)
    return LlamaConfig.from_hf({**fields, **({"num_hidden_layers": layers} if layers else {})})


def _params(config: LlamaConfig, dtype: Any) -> Any:
    make = jax.jit(functools.partial(llama.init_params, config, dtype=dtype))
    return jax.block_until_ready(make(jax.random.key(0)))


def run(number: int, quick: bool, say: Callable[..., None]) -> None:
    """Decode by plan and by cuDNN, then a chunk of a prefill; a row each."""
    case = TOY if quick else CASES[number]
    config = _config(case.model, case.layers)
    dtype = jnp.float32 if quick else jnp.bfloat16
    params = _params(config, dtype)
    pages = case.context // PAGE
    pool = (config.num_key_value_heads, pages + 1, PAGE, config.head_dim)

    @jax.jit
    def random(key: Any) -> Any:
        return jax.random.normal(key, pool, dtype)

    keys = jax.random.split(jax.random.key(1), 2 * case.layers)
    # Queries of random weights have channels of about 1: scores of keys three times as long spread
    # as those of a trained model do, and DIPR has something to choose.
    layers = [(3 * random(keys[2 * i]), random(keys[2 * i + 1])) for i in range(case.layers)]
    kv = PagedKV(tuple(k for k, _ in layers), tuple(v for _, v in layers))
    del layers
    length = case.context - 2 * STEPS - 8
    ids = jnp.arange(1, pages + 1, dtype=jnp.int32)[None]
    facts = {"case": str(case), "weights_gb": _bytes(params) / 1e9, "kv_gb": _bytes(kv) / 1e9}

    index = Sketch().create(config, pages + 1, PAGE, dtype)
    filled = jnp.full(pages, PAGE, jnp.int32)
    build = jax.jit(lambda layer, k, v: layer.build(k, v, ids[0], filled))
    started = time.perf_counter()
    built = tuple(build(index, k, v) for k, v in zip(kv.k, kv.v, strict=True))
    jax.block_until_ready(built)
    say(**facts, what="sketch of the context", total_s=round(time.perf_counter() - started, 3))
    covered = jnp.full(1, length // PAGE * PAGE, jnp.int32)
    end = PageTable(ids, jnp.full(1, length))
    for name, plan in PLANS.items():
        indexed = None if plan.index is None else Indexed(built, covered)
        kv, row = _decode(config, params, kv, end, plan, indexed)
        say(**facts, what=f"decode, {name}", **row)
    chunk = 32 if quick else 4096
    for name, plan in {
        "Full": Plan(Full()),
        "Tiles": Plan(Tiles(recovery=0.9, kv_block=128)),
    }.items():
        for behind in (0, length - chunk):
            table = PageTable(ids, jnp.full(1, behind, jnp.int32))
            kv, ms = _extend(config, params, kv, table, plan, chunk)
            say(
                **facts, what=f"prefill of {chunk:,} behind {behind:,}, {name}", chunk_ms=ms,
                tokens_per_s=round(chunk / ms * 1e3, 1),
            )  # fmt: skip
    del built
    kv, row = _decode(config, params, kv, end, PLANS["Full"], None, config.num_hidden_layers)
    say(**facts, what="decode, Full, all layers in one program", **row)
    contiguous = _contiguous(kv, case.context)
    del kv
    if jax.default_backend() == "gpu":
        say(**facts, what="decode, cuDNN", **_decode_cudnn(config, params, contiguous, length))


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _decode(
    config: LlamaConfig, params: Any, kv: Any, table: PageTable, plan: Plan, indexed: Any,
    per_program: int | None = None,
) -> tuple[Any, dict]:  # fmt: skip
    processors, sampler = init_sampler(aj.Greedy(), [[0]], config.vocab_size)
    one, lent = jnp.ones(1, jnp.int32), Lent(kv)
    nothing, allowed = jnp.full((1, 1), -1, jnp.int32), jnp.ones(1, bool)
    stack = Stack(params, Frame(config), per_program)
    chain = stack.chain(plan, indexed)
    times, compiled, rows = [], 0.0, []
    for turn in range(3):
        # A fresh copy of the small donated state, since the first call takes it.
        mine = jax.tree.map(jnp.copy, (one[:, None], allowed, table.length, one, sampler))
        going, x, passed, rows = Going(*mine), stack.between(1, 1), stack.start(1), []
        started = time.perf_counter()
        for _ in range(STEPS):
            fed = Fed(going.token, going.count, dataclasses.replace(table, length=going.length))
            x, passed = stack.layers(lent, chain, x, passed, fed)
            new, passed, going = stack.end(passed, going, nothing, allowed, processors)
            rows.append(new)
        jax.block_until_ready(rows)
        took = time.perf_counter() - started
        if turn:
            times.append(took / STEPS)
        else:
            compiled = took
    scored, attended, read = (
        sum(np.asarray(getattr(r.counts, what), np.float64).sum() for r in rows)
        for what in ("scored", "attended", "read")
    )
    return lent.kv, {
        "step_ms": round(min(times) * 1e3, 3),
        "tokens_per_s": round(1 / min(times), 2),
        "first_call_s": round(compiled, 1),
        "attended_share": round(float(attended / scored), 5),
        "read_share": round(float(read / scored), 5),
        "steps": len(rows),
    }


def _extend(
    config: LlamaConfig, params: Any, kv: Any, table: PageTable, plan: Plan, chunk: int
) -> tuple[Any, float]:
    stack, lent = Stack(params, Frame(config)), Lent(kv)
    fed = Fed(jnp.ones((1, chunk), jnp.int32), jnp.full(1, chunk, jnp.int32), table)
    chain, best = stack.chain(plan, None), float("inf")
    for _ in range(3):
        x, passed = stack.between(1, chunk), stack.start(1)
        started = time.perf_counter()
        _, passed = stack.layers(lent, chain, x, passed, fed)
        jax.block_until_ready(stack.logits(passed))
        best = min(best, time.perf_counter() - started)
    return lent.kv, round(best * 1e3, 2)


def _contiguous(kv: Any, context: int) -> Any:
    """The same cache as cuDNN wants it, [1, S, K, D], layer by layer."""

    @jax.jit
    def tokens(x: Any) -> Any:
        return jnp.swapaxes(x[:, 1:].reshape(x.shape[0], -1, x.shape[3])[:, :context], 0, 1)[None]

    return [(tokens(k), tokens(v)) for k, v in zip(kv.k, kv.v, strict=True)]


def _decode_cudnn(config: LlamaConfig, params: Any, cache: Any, length: int) -> dict:
    """The same model with a contiguous cache and `jax.nn.dot_product_attention(cudnn)`."""

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: Any, cache: Any, token: Any, length: Any) -> Any:
        def attend(layer: int, q: Any, k: Any, v: Any, state: Any) -> Any:
            old = state[layer]
            new = tuple(
                jax.lax.dynamic_update_slice_in_dim(x, y, length, 1)
                for x, y in zip(old, (k, v), strict=True)
            )
            state = [*state[:layer], new, *state[layer + 1 :]]
            out = jax.nn.dot_product_attention(
                q, *new, key_value_seq_lengths=length[None] + 1,
                query_seq_lengths=jnp.ones(1, jnp.int32), implementation="cudnn",
            )  # fmt: skip
            return out, state

        logits, cache = llama.forward(
            params, config, token[:, None], length[None, None], attend, cache,
            logits_at=jnp.zeros(1, jnp.int32),
        )  # fmt: skip
        return jnp.argmax(logits, -1).astype(jnp.int32), cache

    token = jnp.ones(1, jnp.int32)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        for i in range(STEPS):
            token, cache = step(params, cache, token, jnp.int32(length + i))
        jax.block_until_ready(token)
        times.append((time.perf_counter() - started) / STEPS)
    return {"step_ms": round(min(times) * 1e3, 3), "tokens_per_s": round(1 / min(times), 2)}


def run_session(number: int, quick: bool, say: Callable[..., None]) -> None:
    """What a user does: import, ask, generate by plans; the answers of both implementations."""
    name = "llama-tiny" if quick else SESSIONS[number]
    config = _config(name)
    dtype = jnp.float32 if quick else jnp.bfloat16
    model = aj.Model(config, _params(config, dtype), None, fingerprint="random", name=name)
    document = 200 if quick else 16000
    new = 8 if quick else 64
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, document)
    budget = aj.Budget.for_pages(model, (document + 4096) // 16)
    sampling = aj.Greedy(ignore_eos=True)
    with tempfile.TemporaryDirectory() as scratch:
        db = aj.DB(Path(scratch) / "db", model, budget)
        for turn in ("first, compiling", "again"):
            started = time.perf_counter()
            db.import_context(np.roll(prompt, len(turn)))
            took = time.perf_counter() - started
            say(
                case=name, what=f"import of {document:,} tokens, {turn}", total_s=round(took, 2),
                tokens_per_s=round(document / took, 1),
            )  # fmt: skip
        db.import_context(prompt)
        plans = {
            "Full": aj.Plan(aj.Full()),
            "Full, xla": aj.Plan(aj.Full(), implementation="xla"),
            "DIPR(38) @ Sketch": aj.Plan(aj.DIPR(beta=38.0), aj.Sketch()),
            "recovery 0.9 @ Sketch": aj.Plan(aj.DIPR(recovery=0.9), aj.Sketch()),
        }
        where = {label: (plan, "device") for label, plan in plans.items()}
        on_cpu = "DIPR(38) @ Sketch"  # the cache is on the CPU, which attends
        where |= {
            f"{on_cpu}, in files": (plans[on_cpu], "host"),
            "Full, in files": (aj.Full(), "host"),
        }
        for label, (plan, tier) in where.items():
            times, ids = [], []
            for _ in range(2):
                session, rest = db.create_session(np.append(prompt, 7), tier=tier)
                with session:
                    stream = aj.generate(
                        session, rest, max_new_tokens=new, sampling=sampling, attention=plan
                    )
                    first, ids = next(iter(stream)), []
                    started = time.perf_counter()
                    ids = [first.id] + [token.id for token in stream]
                    times.append((time.perf_counter() - started) / max(1, new - 1))
                    ran = str(session.explain()).splitlines()[:2]
            say(
                case=name, what=f"generate, {label}", step_ms=round(min(times) * 1e3, 3),
                tokens_per_s=round(1 / min(times), 1), ids=ids[:8], explain=ran,
            )  # fmt: skip
