"""Selection by a function of the user (`Custom`)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from alaya_jax.attention.rows import Rows
from alaya_jax.errors import RequestError
from alaya_jax.query import Custom
from alaya_jax.query.functions import function_name, optional_arguments


def select_custom(
    query: Custom, rows: Rows, scores: Float[Array, "K G T S"]
) -> Bool[Array, "K G T S"]:
    """The keys that the query's function keeps, for the heads of this device.

    Args:
      query: holds the function.
      rows: the query rows to select for.
      scores: exact raw scores, -inf for keys out of range.

    Returns:
      the function's mask, without keys that are out of range.

    Raises:
      RequestError: pages are spread over devices, or the function did not return a bool mask of
        the scores' shape.
    """
    name, axes = query.name or function_name(query.select), rows.held.axes
    if axes.pages is not None:
        raise RequestError(
            f"Custom({name}): pages are spread over mesh axis {axes.pages!r}, and the function "
            "would see one device's part of the keys; "
            "use ShardingRules(pages=None), or TopK or DIPR"
        )
    visible = scores > -jnp.inf
    given = {"window_best": rows.best, "window_lse": rows.window.lse}
    asked = {name: given[name] for name in optional_arguments(query.select)}
    heads = scores.shape[0]
    if axes.heads is not None:  # the function sees all heads at once
        scores, asked = jax.tree.map(
            lambda x: lax.all_gather(x, axes.heads, axis=0, tiled=True), (scores, asked)
        )
    mask = query.select(scores, rows.pages.all_positions(), **asked)
    shape, kind = getattr(mask, "shape", None), getattr(mask, "dtype", type(mask))
    if shape != scores.shape or kind != jnp.bool_:
        raise RequestError(
            f"Custom({name}): the function gave {kind} {shape}, and must give a bool mask of the "
            f"scores' shape, {scores.shape}"
        )
    if axes.heads is not None:
        mask = lax.dynamic_slice_in_dim(mask, lax.axis_index(axes.heads) * heads, heads, axis=0)
    return mask & visible
