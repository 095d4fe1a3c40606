"""Softmax attention over a range of a sequence's keys, tile by tile, in XLA.

Query rows are [K, G, T], of one sequence; `cache.views` reads the pages.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alaya_jax.attention.gradient import differentiable
from alaya_jax.attention.softmax import Partial, Running, best_of, finish, fold, start
from alaya_jax.cache.views import KeyRange, Pages, Read, products, reader


def _weigh(p: Array, v: Array) -> Float[Array, "K G T D"]:
    return jnp.einsum("kgts,ksd->kgtd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)


@differentiable
def attend_range(
    q: Float[Array, "K G T D"], pages: Pages, keys: KeyRange
) -> tuple[Partial, Float[Array, "K G T"]]:
    """Softmax attention over the keys in range. It is differentiable (see `gradient`).

    Returns:
      the partial attention [K, G, T], and the best raw (unscaled) score, -inf for a row that has no
      key in range.
    """
    scale = q.shape[-1] ** -0.5

    def visit(read: Read, tile: Array, running: Running) -> Running:
        seen = keys.mask(pages.positions(tile)) & pages.fresh(tile)
        scores = jnp.where(seen, products(q, read(pages.k, tile)), -jnp.inf)
        # Slots out of range may hold anything, and 0 * NaN must not reach the sum.
        v = jnp.where(seen.any(0)[:, None], read(pages.v, tile), 0)
        return fold(running, scores, scale, lambda p: _weigh(p, v))

    pages, over = reader(q, pages, keys)
    running = over(visit, start(q.shape[:-1], q.shape[-1]))
    return finish(running, scale), best_of(running)
