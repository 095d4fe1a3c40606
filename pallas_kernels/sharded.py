"""What a loop inside shard_map needs: a carry that varies over the mesh axes of its inputs."""

from typing import Any

import jax
from jax import lax


def vary_like(start: Any, *inputs: Any) -> Any:
    """A pytree of arrays, typed as varying over every mesh axis that one of the inputs varies over.

    shard_map types values by the axes they differ along, and a loop's carry must keep its type. A
    constant to start from differs along none. Outside shard_map nothing changes.
    """
    axes: set[Any] = set()
    for leaf in jax.tree.leaves(inputs):
        axes |= jax.typeof(leaf).manual_axis_type.varying

    def vary(leaf: Any) -> Any:
        missing = tuple(axes - jax.typeof(leaf).manual_axis_type.varying)
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, start)
