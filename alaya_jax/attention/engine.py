"""Attention of a batch, one layer, by a query: select, attend, merge (AlayaDB, section 7.2).

Full          every key
Window        first and last keys
DIPR, TopK    window keys, and the retrieved ones: scored by the flat index, selected, attended;
              the two partial attentions are merged
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alaya_jax.attention.paged import (
    KeyRange,
    Pages,
    attend_range,
    attend_scores,
    over_query_blocks,
    score_range,
)
from alaya_jax.attention.partial import merge
from alaya_jax.cache import PageTable
from alaya_jax.query import DIPR, Full, Query, TopK, Window
from alaya_jax.query.select import select

QUERY_BLOCK = 128
"""Query tokens worked on at once: bounds the scores held, [H, QUERY_BLOCK, tile or context]."""


@jax.jit  # traced once, not once a layer
def attend(
    query: Query,
    q: Float[Array, "B T H D"],
    k_pages: Float[Array, "K P Z D"],
    v_pages: Float[Array, "K P Z D"],
    table: PageTable,
    count: Int[Array, " B"],
) -> tuple[Float[Array, "B T H D"], Int[Array, "B T H"]]:
    """Attention of the last `count[b]` tokens of each sequence over its keys, causal.

    Args:
      query: which keys to attend to.
      q: rotated, unscaled queries of T tokens; those past `count` give zeros.
      k_pages, v_pages: pool of one layer, the new tokens already written.
      table: pages, and the lengths *before* the new tokens.
      count: new tokens of each sequence, at most T.

    Returns:
      the attention output, in q's dtype, and how many keys each query token and head attended to.
    """
    batch, t, heads, dim = q.shape
    kv_heads = k_pages.shape[0]
    rows = jnp.transpose(q.reshape(batch, t, kv_heads, heads // kv_heads, dim), (0, 2, 3, 1, 4))
    offset = jnp.arange(t)
    positions = jnp.where(offset < count[:, None], table.length[:, None] + offset, -1)

    def one(args: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        row, position, ids = args
        pages = Pages(k_pages, v_pages, ids)
        return over_query_blocks(
            lambda q, p: _attend_rows(query, q, p, pages), row, position, QUERY_BLOCK
        )

    if batch == 1:
        out, attended = one((rows[0], positions[0], table.pages[0]))
        out, attended = out[None], attended[None]
    else:
        # One sequence after another: each costs its own length, whatever the others' lengths are.
        out, attended = lax.map(one, (rows, positions, table.pages))
    out = jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(batch, t, heads, dim)
    attended = jnp.transpose(attended, (0, 3, 1, 2)).reshape(batch, t, heads)
    return out.astype(q.dtype), attended


def _attend_rows(
    query: Query, q: Float[Array, "K G T D"], positions: Int[Array, " T"], pages: Pages
) -> tuple[Float[Array, "K G T D"], Int[Array, "K G T"]]:
    """One sequence. A query at position p sees the keys 0..p; p = -1 sees none."""
    zero, end = jnp.zeros_like(positions), positions + 1
    if isinstance(query, Full):
        partial, _ = attend_range(q, pages, KeyRange(zero, end))
        return partial.out, jnp.broadcast_to(end, q.shape[:-1])

    window = query if isinstance(query, Window) else query.window
    sink_end = jnp.minimum(window.sink, end)
    recent_start = jnp.maximum(sink_end, end - window.recent)
    inside, best = attend_range(q, pages, KeyRange(zero, end, sink_end, recent_start))
    attended = jnp.broadcast_to(sink_end + end - recent_start, q.shape[:-1])
    if isinstance(query, Window):
        return inside.out, attended

    assert isinstance(query, DIPR | TopK)
    outside = KeyRange(sink_end, recent_start)
    scores = score_range(q, pages, outside)
    kept = select(query, scores, best)
    retrieved = attend_scores(jnp.where(kept, scores, -jnp.inf), pages, outside, q.shape[-1])
    return merge(inside, retrieved).out, attended + jnp.sum(kept, axis=-1, dtype=jnp.int32)
