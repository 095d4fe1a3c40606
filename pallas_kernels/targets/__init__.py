"""Devices to compile for without having one, each described as XLA's compiler reads it."""

import os
from importlib import resources
from typing import Any

from alaya_jax.errors import KernelError

NAMES = ("h100", "b200")

OVERRIDES = {
    # The plugin looks for a driver and for cuDNN; compiling needs neither.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_PLATFORMS": "cpu",
}
"""Environment variables to set before jax is imported."""


def prepare() -> None:
    """Sets `OVERRIDES` in the environment. Call it before jax is imported."""
    os.environ.update(OVERRIDES)


def mesh(name: str, **axes: int) -> Any:
    """A mesh of devices that exist only on paper. Its axes are of type Auto.

    Lower under `jax.set_mesh(mesh)` with arguments whose shardings are on this mesh, then compile.

    Args:
      name: one of `NAMES`.
      **axes: size of each axis.

    Raises:
      KernelError: the CUDA plugin or the assembler is missing.
    """
    import math

    import jax
    from jax.experimental import topologies
    from jax.sharding import AxisType

    text = resources.files(__name__).joinpath(f"{name}.textproto").read_text()
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=text,
            topology=f"1x1x{math.prod(axes.values())}",
        )
    except Exception as e:
        raise KernelError(
            f"cannot compile for {name} here: {e}; the packages of constraints/cuda.txt are needed "
            "beside jax ('make aot' installs them into an environment of their own)"
        ) from e
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=topology.devices
    )
