"""Where each axis of a parameter or of the cache lies on a mesh: one frozen table of rules.

mesh = aj.make_mesh(data=1, tensor=8)
model = aj.load(path, mesh=mesh)                                    # default rules
rules = dataclasses.replace(aj.ShardingRules(), vocab=None)         # another strategy
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alaya_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis (None: replicated). A mesh axis that the mesh lacks is ignored.

    Attributes:
      vocab, embed, heads, kv_heads, head_dim, ffn, norm: axes of parameters; `kv_heads` of the
        cache too.
      batch: sequences of a batch.
      pages: pages of the cache and of its indexes.
    """

    vocab: str | None = "tensor"
    embed: str | None = None
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head_dim: str | None = None
    ffn: str | None = "tensor"
    norm: str | None = None
    batch: str | None = "data"
    pages: str | None = "context"

    def axis(self, name: str, mesh: Mesh | None) -> str | None:
        """The mesh axis that a logical axis is laid on; None when it is not split."""
        axis = getattr(self, name)
        return axis if mesh is not None and axis in mesh.axis_names else None

    def require_used(self, axes: Mapping[str, int]) -> None:
        """Raises ConfigError for an axis of a mesh that nothing would be laid on: its devices would
        all do the same, in silence.

        Args:
          axes: sizes by name, as `mesh.shape` has them; one of size 1 may have any name.
        """
        used = sorted({target for target in dataclasses.astuple(self) if target is not None})
        unused = [name for name, size in axes.items() if name not in used and size > 1]
        if unused:
            words = ", ".join(f"{name}={size}" for name, size in axes.items())
            raise ConfigError(
                f"mesh {words}: no sharding rule uses {', '.join(unused)}; name its axes "
                f"{', '.join(used)}, or give rules=ShardingRules(heads={unused[0]!r}, ...)"
            )

    def spec(self, mesh: Mesh, axes: tuple[str | None, ...]) -> PartitionSpec:
        """The partition spec of an array with these logical axes (None: replicated).

        Raises:
          ConfigError: two logical axes of the array land on one mesh axis.
        """
        physical = [self.axis(axis, mesh) if axis else None for axis in axes]
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

    def pool(self, mesh: Mesh | None) -> NamedSharding | None:
        """Where an array [K, P, ...] of the cache or of an index lies; None without a mesh."""
        if mesh is None:
            return None
        return NamedSharding(mesh, PartitionSpec(*self.spec(mesh, ("kv_heads", "pages"))))

    def page_shards(self, mesh: Mesh | None) -> int:
        """Into how many parts the pages of the cache are split."""
        axis = self.axis("pages", mesh)
        return mesh.shape[axis] if mesh is not None and axis is not None else 1


def laid(tree: Any, place: NamedSharding | None) -> Any:
    """Arrays of a program, to be laid so; as they are when there is no place.

    What goes from one call of a program into the next is laid one way only: for another the program
    would be compiled again.
    """
    if place is None:
        return tree
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, place), tree)


def whole(mesh: Mesh | None) -> NamedSharding | None:
    """A copy on every device; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def spread(tree: Any, mesh: Mesh | None) -> Any:
    """A tree with the arrays of a single device copied to every device of a mesh; what lies on the
    mesh stays where it is. Without a mesh nothing changes.
    """
    if mesh is None:
        return tree

    def is_alone(x: Any) -> bool:
        return isinstance(x, jax.Array) and len(x.sharding.device_set) < mesh.size

    leaves, structure = jax.tree.flatten(tree)
    alone = [x for x in leaves if is_alone(x)]
    copies = iter(_copied(whole(mesh))(alone) if alone else ())
    return structure.unflatten([next(copies) if is_alone(x) else x for x in leaves])


@functools.cache
def _copied(place: NamedSharding | None) -> Any:
    return jax.jit(lambda leaves: leaves, out_shardings=place)


def across(collective: Callable[..., jax.Array], x: jax.Array, axis: str | None) -> jax.Array:
    """`collective` (`lax.pmax`, `lax.psum`) over a mesh axis, or x itself where there is none."""
    return x if axis is None else collective(x, axis)


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


def cpu_beside(mesh: Mesh | None) -> Any:
    """The CPU of this process, for a model on a mesh or on a device of another kind; None: the
    model runs on one CPU.

    Raises:
      ConfigError: several processes run the model, or JAX was told to leave the CPU out.
    """
    if jax.process_count() > 1:
        raise ConfigError("several processes run the model, and each has memory of its own")
    default = jax.config.jax_default_device or jax.devices()[0]
    if mesh is None and "cpu" in (default, getattr(default, "platform", None)):
        return None
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ConfigError(
            "JAX has no CPU in this process; start it with JAX_PLATFORMS unset, or with "
            f"JAX_PLATFORMS={default if isinstance(default, str) else default.platform},cpu"
        ) from error


def auto_axes(mesh: Mesh) -> Mesh:
    """The mesh with axes of type Auto, as the programs here need them."""
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


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
    ShardingRules().require_used(axes)
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


def memory_of(mesh: Mesh | None) -> int | None:
    """Bytes that the devices of a mesh have, or the default device; None where they do not say.

    CPU devices share what the machine has, or what a container may use of it.
    """
    devices = list(mesh.devices.flat) if mesh is not None else jax.devices()[:1]
    if devices[0].platform == "cpu":
        try:
            pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
            allowed = Path("/sys/fs/cgroup/memory.max")
            allowed = allowed.read_text().strip() if allowed.exists() else "max"
        except (OSError, ValueError):
            return None
        return min(pages * size, int(allowed) if allowed.isdigit() else pages * size)
    here = [d for d in devices if d.process_index == jax.process_index()]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in here]
    known = [limit for limit in limits if limit is not None]
    return sum(known) * len(devices) // len(here) if here and len(known) == len(here) else None
