"""Defines `paged_decode` in plain jnp: reads and scores all listed pages at once."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alaya_jax.pallas_kernels.paged_decode.keys import Keys, PagedDecode, all_starts


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
) -> PagedDecode:
    """As `paged_decode.paged_decode`, in float32 throughout."""
    batch, heads, dim = q.shape
    kv_heads, _, size, _ = k_pages.shape
    n = keys.page_ids.shape[2]
    per_head = (batch, kv_heads, n)
    ids = jnp.broadcast_to(keys.page_ids, per_head)
    real = jnp.arange(n) < jnp.broadcast_to(keys.count[:, :, None], per_head)
    starts = jnp.broadcast_to(all_starts(keys, size), per_head)
    positions = starts[..., None] + jnp.arange(size)
    in_range = (keys.seen(positions) & real[..., None]).reshape(batch, kv_heads, n * size)

    def read(pages: Array, scales: Array | None) -> Array:
        head = jnp.arange(kv_heads)[:, None]
        values = pages[head, jnp.where(real, ids, 0)].astype(jnp.float32)
        if scales is not None:
            values *= scales[head, jnp.where(real, ids, 0)][..., None]
        values = values.reshape(batch, kv_heads, n * size, dim)
        return jnp.where(in_range[..., None], values, 0.0)  # unseen slots may hold anything

    rows = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("bkgd,bksd->bkgs", rows, read(k_pages, k_scale))
    seen = in_range[:, :, None]
    if keys.threshold is not None:
        seen = seen & (scores >= keys.threshold.reshape(*scores.shape[:3], 1))
    if keys.mask is not None:
        seen = seen & keys.mask.reshape(scores.shape)
    best = jnp.max(jnp.where(seen, scores, -jnp.inf), axis=-1, initial=-jnp.inf)
    scores = jnp.where(seen, scores * scale, -jnp.inf)
    top = jnp.max(scores, axis=-1, initial=-jnp.inf, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bkgs,bksd->bkgd", weights / safe, read(v_pages, v_scale))
    lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
    kept = jnp.sum(jnp.broadcast_to(seen, scores.shape), axis=-1, dtype=jnp.int32)
    return PagedDecode(
        out.reshape(q.shape),
        lse.reshape(batch, heads),
        best.reshape(batch, heads),
        kept.reshape(batch, heads) if want_kept else None,
    )
