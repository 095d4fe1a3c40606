"""Exact scores of the few keys that a scan left, at a cost that follows how many there are."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.attention.paged import Pages

BLOCK = 256
"""Keys gathered at once, of each kv head."""


def rescore(
    q: Float[Array, "K G T D"], pages: Pages, keep: Bool[Array, "K G T S"]
) -> Float[Array, "K G T S"]:
    """Raw inner products with the kept keys, -inf elsewhere.

    A key is read once for all queries of its kv head. There is no buffer that could overflow: kept
    keys are counted off by prefix sums, and the loop runs as many blocks as they fill.
    """
    heads, group, t, _ = q.shape
    rows = q.reshape(heads, group * t, -1)
    rank = jnp.cumsum(keep.any((1, 2)), axis=-1, dtype=jnp.int32)  # [K, S]
    width = keep.shape[-1]

    def visit(i: Array, scores: Array) -> Array:
        wanted = i * BLOCK + 1 + jnp.arange(BLOCK)
        # The position of the n-th kept key is the first whose rank is n; S when there is none.
        position = jax.vmap(lambda ranks: jnp.searchsorted(ranks, wanted))(rank)  # [K, BLOCK]
        block = _scores_at(rows, pages, position)  # [K, GT, BLOCK]
        return jax.vmap(lambda s, at, new: s.at[at].set(new, mode="drop"))(
            scores, position, block.swapaxes(1, 2)
        )

    blocks = -(-jnp.max(rank[:, -1]) // BLOCK)
    scores = lax.fori_loop(0, blocks, visit, jnp.zeros((heads, width, group * t)))
    return jnp.where(keep, jnp.moveaxis(scores, 1, 2).reshape(keep.shape), -jnp.inf)


def score_at(
    q: Float[Array, "K G T D"], pages: Pages, position: Int[Array, "K G T"]
) -> Float[Array, "K G T"]:
    """Raw inner product of each query with the key at one position."""
    heads, group, t, dim = q.shape
    rows = q.reshape(heads, group * t, 1, dim)
    each = jax.vmap(lambda row, at: _scores_at(row, pages, at), in_axes=1)
    scores = each(rows, position.reshape(heads, group * t, 1))  # [GT, K, 1, 1]
    return scores[:, :, 0, 0].T.reshape(heads, group, t)


def _scores_at(
    q: Float[Array, "K R D"], pages: Pages, position: Int[Array, "K C"]
) -> Float[Array, "K R C"]:
    """Products with the keys at these positions; a position past the table reads any key."""
    size = pages.k.shape[2]
    page = jnp.take(pages.ids, position // size, mode="clip")
    k = jax.vmap(lambda pool, p, z: pool[p, z])(pages.k, page, position % size)
    # The arithmetic of `score_range`: of equal keys, equal scores.
    dtype = operand_dtype(pages)
    return jnp.einsum(
        "krd,kcd->krc", q.astype(dtype), k.astype(dtype), preferred_element_type=jnp.float32
    )


def operand_dtype(pages: Pages) -> jnp.dtype:
    """The dtype that scores are computed in, from queries as well as keys."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else pages.k.dtype)
