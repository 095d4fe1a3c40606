"""Which keys a query keeps, given the score of every key: the definitions, exactly."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from alaya_jax.query import DIPR, TopK


def select(
    query: DIPR | TopK,
    scores: Float[Array, "K G T S"],
    seed: Float[Array, "K G T"],
) -> Bool[Array, "K G T S"]:
    """The keys that `query` keeps.

    Args:
      query: DIPR or TopK.
      scores: raw inner products with the eligible keys; -inf for keys that are not eligible.
      seed: best raw score among the keys that are attended anyway (the window); DIPR's maximum
        includes it.
    """
    if isinstance(query, DIPR):
        best = jnp.maximum(jnp.max(scores, axis=-1), seed)
        beta = jnp.asarray(query.beta, jnp.float32)
        if beta.ndim:
            beta = beta.reshape(scores.shape[0], scores.shape[1], 1)
        keep = scores >= (best - beta)[..., None]
    else:
        k = min(query.k, scores.shape[-1])
        # A stable order: of equal scores the earlier key wins, so exactly k are kept.
        _, kept = jax.lax.top_k(scores, k)
        flat = kept.reshape(-1, k)
        rows = jnp.arange(flat.shape[0])[:, None]
        keep = jnp.zeros((flat.shape[0], scores.shape[-1]), bool).at[rows, flat].set(True)
        keep = keep.reshape(scores.shape)
    return keep & (scores > -jnp.inf)
