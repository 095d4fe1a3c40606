"""Builds a graph over a context's keys from queries that its prefill asked.

Each query lists its best keys, found exactly. Keys that a query wants together are linked along a
tree over its list: the key at place i with the one at place (i - 1) // fanout, both ways. So every
prefix of a list, which is what DIPR answers for some beta, hangs together and begins with the best
key. A key keeps the edges that most lists ask for.

With a fanout as long as a list, the tree is RoarGraph's star (arXiv 2408.08933): the query's best key
linked with all others. Its best key then has as many neighbours as it may, and the rest one. The
measurements that the tree was chosen by are in docs/decisions.md.

Connectivity. A key that no list holds would be unreachable. So `beside` edges a side go to the next
positions: neighbouring tokens are alike, and the graph is connected whatever the queries were.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alaya_jax.errors import ConfigError
from alaya_jax.index.graph import GraphLayer

_CHUNK = 128  # scores of which only the best is looked at first
_SCORES = 2**26  # float32 held at once


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """How a graph is built.

    Attributes:
      degree: R, neighbours of a key.
      listed: best keys of a query that are linked (RoarGraph's N_q).
      fanout: children of a key in a query's tree.
      beside: neighbours by position, on each side.
      starts: E, keys where searches may start: those that are most queries' best.

    Raises:
      ConfigError: a number that is not positive, or no room for edges between listed keys.
    """

    degree: int = 32
    listed: int = 128
    fanout: int = 2
    beside: int = 1
    starts: int = 64

    def __post_init__(self) -> None:
        if self.beside < 0 or min(self.listed, self.fanout, self.starts) < 1:
            raise ConfigError(f"{self}: all but `beside` must be at least 1, and that at least 0")
        if self.degree <= 2 * self.beside:
            raise ConfigError(f"{self}: `degree` must exceed twice `beside`; use 32 or so")


def build(
    keys: Float[Array, "K N D"],
    length: int | Array,
    queries: Float[Array, "K Q D"],
    positions: Int[Array, "K Q"] | None = None,
    *,
    low: int | Array = 0,
    spec: GraphSpec | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> GraphLayer:
    """The graph of one layer of one context.

    A few jitted steps, one kv head after another; between them the host only counts. Of scores,
    256 MiB are held at once; of edges, 24 * Q * `listed` bytes and the sort's copy of it.

    Args:
      keys: after RoPE; what is past `length` is not looked at.
      length: keys of the context.
      queries: rotated, unscaled; some of those that the prefill asked, of all heads of a group (of
        one head for a graph of its own). AlayaDB takes 0.4 N of them; a tenth does too.
      positions: where each query was asked: it lists only keys before it, as it attended. None:
        all keys. -1 marks a query that is not there (padding).
      low: keys before it get no edges from lists (the sink, which is attended to anyway, and would
        be at the head of most lists).
      spec: defaults to `GraphSpec()`.
      on_block: called with blocks done and blocks in all.
    """
    spec = spec or GraphSpec()
    heads, n, _ = keys.shape
    count = queries.shape[1]
    if positions is None:
        positions = jnp.full((heads, count), n)
    positions = jnp.minimum(jnp.asarray(positions), length)
    block = max(1, min(count, _SCORES // n))
    blocks = -(-count // block)
    pad = blocks * block - count
    queries = jnp.pad(queries, ((0, 0), (0, pad), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, pad)), constant_values=-1)
    neighbours, starts = [], []
    for head in range(heads):
        lists = []
        for i in range(blocks):
            rows = slice(i * block, (i + 1) * block)
            lists.append(
                best_keys(keys[head], queries[head, rows], low, positions[head, rows], spec.listed)
            )
            if on_block is not None:
                jax.block_until_ready(lists[-1])
                on_block(head * blocks + i + 1, heads * blocks)
        near, start = _link(jnp.concatenate(lists), jnp.asarray(length), n, spec)
        neighbours.append(near)
        starts.append(start)
    return GraphLayer(jnp.stack(neighbours), jnp.stack(starts), jnp.asarray(length, jnp.int32))


@functools.partial(jax.jit, static_argnames="count")
def best_keys(
    keys: Float[Array, "N D"],
    q: Float[Array, "Q D"],
    low: int | Array,
    high: Int[Array, " Q"],
    count: int,
) -> Int[Array, "Q count"]:
    """Positions of each query's best keys in `low <= j < high`, best first; -1 past the last.

    Exact: the best `count` are among the chunks with the best `count` maxima.
    """
    n = keys.shape[0]
    scores = jnp.einsum("qd,nd->qn", q.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
    position = jnp.arange(n)
    seen = (position >= low) & (position < high[:, None])
    scores = jnp.where(seen, scores, -jnp.inf)
    if n > 2 * count * _CHUNK:
        scores = jnp.pad(scores, ((0, 0), (0, -n % _CHUNK)), constant_values=-jnp.inf)
        chunks = scores.reshape(q.shape[0], -1, _CHUNK)
        _, which = lax.top_k(jnp.max(chunks, axis=-1), count)
        inside = jnp.take_along_axis(chunks, which[..., None], axis=1).reshape(q.shape[0], -1)
        best, at = lax.top_k(inside, count)
        found = jnp.take_along_axis(which, at // _CHUNK, axis=1) * _CHUNK + at % _CHUNK
    else:
        best, found = lax.top_k(scores, min(count, n))
    found = jnp.where(best > -jnp.inf, found, -1).astype(jnp.int32)
    return jnp.pad(found, ((0, 0), (0, count - found.shape[1])), constant_values=-1)


@functools.partial(jax.jit, static_argnames=("n", "spec"))
def _link(
    lists: Int[Array, "Q C"], length: Array, n: int, spec: GraphSpec
) -> tuple[Int[Array, "N R"], Int[Array, " E"]]:
    """Neighbours and starts from the queries' lists."""
    child = jnp.arange(1, spec.listed)
    parent = (child - 1) // spec.fanout
    down, up = lists[:, parent].ravel(), lists[:, child].ravel()
    linked = most_asked(
        jnp.concatenate([down, up]),
        jnp.concatenate([up, down]),
        n,
        spec.degree - 2 * spec.beside,
    )
    position = jnp.arange(n)
    side = [step for i in range(1, spec.beside + 1) for step in (i, -i)]
    beside = position[:, None] + jnp.asarray(side, jnp.int32)
    beside = jnp.where((beside >= 0) & (beside < length), beside, -1)
    near = jnp.concatenate([linked, beside], axis=1)
    near = jnp.where((position < length)[:, None], near, -1)

    first = lists[:, 0]
    asked = jnp.zeros(n, jnp.int32).at[jnp.where(first >= 0, first, n)].add(1, mode="drop")
    times, start = lax.top_k(asked, min(spec.starts, n))
    start = jnp.where(times > 0, start, -1)
    return near, jnp.pad(start, (0, spec.starts - start.shape[0]), constant_values=-1)


def most_asked(
    source: Int[Array, " E"], target: Int[Array, " E"], n: int, width: int
) -> Int[Array, "N width"]:
    """Each node's most frequent targets, most frequent first; an edge with an end of -1 is none."""
    real = (source >= 0) & (target >= 0)
    source, target = lax.sort((jnp.where(real, source, n), target), num_keys=2)
    index = jnp.arange(source.shape[0])
    before = jnp.roll(source, 1).at[0].set(-1)
    first = (source != before) | (target != jnp.roll(target, 1))
    # Copies of an edge stand together: they end where the next edge begins.
    begin = jnp.where(first, index, source.shape[0])
    end = lax.cummin(jnp.roll(begin, -1).at[-1].set(source.shape[0]), reverse=True)
    source = jnp.where(first, source, n)
    source, _, target = lax.sort((source, index - end, target), num_keys=2)
    before = jnp.roll(source, 1).at[0].set(-1)
    place = index - lax.cummax(jnp.where(source != before, index, 0))
    place = jnp.where(source < n, place, width)
    return jnp.full((n, width), -1, jnp.int32).at[source, place].set(target, mode="drop")
