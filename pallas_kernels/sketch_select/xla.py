"""The scan in XLA: integer products, tile by tile, over the tiles that hold a key in range."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from alaya_jax.pallas_kernels.sketch_select.request import Bounds, Codes, Query, Signs

_TILE = 1024  # keys


def bounds(
    query: Query,
    keys: Codes | Signs,
    pages: Int[Array, "B N"],
    low: Int[Array, " B"],
    high: Int[Array, " B"],
    *,
    scale: float | None,
) -> Bounds:
    """Computes `Bounds`, one sequence at a time."""
    kv_heads, _, size = keys.scale.shape
    n = pages.shape[1]
    tile_pages = min(n, max(1, _TILE // size))

    def of_sequence(args: tuple[Array, ...]) -> tuple[Array, ...]:
        ids, low, high, *fields = args
        q, integers, step, of_spread, of_scale = (
            x.reshape(kv_heads, -1, *x.shape[1:]) for x in fields
        )
        q = q.astype(jnp.float32)
        step, of_spread, of_scale = (x[:, None, None] for x in (step, of_spread, of_scale))

        def visit(tile: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            upper, best, lse = carry
            first = jnp.minimum(tile * tile_pages, n - tile_pages)
            at = lax.dynamic_slice_in_dim(ids, first, tile_pages)
            levels = keys.levels(keys.codes[:, at])
            inner = jnp.einsum("knzf,kgf->knzg", levels, integers, preferred_element_type=jnp.int32)
            inner = inner.astype(jnp.float32)
            centre = (
                jnp.einsum(
                    "knd,kgd->kng",
                    keys.centres(keys.centre[:, at]).astype(jnp.float32),
                    q,
                    precision=lax.Precision.HIGHEST,
                )
                * keys.unit[:, at].astype(jnp.float32)[..., None]
            )
            of_key, spread = (
                x[:, at].astype(jnp.float32)[..., None] for x in (keys.scale, keys.spread)
            )
            estimate = of_key * (step * inner) + centre[:, :, None]
            error = jnp.where(of_spread > 0, of_spread * spread, 0.0) + of_scale * of_key
            position = first * size + jnp.arange(tile_pages * size).reshape(-1, size, 1)
            seen = (position >= low) & (position < high)
            high_end = jnp.max(jnp.where(seen, estimate + error, -jnp.inf), axis=2)
            low_end = jnp.max(jnp.where(seen, estimate - error, -jnp.inf), axis=(1, 2))
            upper = lax.dynamic_update_slice_in_dim(upper, high_end, first, axis=1)
            if scale is not None:
                x = jnp.where(seen, scale * estimate, -jnp.inf)
                top = jnp.max(x, axis=2)
                safe = jnp.where(jnp.isneginf(top), 0.0, top)
                mass = safe + jnp.log(jnp.sum(jnp.exp(x - safe[:, :, None]), axis=2))
                lse = lax.dynamic_update_slice_in_dim(lse, mass, first, axis=1)
            return upper, jnp.maximum(best, low_end), lse

        group = q.shape[1]
        never = jnp.full((kv_heads, n, group), -jnp.inf)
        tokens = tile_pages * size
        return lax.fori_loop(
            low // tokens,
            jnp.where(low < high, -(-high // tokens), 0),
            visit,
            (never, jnp.full((kv_heads, group), -jnp.inf), never if scale is not None else ()),
        )

    fields = (query.q, query.integers, query.step, query.of_spread, query.of_scale)
    upper, best, lse = lax.map(of_sequence, (pages, low, high, *fields))
    return Bounds(upper, best, lse if scale is not None else None)
