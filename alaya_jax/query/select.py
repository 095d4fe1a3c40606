"""Which keys a query keeps, given the score of every key: the definitions, exactly."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def in_range(
    scores: Float[Array, "K G T S"],
    best: Float[Array, "K G T"],
    beta: float | jax.Array,
) -> Bool[Array, "K G T S"]:
    """DIPR (AlayaDB, Definition 3): the keys that score at least `best - beta`.

    Args:
      scores: raw inner products with the eligible keys; -inf for keys that are not eligible.
      best: best raw score of all keys.
      beta: a number, [H], or [K, G, T].
    """
    return (scores >= (best - by_row(beta, scores))[..., None]) & (scores > -jnp.inf)


def by_row(beta: float | jax.Array, like: Float[Array, "K G ..."]) -> Array:
    """A number for each query head [H] as one for each row; other shapes as they are."""
    beta = jnp.asarray(beta, jnp.float32)
    return beta.reshape(like.shape[0], like.shape[1], 1) if beta.ndim == 1 else beta


def top(
    scores: Float[Array, "K G T S"],
    k: int,
    positions: Int[Array, " S"],
    axis: str | None = None,
) -> Bool[Array, "K G T S"]:
    """The k keys of largest score; of equal ones those of smallest position.

    Args:
      scores: -inf for keys that are not eligible.
      k: how many.
      positions: of the keys, ascending.
      axis: mesh axis that keys are split over. Each device sends its k best scores, no more.
    """
    # A stable order: of equal scores the earlier key comes first.
    best, at = lax.top_k(scores, min(k, scores.shape[-1]))
    at = jnp.take(positions, at)
    if axis is not None:
        best, at = (lax.all_gather(x, axis, axis=-1, tiled=True) for x in (best, at))
        negative, at = lax.sort((-best, at), num_keys=2)
        best = -negative
    last = min(k, best.shape[-1]) - 1
    least, latest = best[..., last, None], at[..., last, None]
    keep = (scores > least) | ((scores == least) & (positions <= latest))
    return keep & (scores > -jnp.inf)
