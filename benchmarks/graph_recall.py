"""How much of DIPR's answer the graph finds, how many keys it scores for that, and in what time.

    python benchmarks/graph_recall.py planted [--keys 131072] [--queries 0.05]
    python benchmarks/graph_recall.py real [--queries 0.4] [--lengths 32768 --yarn 4] [--l0 8,32]
        [--text FILE]

benchmarks/results/graph_recall.jsonl holds what they print. `planted`: synthetic keys with planted
critical sets (planted.py), one layer of 8 kv heads of 4 query heads, D 128; queries to build from
and to ask with are drawn apart. `real`: keys of SmolLM2-135M, prefilled with long texts; the graph
covers all but the last 1,024 tokens of the context, is built from queries that were asked before
its end, and is asked with the context's last 8 queries, whose window (128 first keys, and what the
graph does not cover) is attended anyway and seeds the search.

Prints JSON lines, alpha 0.0144 throughout:

    build    seconds for the queries' exact lists and for linking, bytes of the graph
    search   critical: their share of the keys covered; recall of critical keys, pooled and as the
             mean over rows that have some; scanned: keys scored for a row, as a share of the keys
             covered (where a group shares the work: of all its rows, each read once); mass: of
             attention, in what is found and the window, beside that of exact DIPR
    top      the best 100 by TopK's search: recall of them, and keys scored
    filter   the same for positions < limit, and the cost beside the unfiltered search's
    time     medians in ms of a decode step, all heads, and of a flat scan (scores alone), in turns
    layers   the mean over layers of what `search` says

The committed results have rows of an index "clusters" too, which was measured beside the graph and
dropped; docs/decisions.md says where its code is.

Timed on a machine that does other things, numbers in ms mean little; their ratio to the flat scan
in the same run means more.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import numpy as np
import real_keys
from planted import Planted

import alaya_jax as aj
from alaya_jax import cache
from alaya_jax.attention.engine import attend as attend_pages
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.cache.views import Pages
from alaya_jax.index import GraphSpec
from alaya_jax.index.graph.build import link, query_lists
from alaya_jax.index.graph.layer import Effort
from alaya_jax.index.memory import Memory
from alaya_jax.models.llama import forward
from alaya_jax.query import Full
from alaya_jax.query.plan import Plan

CHUNK, SINK = 512, 128
PAGE, ALPHA, CAPACITY, L0, TOP = 16, 0.0144, 4096, 8, 100
LAYERS = (1, 4, 10, 16, 22, 28)


def show(what, **row):
    print(json.dumps({"result": what, **row}), flush=True)


def pages_of(k):
    """Keys [K, N, D] as a pool, pages in order."""
    heads, n, dim = k.shape
    pool = jnp.reshape(k, (heads, n // PAGE, PAGE, dim))
    return pool, jnp.arange(n // PAGE)


@functools.partial(jax.jit, static_argnames=("shared", "l0"))
def graph_search(layer, q, pool, ids, limit, low, beta, seed, shared, l0=L0):
    return layer.search_range(
        q,
        Pages(pool, pool, ids),
        jnp.full(q.shape[2], limit),
        low,
        beta,
        seed,
        Effort(l0, CAPACITY, shared),
    )


@functools.partial(jax.jit, static_argnames=("k", "shared"))
def graph_top(layer, q, pool, ids, limit, low, k=TOP, shared=False):
    limits = jnp.full(q.shape[2], limit)
    return layer.search_top(q, Pages(pool, pool, ids), limits, low, k, shared=shared)


@jax.jit
def flat_scan(q, pool):
    return jnp.einsum("kgtd,kpzd->kgtpz", q, pool)


class Truth:
    """Exact scores of queries [K, G, T, D], and DIPR's answer in low <= j < high."""

    def __init__(self, k, q, low, high, window):
        self.q, self.dim = q, q.shape[-1]
        scores = np.einsum("kgtd,knd->kgtn", q, k)
        self.beta = float(-np.sqrt(self.dim) * np.log(ALPHA))
        outside = scores.copy()
        outside[..., low:high] = -np.inf
        nothing = np.full(q.shape[:3], -np.inf, np.float32)
        self.seed = outside.max(-1) if window else nothing
        inside = scores[..., low:high]
        best = np.maximum(inside.max(-1), self.seed)[..., None]
        self.critical = np.zeros(scores.shape, bool)
        self.critical[..., low:high] = inside >= best - self.beta
        eligible = np.ones(scores.shape[-1], bool) if window else np.arange(len(k[0])) < high
        top = np.where(eligible, scores, -np.inf).max(-1, keepdims=True)
        self.weight = np.where(eligible, np.exp((scores - top) / np.sqrt(self.dim)), 0)
        self.weight /= self.weight.sum(-1, keepdims=True)
        self.scores, self.low, self.high = scores, low, high
        self.attended = np.isneginf(outside) == False if window else np.zeros(scores.shape, bool)  # noqa: E712

    def of(self, found, covered):
        """What a search that found `found` [K, G, T, N] is worth."""
        hit, some = found & self.critical, self.critical.any(-1)
        mass = [np.sum(self.weight * (x | self.attended), -1) for x in (found, self.critical)]
        return {
            "critical": round(float(self.critical.sum(-1).mean() / covered), 5),
            "recall": round(float(hit.sum() / self.critical.sum()), 4) if some.any() else None,
            "recall_rows": round(float((hit.sum(-1)[some] / self.critical.sum(-1)[some]).mean()), 4)
            if some.any()
            else None,
            "mass": round(float(mass[0].mean()), 4),
            "mass_exact": round(float(mass[1].mean()), 4),
        }

    def search(self, layer, pool, ids, shared, l0=L0):
        out = graph_search(
            layer, self.q, pool, ids, self.high, self.low, self.beta, self.seed, shared, l0
        )
        return self.result(out, int(layer.length))

    def top(self, layer, pool, ids, shared=False):
        out = graph_top(layer, self.q, pool, ids, self.high, self.low, shared=shared)
        inside = self.scores[..., self.low : self.high]
        bar = np.sort(inside, -1)[..., -TOP, None]
        # The search's own scores may differ from these by rounding.
        near = bar - 1e-4 * np.abs(bar)
        found = np.minimum(np.sum(np.asarray(out.scores) >= near, -1), TOP)
        return {
            "k": TOP,
            "recall": round(float(found.mean() / TOP), 4),
            "scanned": round(float(out.visited.mean() / int(layer.length)), 5),
            "overflows": int(out.overflow.sum()),
        }

    def result(self, out, covered):
        out = jax.tree.map(np.asarray, out)
        found = np.zeros(self.critical.shape, bool)
        for row in np.ndindex(found.shape[:3]):
            found[row][out.positions[row][out.scores[row] > -np.inf]] = True
        scanned = float(out.visited.mean() / covered)
        return {
            **self.of(found, covered),
            "scanned": round(scanned, 5),
            "overflows": int(out.overflow.sum()),
        }


def median_ms(*calls, repeats=21):
    """Medians of each, taken in turns."""
    times = np.empty((repeats, len(calls)))
    for call in calls:
        jax.block_until_ready(call())
    for i in range(repeats):
        for j, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[i, j] = time.perf_counter() - start
    return [round(1e3 * float(x), 2) for x in np.median(times, 0)]


def build(keys, length, queries, spec, positions=None, low=0, **row):
    """The lists of all queries, and the graph from them."""
    start = time.perf_counter()
    lists = query_lists(keys, length, queries, spec.listed, positions, low)
    listed = time.perf_counter()
    layer = link(lists, length, keys.shape[1], spec)
    show(
        "build",
        **row,
        degree=spec.degree,
        listed=spec.listed,
        queries=queries.shape[1],
        seconds_lists=round(listed - start, 2),
        seconds_link=round(time.perf_counter() - listed, 2),
        bytes_a_key=layer.neighbours.nbytes // (keys.shape[0] * length),
        share_of_keys_and_values=round(layer.neighbours.nbytes / (8 * np.prod(keys.shape)), 3),
    )
    return lists, layer


def planted(options):
    data = Planted.create(options.keys, options.kv_heads)
    keys = jnp.asarray(data.keys())
    pool, ids = pages_of(keys)
    sample, _ = data.queries(int(options.queries * data.n / data.group), 1)
    q, asked = data.queries(8, 2)
    n, group = data.n, data.group
    truth = Truth(np.asarray(keys), q, 0, n, window=False)
    same = truth.critical & (data.topic[:, None, None] == asked[..., None])
    name = {"data": "planted", "context": n}
    show(
        "data",
        **name,
        critical=round(float(truth.critical.sum(-1).mean()), 1),
        of_those_planted=round(float(same.sum() / truth.critical.sum()), 4),
        mass_in_critical=round(float((truth.weight * truth.critical).sum(-1).mean()), 4),
    )
    spec = GraphSpec()
    rows = sample.reshape(data.kv_heads, -1, data.dim)
    lists, layer = build(keys, n, jnp.asarray(rows), spec, **name)
    by_head = lists.reshape(data.kv_heads, group, -1, spec.listed)

    own = [link(by_head[:, g], n, n, spec) for g in range(group)]
    for shared in (False, True):
        show("search", **name, graphs="of a group", walk=walk(shared),
             **truth.search(layer, pool, ids, shared))  # fmt: skip
    alone = [Truth(np.asarray(keys), q[:, g : g + 1], 0, n, False) for g in range(group)]
    each = [t.search(x, pool, ids, False) for t, x in zip(alone, own, strict=True)]
    show("search", **name, graphs="of a head", walk=walk(False),
         **{f: round(float(np.mean([e[f] for e in each])), 5) for f in each[0]})  # fmt: skip
    star = link(lists, n, n, GraphSpec(fanout=spec.listed - 1))
    show("search", **name, graphs="star of each list", walk=walk(False),
         **truth.search(star, pool, ids, False))  # fmt: skip
    short = link(lists[..., :128], n, n, GraphSpec(listed=128))
    show("search", **name, graphs="lists of 128", walk=walk(False),
         **truth.search(short, pool, ids, False))  # fmt: skip

    show("top", **name, **truth.top(layer, pool, ids))

    one = jnp.asarray(q[:, :, :1])
    seed = jnp.asarray(truth.seed[:, :, :1])

    def step(limit, shared):
        return lambda: graph_search(layer, one, pool, ids, limit, 0, truth.beta, seed, shared)

    alone_ms, shared_ms, top_ms, flat_ms = median_ms(
        step(n, False),
        step(n, True),
        lambda: graph_top(layer, one, pool, ids, n, 0),
        lambda: flat_scan(one, pool),
    )
    show("time", **name, heads_alone_ms=alone_ms, group_shares_ms=shared_ms, top_ms=top_ms,
         flat_ms=flat_ms)  # fmt: skip
    for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.1):
        limit = int(share * n)
        part = Truth(np.asarray(keys), q, 0, limit, False)
        ms, full = median_ms(step(limit, False), step(n, False))
        show("filter", **name, limit=share, **part.search(layer, pool, ids, False),
             ms=ms, unfiltered_ms=full, cost=round(ms / full, 2))  # fmt: skip


def real(options):
    lengths = [int(n) for n in options.lengths.split(",")]
    model = aj.load("smollm2-135m", dtype="float32", progress=False)
    if options.yarn:
        model = real_keys.stretched(model, options.yarn)
    texts = [options.text] if options.text else real_keys.TEXTS
    tokens = real_keys.tokens_of(model, texts, max(lengths))
    k, q = prefill(model, tokens)
    kv_heads, group, _, dim = q[0].shape
    for n in lengths:
        covered = n - 1024
        positions = np.tile(np.arange(covered), group)
        pick = np.random.default_rng(0).permutation(len(positions))
        pick = pick[: int(options.queries * covered)]
        at = jnp.broadcast_to(positions[pick], (kv_heads, len(pick)))
        rows, spec = {}, GraphSpec()
        for i, layer in enumerate(LAYERS):
            keys = jnp.asarray(k[i][:, :n])
            pool, ids = pages_of(keys)
            sample = jnp.asarray(q[i][:, :, :covered].reshape(kv_heads, -1, dim)[:, pick])
            lists = query_lists(keys[:, :covered], covered, sample, spec.listed, at, SINK)
            own = pick // covered
            asked = q[i][:, :, n - 8 : n]
            truth = Truth(np.asarray(keys), asked, SINK, covered, window=True)
            graph = link(lists, covered, covered, spec)
            heads = []
            for g in range(group):
                mine = link(lists[:, own == g], covered, covered, spec)
                alone = Truth(np.asarray(keys), asked[:, g : g + 1], SINK, covered, window=True)
                heads.append(alone.search(mine, pool, ids, False))
            further = {
                ("graph of a group", f"each head walks, l0 {l0}"): truth.search(
                    graph, pool, ids, False, l0
                )
                for l0 in options.l0
            }
            results = further | {
                ("graph of a group", "each head walks"): truth.search(graph, pool, ids, False),
                ("graph of a group", "the group walks"): truth.search(graph, pool, ids, True),
                ("graphs of each head", "each head walks"): mean(heads),
                ("star of each list", "each head walks"): truth.search(
                    link(lists, covered, covered, GraphSpec(fanout=spec.listed - 1)),
                    pool,
                    ids,
                    False,
                ),
            }
            top = truth.top(graph, pool, ids)
            show("top", data=repr(model), context=n, layer=layer, **top)
            rows.setdefault(("graph of a group", "top"), []).append(top)
            for name, result in results.items():
                show("search", data=repr(model), context=n, layer=layer, index=name[0], by=name[1],
                     **result)  # fmt: skip
                rows.setdefault(name, []).append(result)
        for name, results in rows.items():
            show("layers", data=repr(model), context=n, queries=len(pick), index=name[0],
                 by=name[1], **mean(results))  # fmt: skip


def mean(rows):
    """Of each number, over the rows that have it."""
    return {
        name: round(float(np.mean([row[name] for row in rows if row.get(name) is not None])), 5)
        for name in rows[0]
        if any(row.get(name) is not None for row in rows)
    }


def prefill(model, tokens):
    """Keys [K, N, D] and queries [K, G, N, D] of `LAYERS`."""
    pages = len(tokens) // PAGE
    kv = PagedKV.create(model.config, pages + 1, PAGE, jnp.float32)
    queries = []
    for start in range(0, len(tokens), CHUNK):
        table = PageTable(jnp.arange(1, pages + 1)[None], jnp.full(1, start))
        new = jnp.asarray(tokens[start : start + CHUNK])
        kv, asked = chunk(model.params, kv, table, new, model.config)
        queries.append(jax.tree.map(np.asarray, asked))
    keys = [np.asarray(kv.k[i][:, 1:]) for i in LAYERS]
    keys = [x.reshape(x.shape[0], -1, x.shape[-1]) for x in keys]
    return keys, [np.concatenate(parts, axis=2) for parts in zip(*queries, strict=True)]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="kv")
def chunk(params, kv, table, tokens, config):
    """A chunk of a prefill; the queries of `LAYERS` [K, G, T, D]."""
    count = jnp.full(1, tokens.shape[0])

    def attend(layer, q, k, v, state):
        kv, queries = state
        kv = cache.append(kv, layer, k, v, table, count)
        out, _ = attend_pages(Plan(Full()), q, Memory(kv, table).layer(layer), count)
        rows = q[0].reshape(q.shape[1], k.shape[2], -1, k.shape[3])
        kept = (*queries, jnp.transpose(rows, (1, 2, 0, 3))) if layer in LAYERS else queries
        return out, (kv, kept)

    positions = table.length[:, None] + jnp.arange(tokens.shape[0])
    at = jnp.zeros(1, jnp.int32)
    _, state = forward(params, config, tokens[None], positions, attend, (kv, ()), logits_at=at)
    return state


def walk(shared):
    return "shared by the group" if shared else "each head"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["planted", "real"])
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--queries", type=float, default=0.1, help="to build from, over keys")
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--yarn", type=float, help="real: stretch RoPE by this factor")
    parser.add_argument("--text", type=Path, help="real: in place of this repository's")

    def numbers(text):
        return [int(x) for x in text.split(",")]

    parser.add_argument("--l0", type=numbers, default=[], help=f"real: beside {L0}, such as 32,256")
    options = parser.parse_args()
    facts = machine.facts("alaya_jax", "jax", "jaxlib", "numpy")
    said = vars(options) | {"text": options.text and options.text.name}
    print(json.dumps({"benchmark": "graph_recall", **said, **facts}), flush=True)
    {"planted": planted, "real": real}[options.what](options)


if __name__ == "__main__":
    main()
