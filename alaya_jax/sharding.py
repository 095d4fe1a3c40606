"""Where each axis of a parameter or of the cache lies on a mesh: one frozen table of rules.

mesh = aj.make_mesh(data=1, tensor=8)
model = aj.load(path, mesh=mesh)                                    # default rules
rules = dataclasses.replace(aj.ShardingRules(), vocab=None)         # another strategy
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alaya_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis (None: replicated). A mesh axis that the mesh lacks is ignored.

    Attributes:
      vocab, embed, heads, kv_heads, head_dim, ffn, norm: axes of parameters; `kv_heads` of the
        cache too.
      batch: sequences of a batch.
    """

    vocab: str | None = "tensor"
    embed: str | None = None
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head_dim: str | None = None
    ffn: str | None = "tensor"
    norm: str | None = None
    batch: str | None = "data"

    def spec(self, mesh: Mesh, axes: tuple[str | None, ...]) -> PartitionSpec:
        """The partition spec of an array with these logical axes (None: replicated).

        Raises:
          ConfigError: two logical axes of the array land on one mesh axis.
        """
        physical = [getattr(self, axis) if axis else None for axis in axes]
        physical = [axis if axis in mesh.axis_names else None for axis in physical]
        used = [axis for axis in physical if axis is not None]
        if len(used) != len(set(used)):
            raise ConfigError(
                f"sharding rules put two axes of {axes} on one mesh axis: {physical}; change one "
                "of them in ShardingRules"
            )
        return PartitionSpec(*physical)

    def sharding(
        self, mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None
    ) -> NamedSharding:
        """The sharding of an array with these logical axes; with `shape`, checked to divide evenly.

        Raises:
          ConfigError: an axis does not divide by the mesh axis it is laid on.
        """
        spec = self.spec(mesh, axes)
        for axis, size, target in zip(axes, shape or (), spec, strict=False):
            if target is not None and size % mesh.shape[target]:
                raise ConfigError(
                    f"axis {axis!r} of size {size} does not divide over mesh axis {target!r} of "
                    f"size {mesh.shape[target]}; use a smaller {target!r}, or "
                    f"ShardingRules({axis}=None) to replicate it"
                )
        return NamedSharding(mesh, spec)


def make_mesh(*, devices: Any = None, **axes: int) -> Mesh:
    """A mesh with named axes, e.g. `make_mesh(data=2, tensor=4)`.

    Axes are of type Auto: the compiler places intermediate values.

    Args:
      devices: default `jax.devices()`.
      **axes: size of each axis, in order.

    Raises:
      ConfigError: the sizes do not multiply to at most the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    n = math.prod(axes.values())
    if n > len(devices):
        raise ConfigError(f"mesh {axes} needs {n} devices, {len(devices)} are there")
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=devices[:n]
    )


def parse_axes(text: str) -> dict[str, int]:
    """The axes that "data=2,tensor=4" means, as command lines take it, for `make_mesh`.

    Raises:
      ConfigError: it is no list of names and sizes.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.strip().isidentifier() or not size.strip().isdecimal() or int(size) < 1:
            raise ConfigError(f"mesh {text!r} is not understood; write it as data=2,tensor=4")
        axes[name.strip()] = int(size)
    known = {str(target) for target in dataclasses.astuple(ShardingRules()) if target is not None}
    if unknown := axes.keys() - known:
        raise ConfigError(
            f"mesh {text!r} has axes that no sharding rule uses: {', '.join(sorted(unknown))}; "
            f"use {', '.join(sorted(known))}"
        )
    return axes


def tree_shardings(mesh: Mesh, rules: ShardingRules, axes: Any, shapes: Any) -> Any:
    """Shardings of a whole pytree.

    Args:
      mesh, rules: where.
      axes: pytree with a tuple of logical axis names at each leaf (`llama.logical_axes`).
      shapes: the same tree of arrays or `jax.ShapeDtypeStruct`.
    """
    return jax.tree.map(
        lambda leaf_axes, leaf: rules.sharding(mesh, leaf_axes, leaf.shape),
        axes,
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
