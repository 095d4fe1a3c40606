"""The keys that a user's function keeps (`Custom`)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from alaya_jax.attention.partial import Partial
from alaya_jax.cache.views import Pages
from alaya_jax.errors import RequestError
from alaya_jax.query import Custom
from alaya_jax.query.functions import function_name, optional_arguments


def select_custom(
    query: Custom,
    scores: Float[Array, "K G T S"],
    pages: Pages,
    window: Partial,
    best: Float[Array, "K G T"],
    axis: str | None,
    head_axis: str | None,
) -> Bool[Array, "K G T S"]:
    """The mask of the query's function, as a mask of this device's heads.

    Args:
      scores: exact raw scores, -inf out of range.
      pages: of these keys.
      window: attention over the window, and `best`, its best raw score.
      axis, head_axis: mesh axes that pages and heads are split over.

    Raises:
      RequestError: the pages are split over devices, or the function gives no mask.
    """
    name = query.name or function_name(query.select)
    if axis is not None:
        raise RequestError(
            f"Custom({name}): pages are spread over mesh axis {axis!r}, and the function would see "
            "one device's part of the keys; use ShardingRules(pages=None), or TopK or DIPR"
        )
    visible = scores > -jnp.inf
    given = {"window_best": best, "window_lse": window.lse}
    asked = {name: given[name] for name in optional_arguments(query.select)}
    heads = scores.shape[0]
    if head_axis is not None:  # it may look from one head at another
        scores, asked = jax.tree.map(
            lambda x: lax.all_gather(x, head_axis, axis=0, tiled=True), (scores, asked)
        )
    mask = query.select(scores, pages.all_positions(), **asked)
    shape, kind = getattr(mask, "shape", None), getattr(mask, "dtype", type(mask))
    if shape != scores.shape or kind != jnp.bool_:
        raise RequestError(
            f"Custom({name}): the function gave {kind} {shape}, and must give a bool mask of the "
            f"scores' shape, {scores.shape}"
        )
    if head_axis is not None:
        mask = lax.dynamic_slice_in_dim(mask, lax.axis_index(head_axis) * heads, heads, axis=0)
    return mask & visible
