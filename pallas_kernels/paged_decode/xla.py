"""`paged_decode` in XLA: gathers the listed pages block by block, with an online softmax.

The loop runs for as many blocks as `count` fills, so the cost is that of what was selected, not
that of the lists' capacity. On a CPU each list has its own loop; on a GPU all lists share one, as
long as the longest.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from alaya_jax.pallas_kernels.dispatch import Target
from alaya_jax.pallas_kernels.paged_decode.keys import LOWEST, Keys, PagedDecode, all_starts
from alaya_jax.pallas_kernels.sharded import vary_like

BLOCK_TOKENS = 512
"""Keys per step: enough to amortize the loop, few enough to stay in a core's cache."""


def paged_decode(
    q: Float[Array, "B H D"],
    k_pages: Float[Array, "K P Z D"],
    v_pages: Float[Array, "K P Z D"],
    keys: Keys,
    k_scale: Float[Array, "K P Z"] | None,
    v_scale: Float[Array, "K P Z"] | None,
    *,
    scale: float,
    want_kept: bool,
    target: Target,
) -> PagedDecode:
    """As `paged_decode.paged_decode`; matmuls in the pages' type, on CPUs in float32 (faster)."""
    batch, heads, dim = q.shape
    kv_heads, _, size, _ = k_pages.shape
    groups = heads // kv_heads
    n = keys.page_ids.shape[2]
    block = max(1, min(BLOCK_TOKENS // size, n))
    steps = -(-n // block)
    rows = batch * kv_heads
    on_cpu = target.platform == "cpu"
    quantized = k_scale is not None
    dtype = jnp.float32 if on_cpu else (jnp.bfloat16 if quantized else k_pages.dtype)

    def per_row(x: Array) -> Array:  # [B, J, ...] -> [R, ...]
        return jnp.broadcast_to(x, (batch, kv_heads, *x.shape[2:])).reshape(rows, *x.shape[2:])

    pad = ((0, 0), (0, 0), (0, steps * block - n))
    ids = per_row(jnp.pad(keys.page_ids, pad)).reshape(rows, steps, block)
    starts = per_row(jnp.pad(all_starts(keys, size), pad)).reshape(rows, steps, block)
    count = per_row(keys.count)
    queries = q.reshape(rows, groups, dim).astype(dtype)
    mask = None
    if keys.mask is not None:
        mask = jnp.pad(keys.mask, (*pad, (0, 0))).reshape(rows, groups, steps, block * size)
    floor = None if keys.threshold is None else keys.threshold.reshape(rows, groups, 1)

    def visit(which: Array, step: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds one block of pages of each row in `which` [R]."""
        top, total, acc, kept = carry
        head = (which % kv_heads)[:, None]
        entry = step * block + jnp.arange(block)
        real = entry < count[which][:, None]
        page = jnp.where(real, ids[which, step], 0)
        positions = starts[which, step][:, :, None] + jnp.arange(size)
        seen = (keys.of_sequences(which // kv_heads).seen(positions) & real[..., None]).reshape(
            which.shape[0], 1, block * size
        )

        def read(pages: Array) -> Array:
            return pages[head, page].reshape(which.shape[0], block * size, *pages.shape[3:])

        k = read(k_pages).astype(dtype)
        scores = jnp.einsum("rgd,rsd->rgs", queries[which], k, preferred_element_type=jnp.float32)
        if k_scale is not None:
            scores *= read(k_scale)[:, None]
        if floor is not None:
            seen = seen & (scores >= floor[which])
        if mask is not None:
            seen = seen & mask[which, :, step]
        scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        p = jnp.exp(scale * (scores - new_top[..., None]))
        fade = jnp.exp(scale * (top - new_top))
        total = total * fade + jnp.sum(p, axis=-1)
        kept = kept + jnp.sum(jnp.broadcast_to(seen, p.shape), axis=-1, dtype=jnp.int32)
        # Slots that are not seen may hold anything, and 0 * NaN must not reach the sum.
        v = jnp.where(seen.any(axis=1)[..., None], read(v_pages), 0).astype(dtype)
        if v_scale is not None:
            p = jnp.where(seen, p * read(v_scale)[:, None], 0.0)
        weighted = jnp.einsum(
            "rgs,rsd->rgd", p.astype(dtype), v, preferred_element_type=jnp.float32
        )
        return new_top, total, acc * fade[..., None] + weighted, kept

    def start(r: int) -> tuple[Array, ...]:
        carry = (
            jnp.full((r, groups), LOWEST, jnp.float32),
            jnp.zeros((r, groups), jnp.float32),
            jnp.zeros((r, groups, dim), jnp.float32),
            jnp.zeros((r, groups), jnp.int32),
        )
        return vary_like(carry, q, k_pages, v_pages, keys, k_scale, v_scale)

    trips = -(-jnp.clip(count, 0, n) // block)
    if on_cpu:
        together = kv_heads if keys.page_ids.shape[1] == 1 else 1  # kv heads that share a list

        def one(first: Array) -> tuple[Array, ...]:
            which = first + jnp.arange(together)
            return lax.fori_loop(0, trips[first], lambda i, c: visit(which, i, c), start(together))

        top, total, acc, kept = lax.map(one, jnp.arange(0, rows, together))
    else:
        which = jnp.arange(rows)
        top, total, acc, kept = lax.fori_loop(
            0, jnp.max(trips, initial=0), lambda i, c: visit(which, i, c), start(rows)
        )
    total = total.reshape(batch, heads)
    safe = jnp.where(total > 0, total, 1.0)
    best = jnp.where(total > 0, top.reshape(batch, heads), -jnp.inf)
    lse = jnp.where(total > 0, scale * best + jnp.log(safe), -jnp.inf)
    out = acc.reshape(q.shape) / safe[..., None]
    return PagedDecode(out, lse, best, kept.reshape(batch, heads) if want_kept else None)
