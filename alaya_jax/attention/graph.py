"""Attention over the keys that a graph search found (AlayaDB, sections 6.1.3 and 7.2).

The search computes exact scores, so only the values of what it found are read here. Where a search
found more than it had room for, a flat scan of all keys answers instead; such queries are counted.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alaya_jax.attention.kept import attend_kept
from alaya_jax.attention.retrieve import retrieve
from alaya_jax.attention.rows import Held, Rows
from alaya_jax.attention.softmax import Partial, Running, finish, fold, start
from alaya_jax.cache.views import Pages
from alaya_jax.index import Found, Graph, GraphLayer
from alaya_jax.index.graph.layer import Effort
from alaya_jax.query import DIPR, TopK
from alaya_jax.query.plan import Plan

_HELD = 2**16
"""At most so many values are read at once over all rows, but at least 16 for each."""


@dataclasses.dataclass(frozen=True)
class Searched:
    """The result of a search and its cost, for each query row.

    Attributes:
      partial: attention over the keys found.
      attended: how many there are.
      scored: keys scored, by the walk and, where that overflowed, by the flat scan.
      read: keys whose K was read; the heads of a group share them.
      widened: 1 where the walk overflowed and the flat scan answered.
    """

    partial: Partial
    attended: Int[Array, "K G T"]
    scored: Int[Array, "K G T"]
    read: Int[Array, "K G T"]
    widened: Int[Array, "K G T"]


def attend_graph(plan: Plan, rows: Rows) -> Searched:
    """Attention over those keys, among the ones that the query wants, that the graph finds.

    Args:
      plan: a DIPR with a beta, or a TopK; its index is a `Graph`.
      rows: all pages of the sequence must be on this device, and the graph must know all of
        `rows.keys`.
    """
    q, pages, keys = rows.q, rows.pages, rows.keys
    found = find(plan, rows)
    read = found.visited  # DIPR: one walk for all heads of a group
    if isinstance(plan.query, TopK):  # one walk for each head
        read = jnp.broadcast_to(jnp.sum(read, axis=1, keepdims=True), q.shape[:-1])
    partial, attended = attend_found(q, pages, found)
    over = found.overflow

    def by_flat() -> tuple[Partial, Array, Array]:
        flat = retrieve(plan, dataclasses.replace(rows, held=Held(pages)))
        wide, count, keys_read = attend_kept(q, flat.kept, flat.floor)
        first = jnp.arange(q.shape[2]) == 0  # one read for the block
        by_row = jnp.where(first, keys_read[:, None, None], 0)
        return wide, count, jnp.broadcast_to(by_row, read.shape)

    def as_found() -> tuple[Partial, Array, Array]:
        return partial, attended, jnp.zeros_like(read)

    wide, count, flat_read = lax.cond(jnp.any(over), by_flat, as_found)
    partial = Partial(
        jnp.where(over[..., None], wide.out, partial.out), jnp.where(over, wide.lse, partial.lse)
    )
    every = jnp.maximum(keys.high - keys.low, 0)
    return Searched(
        partial,
        jnp.where(over, count, attended),
        found.visited + jnp.where(over, every, 0),
        read + flat_read,
        over.astype(jnp.int32),
    )


def find(plan: Plan, rows: Rows) -> Found:
    """The keys that the graph finds for a plan; arguments as in `attend_graph`."""
    query, index, graph = plan.query, plan.index, rows.held.index
    assert isinstance(graph, GraphLayer)
    assert isinstance(query, DIPR | TopK)
    assert isinstance(index, Graph)
    q, pages, limit = rows.q, rows.pages, rows.before(query.before).keys.high
    # From the end of the sink on: that is where `keys` begins, except for a query inside the sink.
    low = jnp.asarray(query.window.sink, jnp.int32)
    if isinstance(query, TopK):
        ef = max(2 * query.k, index.l0)
        return graph.search_top(q, pages, limit, low, query.k, ef)
    assert query.beta is not None
    effort = Effort(index.l0, index.capacity)
    return graph.search_range(q, pages, limit, low, query.beta, rows.best, effort)


def attend_found(
    q: Float[Array, "K G T D"], pages: Pages, found: Found
) -> tuple[Partial, Int[Array, "K G T"]]:
    """Softmax attention over the keys that a search found.

    Values are read block by block, as many blocks as the longest list fills.

    Returns:
      the partial attention, and how many keys each row attends to.
    """
    scale, rows = q.shape[-1] ** -0.5, q.shape[:-1]
    heads, group, t = rows
    width = max(16, min(256, _HELD // (heads * group * t)))
    short = -found.positions.shape[-1] % width
    widths = ((0, 0), (0, 0), (0, 0), (0, short))
    positions = jnp.pad(found.positions, widths)
    scores = jnp.pad(found.scores, widths, constant_values=-jnp.inf)
    attended = found.count

    def block(i: Array, running: Running) -> Running:
        at, here = (
            lax.dynamic_slice_in_dim(x, i * width, width, axis=-1) for x in (positions, scores)
        )
        v = pages.gather(pages.v, at.reshape(heads, -1)).reshape(*at.shape, -1)
        # Unused slots name an arbitrary key, whose page may hold anything.
        v = jnp.where((here > -jnp.inf)[..., None], v, 0)

        def weigh(p: Array) -> Array:
            return jnp.einsum(
                "kgtc,kgtcd->kgtd", p.astype(v.dtype), v, preferred_element_type=jnp.float32
            )

        return fold(running, here, scale, weigh)

    blocks = -(-jnp.max(attended) // width)
    return finish(lax.fori_loop(0, blocks, block, start(rows, q.shape[-1])), scale), attended


__all__ = ["Searched", "attend_found", "attend_graph", "find"]
