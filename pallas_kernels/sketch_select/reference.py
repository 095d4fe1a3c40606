"""Defines the scan: estimate and error of every key, then the bounds of each page."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alaya_jax.pallas_kernels.sketch_select.request import Bounds, Codes, Query, Signs


def estimates(
    query: Query, keys: Codes | Signs, pages: Int[Array, "B N"]
) -> tuple[Float[Array, "B K N Z G"], Float[Array, "B K N Z G"]]:
    """The estimated raw score of each key of the listed pages, and its largest error."""
    kv_heads = keys.codes.shape[0]

    def grouped(x: Array) -> Array:
        return x.astype(jnp.float32).reshape(x.shape[0], kv_heads, -1, *x.shape[2:])

    def of_heads(x: Array) -> Float[Array, "B K 1 1 G"]:
        return grouped(x)[:, :, None, None]

    def of_pages(pool: Array) -> Array:  # [K, P, ...] -> [B, K, N, ...]
        return jnp.moveaxis(pool[:, pages], 0, 1)

    levels = keys.levels(of_pages(keys.codes)).astype(jnp.float32)
    exact = lax.Precision.HIGHEST
    inner = jnp.einsum("bknzd,bkgd->bknzg", levels, grouped(query.integers), precision=exact)
    centre = keys.centres(of_pages(keys.centre)).astype(jnp.float32)
    centre = jnp.einsum("bknd,bkgd->bkng", centre, grouped(query.q), precision=exact)
    centre *= of_pages(keys.unit).astype(jnp.float32)[..., None]
    scale, spread = (of_pages(x).astype(jnp.float32)[..., None] for x in (keys.scale, keys.spread))
    estimate = scale * of_heads(query.step) * inner + centre[:, :, :, None]
    of_spread = of_heads(query.of_spread)
    error = jnp.where(of_spread > 0, of_spread * spread, 0.0) + of_heads(query.of_scale) * scale
    return estimate, error


def bounds(
    query: Query,
    keys: Codes | Signs,
    pages: Int[Array, "B N"],
    low: Int[Array, " B"],
    high: Int[Array, " B"],
    *,
    scale: float | None,
) -> Bounds:
    """Computes `Bounds`, with the log-sum-exp of `scale * estimate` if a scale is given."""
    estimate, error = estimates(query, keys, pages)
    size = keys.scale.shape[2]
    position = jnp.arange(pages.shape[1] * size).reshape(-1, size)
    seen = (position >= low[:, None, None]) & (position < high[:, None, None])
    seen = seen[:, None, ..., None]

    def largest(x: Array) -> Array:
        return jnp.max(jnp.where(seen, x, -jnp.inf), axis=3)

    lse = None
    if scale is not None:
        top = largest(scale * estimate)
        safe = jnp.where(jnp.isneginf(top), 0.0, top)
        p = jnp.where(seen, jnp.exp(scale * estimate - safe[:, :, :, None]), 0.0)
        lse = safe + jnp.log(jnp.sum(p, axis=3))
    best = jnp.max(largest(estimate - error), axis=2)
    return Bounds(largest(estimate + error), best, lse)
