"""Which keys a query keeps, given the score of every key: the definitions, exactly."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_CHUNKS = 32, 8  # keys; smaller ones where there are many of the best


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


def largest(
    scores: Float[Array, "*R S"], k: int
) -> tuple[Float[Array, "*R k"], Int[Array, "*R k"]]:
    """The k largest scores, falling, and their columns; of equal ones the first, as `lax.top_k`.

    They lie in those k chunks whose best scores are largest: the rest is looked at once.
    """
    *rows, n = scores.shape
    chunk = next((c for c in _CHUNKS if n >= 4 * k * c), None)
    if chunk is None:
        best, column = lax.top_k(scores, k)
        return best, column
    pad = [(0, 0)] * len(rows) + [(0, -n % chunk)]
    chunks = jnp.pad(scores, pad, constant_values=-jnp.inf).reshape(*rows, -1, chunk)
    _, which = lax.top_k(jnp.max(chunks, axis=-1), k)
    which = jnp.sort(which, axis=-1)  # so that the first of equal scores stays the first
    inside = jnp.take_along_axis(chunks, which[..., None], axis=-2).reshape(*rows, -1)
    best, at = lax.top_k(inside, k)
    return best, jnp.take_along_axis(which, at // chunk, axis=-1) * chunk + at % chunk


def largest_of_all(
    best: Float[Array, "K G T k"], positions: Int[Array, "K G T k"], axis: str | None
) -> Bool[Array, "K G T k"]:
    """Which of a device's k largest scores are among the k largest of all devices; of equal ones
    those of smallest position.

    Args:
      best: falling; -inf where there is none.
      positions: of the keys that score so.
      axis: mesh axis that keys are split over. Each device sends what it has here, no more.
    """
    there = best > -jnp.inf
    if axis is None:
        return there
    all_best, at = (lax.all_gather(x, axis, axis=-1, tiled=True) for x in (best, positions))
    negative, at = lax.sort((-all_best, at), num_keys=2)
    last = best.shape[-1] - 1
    least, latest = -negative[..., last, None], at[..., last, None]
    return there & ((best > least) | ((best == least) & (positions <= latest)))


def as_mask(
    columns: Int[Array, "K G T k"], chosen: Bool[Array, "K G T k"], width: int
) -> Bool[Array, "K G T S"]:
    """True in the chosen of these columns."""
    *rows, k = columns.shape
    at = jnp.where(chosen, columns, width).reshape(-1, k)
    mask = jnp.zeros((at.shape[0], width), bool)
    mask = mask.at[jnp.arange(at.shape[0])[:, None], at].set(True, mode="drop")
    return mask.reshape(*rows, width)
