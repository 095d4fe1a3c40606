"""Builds a graph over a context's keys from queries that its prefill asked.

Each query lists its best keys, found exactly. Keys that a query wants together are linked along a
tree over its list: the key at place i with the one at place (i - 1) // fanout, both ways. So every
prefix of a list, which is what DIPR answers for some beta, hangs together and begins with the best
key. A key keeps the edges that most lists ask for.

With a fanout as long as a list, the tree is the star of RoarGraph (arXiv 2408.08933): the query's
best key linked with all others. That key then has more edges than it may keep, and the rest hang on
it alone. docs/decisions.md says what was measured.

Connectivity. A key that no list holds would be unreachable. So `beside` edges a side go to the next
positions: neighbouring tokens are alike, and the graph is connected whatever the queries were.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alaya_jax.errors import ConfigError
from alaya_jax.index.graph.layer import GraphLayer
from alaya_jax.index.select import largest

START_EVERY = 256
"""Keys of a context for each key where searches may start."""

STARTS = 64
"""Of which there are at least so many, and a multiple: a program is compiled for their number."""

_SCORES = 2**26  # float32 held at once


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """How a graph is built.

    Attributes:
      degree: R, neighbours of a key.
      listed: best keys of a query that are linked (RoarGraph's N_q).
      fanout: children of a key in a query's tree.
      beside: neighbours by position, on each side.
      starts: E, keys where searches may start: those that are most queries' best. None:
        `default_starts`. A search that knows a good score from its window does not walk through
        worse keys: it must start near its answer.

    Raises:
      ConfigError: a number that is not positive, or no room for edges between listed keys.
    """

    degree: int = 32
    listed: int = 512
    fanout: int = 2
    beside: int = 1
    starts: int | None = None

    def __post_init__(self) -> None:
        starts = 1 if self.starts is None else self.starts
        if self.beside < 0 or min(self.listed, self.fanout, starts) < 1:
            raise ConfigError(f"{self}: all but `beside` must be at least 1, and that at least 0")
        if self.degree <= 2 * self.beside:
            raise ConfigError(f"{self}: `degree` must exceed twice `beside`; use 32 or so")


def build(
    keys: Float[Array, "K N D"],
    length: int,
    queries: Float[Array, "K Q D"],
    positions: Int[Array, "K Q"] | None = None,
    *,
    low: int = 0,
    spec: GraphSpec | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> GraphLayer:
    """The graph of one layer of one context.

    One kv head after another. The exact search for a query's best keys, nearly all of the work, is
    a jitted step a block of queries, with 256 MiB of scores at a time. Linking is done by the host,
    with about 64 * Q * `listed` bytes.

    Args:
      keys: after RoPE; what is past `length` is not looked at.
      length: keys of the context.
      queries: rotated, unscaled; some of those that the prefill asked, of all heads of a group (of
        one head for a graph of its own). AlayaDB takes 0.4 N of them; see graph_recall.py for less.
      positions: where each query was asked: it lists only keys before it, as it attended. None:
        all keys. -1 marks a query that is not there (padding).
      low: keys before it get no edges from lists (the sink, which is attended to anyway, and would
        be at the head of most lists).
      spec: defaults to `GraphSpec()`.
      on_block: called with blocks done and blocks in all.
    """
    spec = spec or GraphSpec()
    lists = query_lists(keys, length, queries, spec.listed, positions, low, on_block)
    return link(lists, length, keys.shape[1], spec)


def query_lists(
    keys: Float[Array, "K N D"],
    length: int,
    queries: Float[Array, "K Q D"],
    listed: int,
    positions: Int[Array, "K Q"] | None = None,
    low: int = 0,
    on_block: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Best keys of each query, int32 [K, Q, listed]; arguments as in `build`."""
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
    out = np.empty((heads, blocks * block, listed), np.int32)
    for head in range(heads):
        for i in range(blocks):
            rows = slice(i * block, (i + 1) * block)
            out[head, rows] = best_keys(
                keys[head], queries[head, rows], low, positions[head, rows], listed
            )
            if on_block is not None:
                on_block(head * blocks + i + 1, heads * blocks)
    return out[:, :count]


@functools.partial(jax.jit, static_argnames="count")
def best_keys(
    keys: Float[Array, "N D"],
    q: Float[Array, "Q D"],
    low: int | Array,
    high: Int[Array, " Q"],
    count: int,
) -> Int[Array, "Q count"]:
    """Positions of each query's best keys in `low <= j < high`, best first; -1 past the last."""
    n = keys.shape[0]
    scores = jnp.einsum("qd,nd->qn", q.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
    position = jnp.arange(n)
    seen = (position >= low) & (position < high[:, None])
    scores = jnp.where(seen, scores, -jnp.inf)
    best, found = largest(scores, min(count, n))
    found = jnp.where(best > -jnp.inf, found, -1).astype(jnp.int32)
    return jnp.pad(found, ((0, 0), (0, count - found.shape[1])), constant_values=-1)


def link(lists: np.ndarray, length: int, n: int, spec: GraphSpec) -> GraphLayer:
    """The graph from the queries' lists, int32 [K, Q, listed]."""
    heads = len(lists)
    position = np.arange(n, dtype=np.int32)[:, None]
    side = [step for i in range(1, spec.beside + 1) for step in (i, -i)]
    beside = position + np.asarray(side, np.int32)
    beside[(beside < 0) | (beside >= length)] = -1
    near = np.empty((heads, n, spec.degree), np.int32)
    count = spec.starts or default_starts(length)
    starts = np.full((heads, count), -1, np.int32)
    child = np.arange(1, spec.listed)
    parent = (child - 1) // spec.fanout
    for head, best in enumerate(lists):
        down, up = best[:, parent].ravel(), best[:, child].ravel()
        real = up >= 0  # a list that ends does so for both ends of its later edges
        ends = np.stack([down[real], up[real]])
        linked = most_asked(ends.ravel(), ends[::-1].ravel(), n, spec.degree - len(side))
        near[head] = np.concatenate([linked, beside], axis=1)
        asked = np.bincount(best[best[:, 0] >= 0, 0], minlength=n)
        most = np.argsort(-asked, kind="stable")[:count]
        starts[head, : len(most)] = np.where(asked[most] > 0, most, -1)
    near[:, length:] = -1
    return GraphLayer(jnp.asarray(near), jnp.asarray(starts), jnp.asarray(length, jnp.int32))


def default_starts(length: int) -> int:
    """One start for each 256 keys of a context, and at least 64."""
    return STARTS * max(1, -(-length // (START_EVERY * STARTS)))


def most_asked(source: np.ndarray, target: np.ndarray, n: int, width: int) -> np.ndarray:
    """Each node's most frequent targets, most frequent first: int32 [N, width], -1 where none.

    By sorting edges as single integers: numpy does that several times as fast as XLA sorts pairs.
    """
    edge, times = np.unique(source.astype(np.int64) * n + target, return_counts=True)
    source, target = np.divmod(edge, n)
    most = 2**62 // (n * n)  # so that what follows fits 63 bits
    rank = most - 1 - np.minimum(times, most - 1)
    source, rest = np.divmod(np.sort((source * most + rank) * n + target), most * n)
    place = np.arange(len(source)) - np.searchsorted(source, source)
    fits = place < width
    out = np.full((n, width), -1, np.int32)
    out[source[fits], place[fits]] = (rest % n)[fits]
    return out
