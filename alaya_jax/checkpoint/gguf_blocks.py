"""Weights as a GGUF file holds them: integers with a scale, and maybe an offset, for each group.

Q8_0, Q4_0 and Q4_1 hold the integers as they are kept here. What the values of other types are is
left to the `gguf` package, and each is divided by its scale. Scales and offsets are kept to the
bit, but for Q6_K, Q5_K and Q4_K: theirs are products, which float16 rounds (to 2^-11 of their
size). Layouts: ggml's block definitions (ggml-common.h).
"""

from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantType

from alaya_jax.models.quantized import Blocks, packed

_Scales = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
"""Of blocks [n, bytes]: scale and offset of each group, float32 [n, groups]."""


def is_kept(kind: QuantType) -> bool:
    """Whether the groups of this type are kept as they are."""
    return kind in _KEPT


def groups(
    data: np.ndarray, shape: tuple[int, ...], kind: QuantType, read: Callable[[], np.ndarray]
) -> Blocks:
    """The groups of a tensor, along its last axis.

    Args:
      data: the stored bytes.
      shape: of the tensor.
      kind: its type; one of those kept.
      read: gives the values, float32 of that shape.
    """
    scales, bits = _KEPT[kind]
    size, length = gguf.GGML_QUANT_SIZES[kind]
    blocks = data.reshape(-1, length)
    scale, offset = scales(blocks)
    if kind in _PACKED:
        whole = np.ascontiguousarray(blocks[:, _PACKED[kind] :])
        whole = whole if bits == 4 else whole.view(np.int8)
    else:
        each = read().reshape(*scale.shape, size // scale.shape[1])
        from_zero = each if offset is None else each - offset[..., None]
        inverse = np.divide(1, scale, where=scale != 0, out=np.zeros_like(scale))
        codes = np.rint(from_zero * inverse[..., None])
        whole = packed(codes.clip(0, 15)) if bits == 4 else codes.clip(-128, 127).astype(np.int8)
    if bits == 4 and offset is None:  # integers count from zero up
        offset = scale * _LEAST

    def laid(x: np.ndarray) -> np.ndarray:
        return x.reshape(*shape[:-1], -1)

    return Blocks(
        laid(whole),
        laid(scale.astype(np.float16)),
        None if offset is None else laid(offset.astype(np.float16)),
    )


def _halves(blocks: np.ndarray, start: int, count: int) -> np.ndarray:
    """Some float16 of each block, as float32 [n, count]."""
    stored = np.ascontiguousarray(blocks[:, start : start + 2 * count])
    return stored.view(np.float16).astype(np.float32)


def _scale_alone(blocks: np.ndarray) -> tuple[np.ndarray, None]:
    return _halves(blocks, 0, 1), None


def _scale_and_offset(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = _halves(blocks, 0, 2)
    return both[:, :1], both[:, 1:]


def _k_scale_and_offset(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q4_K, Q5_K: eight groups, each with a scale and a minimum in units of the block's."""
    units = _halves(blocks, 0, 2)
    scale, least = gguf.quants.Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    return _half(units[:, :1] * scale), _half(-units[:, 1:] * least)


def _six(blocks: np.ndarray) -> tuple[np.ndarray, None]:
    """Q6_K: sixteen groups, each with a scale in units of the block's."""
    scale = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return _half(_halves(blocks, 208, 1) * scale), None


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


_KEPT: dict[QuantType, tuple[_Scales, int]] = {
    QuantType.Q8_0: (_scale_alone, 8),
    QuantType.Q5_0: (_scale_alone, 8),
    QuantType.Q4_0: (_scale_alone, 4),
    QuantType.Q5_1: (_scale_and_offset, 8),
    QuantType.Q4_1: (_scale_and_offset, 4),
    QuantType.Q6_K: (_six, 8),
    QuantType.Q5_K: (_k_scale_and_offset, 8),
    QuantType.Q4_K: (_k_scale_and_offset, 4),
}
"""How scales are read, and bits that a value is kept in."""
_PACKED = {QuantType.Q8_0: 2, QuantType.Q4_0: 2, QuantType.Q4_1: 4}
"""Where a block's integers begin, in types that hold them as `Blocks` does."""
_LEAST = -8  # of Q4_0, whose integers are counted from there
