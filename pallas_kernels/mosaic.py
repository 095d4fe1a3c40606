"""What all Mosaic GPU kernels here share of their calls to Pallas.

Import it only where a kernel is built: the GPU part of Pallas takes a quarter of a second to load.
"""

import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from alaya_jax.errors import KernelError
from alaya_jax.pallas_kernels.dispatch import Target

ALIGNMENT = 128
"""Alignment, in bytes, of a TMA copy's destination in shared memory."""


def swizzled(swizzle: int, itemsize: int) -> tuple[Any, ...]:
    """Transforms of a shared-memory matrix that wgmma reads and TMA writes.

    Args:
      swizzle: 32, 64 or 128 bytes; the minor axis must be a multiple of it.
      itemsize: bytes per element.
    """
    return (
        plgpu.TilingTransform((8, swizzle // itemsize)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )


def interpret(target: Target) -> Any:
    """The `interpret` argument of `plgpu.kernel`: the simulator with race detection, or None."""
    return plgpu.InterpretGPUParams(detect_races=True) if target.interpret else None


def bring(source: Any, target: Any, arrived: Any) -> None:
    """Starts a TMA copy from global to shared memory; its completion arrives at a barrier.

    A copy that does not begin at a multiple of `ALIGNMENT` stops the device, and neither the
    simulator nor the compiler reports it. Copies that share a buffer follow one another, so each
    must fill whole units of that size.

    Raises:
      KernelError: the copy does not fill whole units.
    """
    size = math.prod(target.shape) * jnp.dtype(target.dtype).itemsize
    if size % ALIGNMENT:
        raise KernelError(
            f"a TMA copy of {tuple(target.shape)} {target.dtype} is {size} bytes; the next one "
            f"would not begin at a multiple of {ALIGNMENT} in shared memory"
        )
    plgpu.copy_gmem_to_smem(source, target, arrived)


def store_part(ref: Any, value: Any) -> None:
    """Writes to global memory without filling whole cache lines.

    JAX 0.12 refuses such a write unless it is allowed explicitly; 0.11 has no option for it and
    needs none.
    """
    store = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = value
    else:
        store(ref, value, optimized=False)
