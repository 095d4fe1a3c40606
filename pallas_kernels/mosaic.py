"""What every Mosaic GPU kernel here needs to say to Pallas, said once.

Import it only where a kernel is built: Pallas's GPU part takes a quarter of a second to load.
"""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu

from alaya_jax.pallas_kernels.dispatch import Target


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


def store_part(ref: Any, value: Any) -> None:
    """Writes to global memory what does not fill its cache lines.

    JAX 0.12 refuses that unless it is told so; 0.11 has no way to say it, and asks for none.
    """
    store = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = value
    else:
        store(ref, value, optimized=False)
