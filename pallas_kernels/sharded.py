"""Loops inside shard_map need a carry that varies over the mesh axes of their inputs."""

from typing import Any

import jax
from jax import lax


def vary_like(start: Any, *inputs: Any) -> Any:
    """Types a pytree of arrays as varying over every mesh axis that some input varies over.

    shard_map types a value by the mesh axes along which it differs, and the carry of a loop must
    keep its type. A constant that a loop starts from differs along none of them. Outside shard_map
    this changes nothing.
    """
    axes: set[Any] = set()
    for leaf in jax.tree.leaves(inputs):
        axes |= jax.typeof(leaf).manual_axis_type.varying

    def vary(leaf: Any) -> Any:
        missing = tuple(axes - jax.typeof(leaf).manual_axis_type.varying)
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, start)
