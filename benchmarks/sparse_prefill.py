"""Block-sparse prefill: what it keeps, on keys of a real model, and what it costs.

    python benchmarks/sparse_prefill.py [--parts estimators,quality,prefill,time] [--append]

Prints JSON lines and keeps them in benchmarks/results/sparse_prefill.jsonl. Texts of this
repository, queries of the last 512 tokens at each length.

    estimator   what estimators of mass are worth (`tile_estimators.py`): density, the share of
                visible keys in the chosen blocks; true mass in them, mean and first percentile over
                heads and queries; "held", the share of these with mass >= recovery
    quality     rules, through the library, all layers: density of what is scored and of what is
                attended; true mass (exp of the difference of lse to full attention's); relative
                error of the output
    prefill     a whole document prefilled by a rule in every layer: KL divergence from the logits
                of a full prefill, and whether the best token is the same, at the last token of each
                chunk after the first; keys attended; time of the whole model and ratio
    time        synthetic lists of a given density, time in ratio to full attention (`attend_range`
                as the engine uses it), by turns in one run; the same for the selection alone, and
                for the tile rule where it skips every visit that it may, and where it skips none
"""

import argparse
import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import machine
import numpy as np
import tile_estimators

import alaya_jax as aj
from alaya_jax import cache
from alaya_jax.attention import engine, tiles
from alaya_jax.attention.paged import attend_range
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.cache.views import KeyRange, Pages, over_query_blocks
from alaya_jax.index.memory import Memory
from alaya_jax.models.llama import forward
from alaya_jax.query import Full, Tiles, Window
from alaya_jax.query.plan import Plan

TEXTS = ("tests/data/declaration.txt", "alaya_jax/cli/data/constitution.txt", "LICENSE")
PAGE, CHUNK, PREFILLED = 16, 512, 7
RESULTS = machine.ROOT / "benchmarks/results/sparse_prefill.jsonl"


@functools.partial(jax.jit, static_argnames=("config", "keep"), donate_argnames="kv")
def chunk(params, kv, table, tokens, rule, config, keep):
    """One chunk: logits of its last token, the cache, keys attended, and its queries."""
    count = jnp.full(1, tokens.shape[0])
    positions = table.length[:, None] + jnp.arange(tokens.shape[0])

    def attend(layer, q, k, v, state):
        kv, queries, keys = state
        kv = cache.append(kv, layer, k, v, table, count)
        rows = jnp.transpose(q[0].reshape(len(tokens), k.shape[2], -1, k.shape[3]), (1, 2, 0, 3))
        if isinstance(rule, Full):
            plan = Plan(rule)
            out, read = engine.attend(plan, q, Memory(kv, table).layer(layer), count)
            attended = read.attended
        else:
            pages = Pages(kv.k[layer], kv.v[layer], table.pages[0])
            partial, attended = tiles.attend_tiles(rows, pages, positions[0], rule)
            out = jnp.transpose(partial.out, (2, 0, 1, 3)).reshape(q.shape)
        if keep:
            queries = (*queries, rows)
        return out, (kv, queries, keys + jnp.mean(attended.astype(jnp.float32)))

    state = (kv, (), jnp.float32(0))
    logits, (kv, queries, keys) = forward(
        params, config, tokens[None], positions, attend, state, logits_at=count - 1
    )
    return logits[0], kv, keys / config.num_hidden_layers, queries


@dataclasses.dataclass
class Chunk:
    """What a prefill has when a chunk is done; the cache is donated to the next."""

    end: int
    logits: jax.Array
    kv: PagedKV
    attended: float
    queries: tuple
    seconds: float


def prefill(model, tokens, rule, keep=()):
    """Chunk after chunk, into pages 1, 2, ...; queries where one ends at a length to keep."""
    pages = len(tokens) // PAGE
    kv = PagedKV.create(model.config, pages + 1, PAGE, jnp.float32)
    for start in range(0, len(tokens), CHUNK):
        table = PageTable(jnp.arange(1, pages + 1)[None], jnp.full(1, start))
        end = start + CHUNK
        new = jnp.asarray(tokens[start:end])
        begin = time.perf_counter()
        logits, kv, attended, queries = jax.block_until_ready(
            chunk(model.params, kv, table, new, rule, model.config, end in keep)
        )
        seconds = time.perf_counter() - begin
        yield Chunk(end, logits, kv, float(attended), queries, seconds)


def dense(q, k, v, ids, positions):
    """Full attention as the engine computes it."""
    pages = Pages(k, v, ids)
    return over_query_blocks(
        lambda q, p: attend_range(q, pages, KeyRange(jnp.zeros_like(p), p + 1))[0],
        q,
        positions,
        engine.QUERY_BLOCK,
    )


dense_jit = jax.jit(dense)
select_jit = jax.jit(
    lambda q, k, v, ids, positions, rule: tiles.select_tiles(q, Pages(k, v, ids), positions, rule)
)
attend_jit = jax.jit(
    lambda q, k, v, ids, positions, listed, beta: tiles.attend_list(
        q, Pages(k, v, ids), positions, listed, beta
    )
)


def rules(dim):
    """The rules that are compared, those that a prefill is run with first."""
    close, wide = (float(-np.sqrt(dim) * np.log(alpha)) for alpha in (0.0144, 0.001))
    return (
        *(Tiles(recovery=recovery) for recovery in (0.8, 0.9, 0.95, 0.98)),
        Tiles(beta=close),
        Tiles(beta=close, recovery=1.0),
        Tiles(beta=close, recovery=0.95),
        Tiles(beta=wide),
        Tiles(beta=wide, recovery=1.0),
        *(Tiles(recovery=0.9, kv_block=kv_block) for kv_block in (64, 128)),
        Tiles(recovery=0.9, samples=16),
        Tiles(recovery=0.9, q_block=64),
        *(Tiles(recovery=0.9, window=Window(*window)) for window in ((16, 1), (128, 512))),
    )


def named(rule):
    if isinstance(rule, Full):
        return {"rule": "Full()"}
    fields = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    fields["beta"] = None if fields["beta"] == np.inf else round(fields["beta"], 2)
    fields["window"] = [rule.window.sink, rule.window.recent]
    return fields


def quality(kv, queries, n):
    positions = jnp.arange(n - CHUNK, n)
    ids = jnp.arange(1, n // PAGE + 1)
    for rule in rules(kv.k[0].shape[-1]):
        rows = []
        for k, v, q in zip(kv.k, kv.v, queries[n], strict=True):
            want = dense_jit(q, k, v, ids, positions)
            listed = select_jit(q, k, v, ids, positions, rule)
            found, attended, skipped = attend_jit(q, k, v, ids, positions, listed, rule.beta)
            mass = jnp.exp(found.lse - want.lse)
            error = jnp.linalg.norm(found.out - want.out, axis=-1)
            error = error / jnp.linalg.norm(want.out, axis=-1)
            scored = listed.count * listed.kv_block
            visible = positions[listed.q_block - 1 :: listed.q_block] + 1
            rows.append(
                {
                    "scored": jnp.mean(scored / visible),
                    "attended": jnp.mean(attended / (positions + 1)),
                    "skipped": jnp.sum(skipped) / jnp.sum(listed.count),
                    "mass": jnp.mean(mass),
                    "mass_estimated": jnp.mean(listed.mass),
                    "worst_1pct": jnp.quantile(mass, 0.01),
                    "held": jnp.mean(mass >= rule.recovery) if rule.recovery else jnp.nan,
                    "error": jnp.mean(error),
                    "error_p99": jnp.quantile(error, 0.99),
                }
            )
        means = {key: float(np.mean([float(row[key]) for row in rows])) for key in rows[0]}
        if not rule.recovery:
            del means["held"], means["mass_estimated"]
        yield {**named(rule), **{key: round(x, 5) for key, x in means.items()}}


def divergences(model, tokens):
    """Rows for a document: full and sparse prefills advance by turns."""
    compared = (Full(), *rules(model.config.head_dim)[:PREFILLED])
    runs = [[] for _ in compared]
    for step in zip(*(prefill(model, tokens, rule) for rule in compared), strict=True):
        for run, done in zip(runs, step, strict=True):
            run.append(dataclasses.replace(done, kv=None, logits=np.asarray(done.logits)))

    def log_p(run):
        logits = np.asarray([done.logits for done in run[1:]], np.float64)
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    p = log_p(runs[0])
    for rule, run in zip(compared, runs, strict=True):
        q = log_p(run)
        kl = np.sum(np.exp(p) * (p - q), axis=-1)
        same = p.argmax(-1) == q.argmax(-1)
        # The first chunk includes the compilation.
        seconds, full, keys, every = (
            sum(getattr(done, field) for done in which[1:])
            for field, which in (
                ("seconds", run),
                ("seconds", runs[0]),
                ("attended", run),
                ("attended", runs[0]),
            )
        )
        yield {
            **named(rule),
            "attended": round(keys / every, 4),
            "kl_last": float(f"{kl[-1]:.3g}"),
            "kl_mean": float(f"{kl.mean():.3g}"),
            "kl_max": float(f"{kl.max():.3g}"),
            "same_best_token": f"{same.sum()}/{len(same)}",
            "seconds": round(seconds, 2),
            "ratio_to_full": round(seconds / full, 3),
        }


def timed(f):
    start = time.perf_counter()
    out = jax.block_until_ready(f())
    return time.perf_counter() - start, out


def times(heads, group, dim, n, rounds):
    """Ratios to full attention, by turns: of medians, and of the best, where others disturb."""
    rng = np.random.default_rng(0)
    k, v = (
        jnp.asarray(rng.standard_normal((heads, n // PAGE + 1, PAGE, dim), np.float32))
        for _ in range(2)
    )
    q = jnp.asarray(rng.standard_normal((heads, group, CHUNK, dim), np.float32))
    ids, positions = jnp.arange(1, n // PAGE + 1), jnp.arange(n - CHUNK, n)
    base = (q, k, v, ids, positions)

    def some(density, kv_block=PAGE):
        """A list of that many blocks, scattered, which have nothing to do with the keys."""
        rule = Tiles(kv_block=kv_block)
        listed = select_jit(*base, rule)
        blocks = n // kv_block
        count = max(1, round(density * blocks))
        order = [rng.permutation(blocks)[:count] for _ in range(listed.count.size)]
        order = np.pad(np.reshape(order, (*listed.count.shape, count)), ((0, 0), (0, 0), (0, 1)))
        order = jnp.asarray(np.resize(order, listed.blocks.shape), jnp.int32)
        full_like = jnp.full_like(listed.count, count)
        return dataclasses.replace(
            listed, blocks=order, count=full_like, kept=jnp.zeros_like(listed.count)
        )

    cases = {"full": lambda: dense_jit(*base)}
    for density in (1.0, 0.5, 0.25, 0.1):
        for kv_block in (PAGE, 128):
            listed = some(density, kv_block)
            cases[f"density {density}, kv_block {kv_block}"] = functools.partial(
                attend_jit, *base, listed, np.inf
            )
    every = some(1.0)
    cases["every visit but the first skipped"] = functools.partial(attend_jit, *base, every, -1e9)
    cases["select"] = functools.partial(select_jit, *base, Tiles(recovery=0.9))
    seconds = {name: [] for name in cases}
    for f in cases.values():
        jax.block_until_ready(f())
    for _ in range(rounds):
        for name, f in cases.items():
            seconds[name].append(timed(f)[0])
    full = seconds["full"]
    for name, values in seconds.items():
        yield {
            "kv_heads": heads,
            "group": group,
            "head_dim": dim,
            "context": n,
            "case": name,
            "ms": round(1e3 * float(np.median(values)), 2),
            "ratio_to_full": round(float(np.median(values) / np.median(full)), 3),
            "best_ms": round(1e3 * min(values), 2),
            "ratio_of_best": round(min(values) / min(full), 3),
        }


def visit_sizes(heads, group, dim, n, rounds):
    """Every key, visited so many at once."""
    before = tiles.VISIT_TOKENS
    for size in (64, 128, 256, 512):
        tiles.VISIT_TOKENS = size
        jax.clear_caches()
        wanted = ("full", "density 1.0, kv_block 16", "density 0.1, kv_block 16")
        for row in times(heads, group, dim, n, rounds):
            if row["case"] in wanted[1:]:
                yield {"visit_tokens": size, **row}
    tiles.VISIT_TOKENS = before
    jax.clear_caches()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", default="2048,4096,8192", help="multiples of 512")
    parser.add_argument("--parts", default="estimators,quality,prefill,time,visits")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--append", action="store_true", help="keep the rows that are there")
    options = parser.parse_args()
    parts = options.parts.split(",")
    lengths = [int(n) for n in options.lengths.split(",")]
    if any(n % CHUNK for n in lengths):
        parser.error(f"--lengths: multiples of {CHUNK}")
    facts = machine.facts("alaya_jax", "jax", "jaxlib", "numpy")
    with RESULTS.open("a" if options.append else "w") as file:

        def put(row):
            print(json.dumps(row), file=file, flush=True)
            print(json.dumps(row), flush=True)

        put({"benchmark": "sparse_prefill", "parts": parts, "texts": TEXTS, **facts})
        if {"estimators", "quality", "prefill"} & set(parts):
            model = aj.load(options.model, dtype="float32", progress=False)
            text = "\n\n".join((machine.ROOT / path).read_text() for path in TEXTS)
            tokens = model.encode(text)
            if max(lengths) > min(len(tokens), model.length_limit):
                parser.error(f"--lengths: the texts have {len(tokens)} tokens, {model!r} its limit")
            tokens = tokens[: max(lengths)]
            queries = {}
            if {"estimators", "quality"} & set(parts):
                for done in prefill(model, tokens, Full(), lengths):
                    kv = done.kv
                    queries[done.end] = done.queries
            for n in lengths if queries else ():
                if "estimators" in parts:
                    for row in tile_estimators.compare(kv.k[::3], queries[n][::3], n):
                        put({"result": "estimator", "context": n, **row})
                if "quality" in parts:
                    for row in quality(kv, queries, n):
                        put({"result": "quality", "context": n, **row})
            if "prefill" in parts:
                for row in divergences(model, tokens):
                    put({"result": "prefill", "context": len(tokens), **row})
        for heads, group, dim in ((3, 3, 64), (8, 4, 128)):
            if "time" in parts:
                for n in (4096, 8192, 16384, 32768):
                    for row in times(heads, group, dim, n, options.rounds):
                        put({"result": "time", **row})
            if "visits" in parts:
                for row in visit_sizes(heads, group, dim, 8192, options.rounds):
                    put({"result": "time", **row})


if __name__ == "__main__":
    main()
