"""Block-sparse prefill in XLA: a loop over the listed tiles, with no work for any other."""

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
from alaya_jax.pallas_kernels.dispatch import Target

_LOW = float(jnp.finfo(jnp.float32).min)
_HALVES = QUERY_BLOCK // ROWS


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
    target: Target,
) -> Prefill:
    """As `block_sparse_prefill`: one block of queries at a time, all heads that share a list."""
    tokens, dtype = q.shape[1], q.dtype
    q = pad_queries(q)
    batch, padded, heads, dim = q.shape
    kv_heads, _, page, _ = k_pages.shape
    q_blocks = padded // QUERY_BLOCK
    lead = kv_heads if lists is None else lists.blocks.shape[1]  # heads with their own list
    sharing = heads // lead
    # Matmuls in other types are slow on CPUs.
    dot_dtype = jnp.float32 if target.platform == "cpu" else k_pages.dtype
    visible = visible_blocks(lengths, count, q_blocks, block_kv)

    def block_of_queries(index: Array) -> tuple[Array, Array, Array]:
        b, block = index // (lead * q_blocks), index % q_blocks
        of_list = index // q_blocks % lead
        head = of_list * sharing
        start = block * QUERY_BLOCK
        x = lax.dynamic_slice(q, (b, start, head, 0), (1, QUERY_BLOCK, sharing, dim))
        x = jnp.moveaxis(x[0], 1, 0).reshape(sharing, _HALVES, ROWS, dim).astype(dot_dtype)
        row = start + jnp.arange(QUERY_BLOCK).reshape(_HALVES, ROWS, 1)
        length, new = lengths[b], count[b]
        ids = pages[b]
        kv_head = head // (heads // kv_heads)
        limit = None if beta is None else lax.dynamic_slice(beta, (head,), (sharing,))

        def read(pool: Array, tile: Array) -> Array:
            which = tile * (block_kv // page) + jnp.arange(block_kv // page)
            rows = pool[kv_head, jnp.take(ids, which, mode="clip")].reshape(block_kv, dim)
            # Slots past the end may hold anything.
            used = tile * block_kv + jnp.arange(block_kv) < length + new
            return jnp.where(used[:, None], rows, 0).astype(dot_dtype)

        def step(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            top, total, acc, skipped = carry
            if lists is None:
                tile = visible[b, block] - 1 - i
            else:
                tile = lists.blocks[b, of_list, block, i]
            s = jnp.einsum(
                "hutd,sd->huts", x, read(k_pages, tile), preferred_element_type=jnp.float32
            )
            key = tile * block_kv + jnp.arange(block_kv)
            s = jnp.where((key <= length + row) & (row < new), s, -jnp.inf)
            tile_top = jnp.max(s, axis=-1)
            keep = jnp.ones((sharing, _HALVES), bool)
            if limit is not None:
                first = start + jnp.arange(_HALVES) * ROWS
                ragged = ((tile + 1) * block_kv > length + first + 1) | (first + ROWS > new)
                keep = ragged | jnp.any(tile_top >= top - limit[:, None, None], axis=-1)
                if lists is not None:
                    keep |= i < lists.kept[b, of_list, block]

            def attend(top: Array, total: Array, acc: Array) -> tuple[Array, Array, Array]:
                taken = jnp.where(keep[..., None], tile_top, -jnp.inf)
                new_top = jnp.maximum(top, taken)
                fade = jnp.exp((top - new_top) * scale)
                p = jnp.exp((s - new_top[..., None]) * scale)
                p = jnp.where(keep[..., None, None], p, 0.0)
                pv = jnp.einsum(
                    "huts,sd->hutd",
                    p.astype(dot_dtype),
                    read(v_pages, tile),
                    preferred_element_type=jnp.float32,
                )
                total = total * fade + jnp.sum(p, axis=-1)
                return new_top, total, acc * fade[..., None] + pv

            state = lax.cond(keep.any(), attend, lambda *old: old, top, total, acc)
            return (*state, skipped + ~keep)

        tiles = visible[b, block]
        if lists is not None:
            tiles = jnp.where(tiles > 0, lists.count[b, of_list, block], 0)
        shape = (sharing, _HALVES, ROWS)
        start_state = (
            jnp.full(shape, _LOW),
            jnp.zeros(shape),
            jnp.zeros((*shape, dim)),
            jnp.zeros(shape[:2], jnp.int32),
        )
        top, total, acc, skipped = lax.fori_loop(0, tiles, step, start_state)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        out = (acc / total[..., None]).astype(dtype)
        return out, jnp.where(some, top * scale + jnp.log(total), -jnp.inf), skipped

    out, lse, skipped = lax.map(block_of_queries, jnp.arange(batch * lead * q_blocks))

    def join(x: Array, *tail: int) -> Array:  # [B * lead * QB, sharing, 2, ...] -> [B, H, ...]
        x = x.reshape(batch, lead, q_blocks, sharing, *x.shape[2:])
        return jnp.moveaxis(x, 3, 2).reshape(batch, heads, *tail)

    out = jnp.moveaxis(join(out, padded, dim), 1, 2)
    used = -(-tokens // ROWS)
    return Prefill(out[:, :tokens], join(lse, padded)[..., :tokens], join(skipped, -1)[..., :used])
