"""Softmax attention over a range of a sequence's keys, tile by tile, in XLA.

For one sequence, with query rows `[K, G, T]`; how pages are read is in `cache.views`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alaya_jax.attention.gradient import differentiable
from alaya_jax.attention.partial import Partial
from alaya_jax.cache.views import KeyRange, Pages, Read, products, reader

_LOW = -1e30  # a running maximum below every score; finite, so that differences stay defined


def _weigh(p: Array, v: Array) -> Float[Array, "K G T D"]:
    return jnp.einsum("kgts,ksd->kgtd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)


@differentiable
def attend_range(
    q: Float[Array, "K G T D"], pages: Pages, keys: KeyRange
) -> tuple[Partial, Float[Array, "K G T"]]:
    """Softmax attention over the keys in range; differentiable, see `gradient`.

    Returns:
      the partial attention [K, G, T], and the best raw (unscaled) score, -inf where no key is in
      range.
    """
    scale = q.shape[-1] ** -0.5

    def visit(read: Read, tile: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        top, total, acc = carry
        seen = keys.mask(pages.positions(tile)) & pages.fresh(tile)
        scores = scale * products(q, read(pages.k, tile))
        scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        p = jnp.exp(scores - new_top[..., None])
        fade = jnp.exp(top - new_top)
        # Pages hold whatever was there before: 0 * NaN must not reach the sum.
        v = jnp.where(seen.any(0)[:, None], read(pages.v, tile), 0)
        return (
            new_top,
            total * fade + jnp.sum(p, axis=-1),
            acc * fade[..., None] + _weigh(p, v),
        )

    pages, fold = reader(q, pages, keys)
    rows = q.shape[:-1]
    start = (jnp.full(rows, _LOW), jnp.zeros(rows), jnp.zeros(q.shape))
    top, total, acc = fold(visit, start)
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    partial = Partial(acc / safe[..., None], jnp.where(empty, -jnp.inf, top + jnp.log(safe)))
    return partial, jnp.where(empty, -jnp.inf, top / scale)
