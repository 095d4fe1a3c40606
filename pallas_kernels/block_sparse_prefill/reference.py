"""Defines block-sparse prefill: compute every score, then mask what is not attended to."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alaya_jax.pallas_kernels.block_sparse_prefill.layout import (
    QUERY_BLOCK,
    ROWS,
    Lists,
    Prefill,
    pad_queries,
    visible_blocks,
)


def prefill(
    q: Float[Array, "B T H D"],
    k_pages: Float[Array, "K P Z D"],
    v_pages: Float[Array, "K P Z D"],
    pages: Int[Array, "B N"],
    lengths: Int[Array, " B"],
    count: Int[Array, " B"],
    *,
    lists: Lists | None,
    beta: Float[Array, " H"] | None,
    block_kv: int,
    scale: float,
) -> Prefill:
    """As `block_sparse_prefill`."""
    tokens, dtype = q.shape[1], q.dtype
    q = pad_queries(q)
    batch, padded, heads, dim = q.shape
    group = heads // k_pages.shape[0]
    q_blocks, q_tiles = padded // QUERY_BLOCK, padded // ROWS

    def rows(pool: Array) -> Float[Array, "B H S D"]:
        x = jnp.moveaxis(pool[:, pages], 0, 1).astype(jnp.float32)
        x = x.reshape(batch, -1, pages.shape[1] * pool.shape[2], dim)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block_kv), (0, 0)))
        used = jnp.arange(x.shape[2]) < (lengths + count)[:, None]
        return jnp.repeat(jnp.where(used[:, None, :, None], x, 0), group, axis=1)

    k, v = rows(k_pages), rows(v_pages)
    blocks = k.shape[2] // block_kv
    score = jnp.einsum("bthd,bhsd->bhts", q.astype(jnp.float32), k, precision=lax.Precision.HIGHEST)
    row, key = jnp.arange(padded)[:, None], jnp.arange(blocks * block_kv)
    seen = (key <= lengths[:, None, None] + row) & (row < count[:, None, None])  # [B, T, S]
    score = jnp.where(seen[:, None], score, -jnp.inf)

    # The blocks in the order in which they are visited, [B, J, QB, M], and how many there are.
    visible = visible_blocks(lengths, count, q_blocks, block_kv)
    if lists is None:
        order = (visible[..., None] - 1 - jnp.arange(blocks))[:, None]
        n = visible[:, None]
    else:
        order, n = lists.blocks, lists.count
        n = jnp.where((visible > 0)[:, None], n, 0)
    always = jnp.zeros_like(n) if lists is None else lists.kept
    order, n, always = (
        jnp.repeat(jnp.repeat(x, heads // x.shape[1], axis=1), q_tiles // q_blocks, axis=2)
        for x in (order, n, always)
    )

    # A tile is compared with the maxima that its rows have reached when it is visited.
    tops = score.reshape(batch, heads, q_tiles, ROWS, blocks, block_kv).max(axis=-1)
    tile, block = jnp.arange(q_tiles)[:, None], jnp.arange(blocks)
    first = lengths[:, None, None] + tile * ROWS
    ragged = ((block + 1) * block_kv > first + 1) | ((tile + 1) * ROWS > count[:, None, None])

    def visit(
        carry: tuple[Array, Array, Array], i: Array
    ) -> tuple[tuple[Array, Array, Array], None]:
        top, kept, skipped = carry
        j = order[..., i]
        valid = (i < n) & (j < blocks)
        at = jnp.minimum(j, blocks - 1)[..., None]
        tile_top = jnp.take_along_axis(tops, at[..., None], axis=-1)[..., 0]
        if beta is None:
            keep = valid
        else:
            wanted = jnp.any(tile_top >= top - beta[:, None, None], axis=-1) | (i < always)
            keep = valid & (wanted | jnp.take_along_axis(ragged[:, None], at, axis=-1)[..., 0])
        top = jnp.where(keep[..., None], jnp.maximum(top, tile_top), top)
        kept |= keep[..., None] & (block == at)
        return (top, kept, skipped + (valid & ~keep)), None

    shape = (batch, heads, q_tiles)
    start = (
        jnp.full((*shape, ROWS), jnp.finfo(jnp.float32).min),
        jnp.zeros((*shape, blocks), bool),
        jnp.zeros(shape, jnp.int32),
    )
    (_, kept, skipped), _ = lax.scan(visit, start, jnp.arange(order.shape[-1]))
    kept = jnp.repeat(jnp.repeat(kept, block_kv, axis=-1), ROWS, axis=2)
    score = jnp.where(kept, scale * score, -jnp.inf)

    top = jnp.max(score, axis=-1, keepdims=True)
    some = top > -jnp.inf
    p = jnp.where(some, jnp.exp(score - jnp.where(some, top, 0.0)), 0.0)
    total = jnp.where(some, jnp.sum(p, axis=-1, keepdims=True), 1.0)
    out = jnp.einsum("bhts,bhsd->bthd", p / total, v, precision=lax.Precision.HIGHEST)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
    used = -(-tokens // ROWS)
    return Prefill(out[:, :tokens].astype(dtype), lse[..., :tokens], skipped[..., :used])
