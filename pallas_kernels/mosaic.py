"""What every Mosaic GPU kernel here needs to say to Pallas, said once.

Import it only where a kernel is built: Pallas's GPU part takes a quarter of a second to load.
"""

import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from alaya_jax.errors import KernelError
from alaya_jax.pallas_kernels.dispatch import Target

ALIGNMENT = 128
"""Bytes: where in shared memory a TMA copy may begin."""


def swizzled(swizzle: int, itemsize: int) -> tuple[Any, ...]:
    """Transforms of a shared-memory matrix that wgmma reads and TMA writes.

    Args:
      swizzle: bytes, 32, 64 or 128; the minor axis is a multiple of it.
      itemsize: bytes of an element.
    """
    return (
        plgpu.TilingTransform((8, swizzle // itemsize)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )


def interpret(target: Target) -> Any:
    """The `interpret` argument of `plgpu.kernel`: the simulator with race detection, or None."""
    return plgpu.InterpretGPUParams(detect_races=True) if target.interpret else None


def bring(source: Any, target: Any, arrived: Any) -> None:
    """Starts a TMA copy from global to shared memory; `arrived` is told when it is there.

    The device stops at a copy that begins off a multiple of `ALIGNMENT`; neither the simulator nor
    the compiler reports it. Copies that share a buffer lie one behind another, so each must fill
    whole units.

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
    """Writes to global memory what does not fill its cache lines.

    JAX 0.12 refuses that unless it is told so; 0.11 has no way to say it, and asks for none.
    """
    store = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = value
    else:
        store(ref, value, optimized=False)
