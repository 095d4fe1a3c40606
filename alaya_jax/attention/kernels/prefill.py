"""A chunk of new tokens: `block_sparse_prefill` over all keys or over listed blocks of them."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from alaya_jax.attention.counts import Counts
from alaya_jax.attention.layer import LayerQueries
from alaya_jax.attention.selection import select_tiles
from alaya_jax.cache.views import Pages
from alaya_jax.pallas_kernels.block_sparse_prefill import QUERY_BLOCK, ROWS, block_sparse_prefill
from alaya_jax.pallas_kernels.block_sparse_prefill import choose as choose_prefill
from alaya_jax.pallas_kernels.dispatch import Choice, Target
from alaya_jax.query import Full, Tiles
from alaya_jax.query.plan import Plan

BLOCK = 128
"""Keys per tile in a dense prefill."""


def choose(plan: Plan, batch: LayerQueries, target: Target) -> Choice | str:
    """The implementation that `block_sparse_prefill` would run, or why it does not apply."""
    block = BLOCK
    if isinstance(plan.query, Tiles):
        if plan.query.kv_block is None or plan.query.q_block != QUERY_BLOCK:
            return (
                f"Tiles(q_block={plan.query.q_block}, kv_block={plan.query.kv_block}): blocks are "
                f"of {QUERY_BLOCK} queries, and of 64 or 128 keys"
            )
        block = plan.query.kv_block
    elif not isinstance(plan.query, Full):
        return f"a chunk of tokens is answered for Full and Tiles, not {type(plan.query).__name__}"
    if batch.memory.table.start is not None:
        return "pages of a chunk's sequences are spread over devices"
    if block % batch.memory.k.shape[2]:
        return f"pages of {batch.memory.k.shape[2]} tokens do not fill a block of {block}"
    table = batch.memory.table
    args = (batch.q, batch.memory.k, batch.memory.v, table.pages, table.length, batch.count)
    return choose_prefill(*args, block_kv=block, target=target)


def attend(plan: Plan, batch: LayerQueries, options: dict[str, Any]) -> tuple[Array, Counts]:
    """As `kernels.attend`; `options` are the implementation and target of the operation."""
    b, t, heads, _ = batch.q.shape
    table, count = batch.memory.table, batch.count
    args = (batch.q, batch.memory.k, batch.memory.v, table.pages, table.length, count)
    offset = jnp.arange(t)
    end = jnp.where(offset < count[:, None], table.length[:, None] + offset + 1, 0)  # [B, T]
    rows = (b, t, heads)
    if isinstance(plan.query, Full):
        out = block_sparse_prefill(*args, block_kv=BLOCK, **options).out
        return out, Counts.of(rows, end[..., None], end[..., None], mass=1.0)

    rule = plan.query
    assert isinstance(rule, Tiles)
    assert rule.kv_block is not None
    kv_heads = batch.memory.k.shape[0]

    def select(args: Any) -> Any:
        q, ids, positions = args
        q = jnp.moveaxis(q.reshape(t, kv_heads, -1, q.shape[-1]), 0, 2)
        return select_tiles(q, Pages(batch.memory.k, batch.memory.v, ids), positions, rule)

    tiles = lax.map(select, (batch.q, table.pages, end - 1))
    done = block_sparse_prefill(
        *args,
        blocks=tiles.blocks,
        block_counts=tiles.count,
        block_kept=tiles.kept,
        beta=rule.beta,
        block_kv=rule.kv_block,
        **options,
    )
    # Count listed keys up to the query's own position; a skipped tile has only such keys.
    block = offset // QUERY_BLOCK
    first = tiles.blocks[:, :, block] * rule.kv_block  # [B, K, T, M]
    seen = jnp.clip(end[:, None, :, None] - first, 0, rule.kv_block)
    real = jnp.arange(first.shape[-1]) < tiles.count[:, :, block, None]
    listed = jnp.sum(jnp.where(real, seen, 0), axis=-1)  # [B, K, T]
    tile = offset // ROWS
    skipped = done.skipped[:, :, tile] * rule.kv_block * (offset < count[:, None])[:, None]

    def by_head(x: Array) -> Array:  # [B, K, T] -> [B, T, H]
        return jnp.moveaxis(jnp.repeat(x, heads // kv_heads, axis=1), 1, 2)

    attended = by_head(listed) - jnp.moveaxis(skipped, 1, 2)
    scored = by_head((tiles.count * rule.kv_block)[:, :, block])
    mass = jnp.nan
    if rule.recovery is not None:
        mass = jnp.moveaxis(tiles.mass.reshape(b, heads, -1)[:, :, block], 1, 2)
    read = scored * (offset % QUERY_BLOCK == 0)[:, None]
    return done.out, Counts.of(rows, attended, scored, read=read, mass=mass)
