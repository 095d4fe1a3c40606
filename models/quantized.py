"""Matrices kept in 8 or 4 bits, for hosts that have no room for more.

int8: symmetric, one float32 scale for each output channel (of the embedding: for each row). int4:
symmetric, one bfloat16 scale for GROUP neighbours along the model dim E, two values a byte, which
makes 4.5 bits a weight. Only weights are quantized; products are taken in the model's own type, one
block after another, so that the dense matrix never exists as a whole.

Every matrix of the model has the axis E, and by default no mesh splits it. So groups and blocks run
along E: the other axes are sharded as those of the dense matrix are, and no group is cut.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from alaya_jax.errors import ConfigError
from alaya_jax.models.matrices import take_rows

Scheme = Literal["int8", "int4"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
GROUP = 32
"""Weights along E that share a scale in int4."""
_BLOCK = 1 << 19  # bytes of a dequantized block, so that a core's cache holds it
_PASS = 1 << 24  # bytes of float32 quantized at once on the host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix in 8 or 4 bits; a `Matrix`, see `alaya_jax.models.matrices`.

    Attributes:
      values: int8, of the shape of the matrix; or uint8, half as long along E: of each GROUP, the
        first half in the low nibbles and the second in the high, both + 8.
      scale: float32, of size 1 along every axis that is not an output; or bfloat16, 1/GROUP as long
        along E.
      axis: which axis is E: the first, or the last.
      compute: name of the type products are taken in.
    """

    values: Array
    scale: Array
    axis: int = dataclasses.field(metadata={"static": True})
    compute: str = dataclasses.field(metadata={"static": True})

    @property
    def scheme(self) -> Scheme:
        """How it is kept, "int8" or "int4"."""
        return "int8" if self.values.dtype == jnp.int8 else "int4"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        shape = list(self.values.shape)
        shape[self.axis] *= 1 if self.scheme == "int8" else 2
        return tuple(shape)

    @property
    def size(self) -> int:
        """How many weights it holds."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """Type products are taken in."""
        return jnp.dtype(self.compute)

    def dense(self) -> Array:
        """The matrix; for tests, and whoever has the room."""
        return _dense(self.values, self.scale, self.axis, self.dtype)

    def rows(self, ids: Int[Array, "..."]) -> Float[Array, "... E"]:
        """Rows of an embedding [V, E]."""
        values, scale = (take_rows(x, ids) for x in (self.values, self.scale))
        return _dense(values, scale, values.ndim - 1, self.dtype)

    def contract(self, x: Array, n: int, preferred_element_type: Any = None) -> Array:
        """Contracts the last n axes of x with the first n of the matrix."""
        kind = preferred_element_type or x.dtype
        if self.axis == 0:  # E is summed over
            product = functools.partial(jnp.tensordot, axes=1, preferred_element_type=_WIDE)
            return self._sum(x, product).astype(kind)
        parts = self._each(lambda block: jnp.tensordot(x, block, n, preferred_element_type=kind))
        return jnp.moveaxis(parts, 0, -2).reshape(*x.shape[: x.ndim - n], self.shape[-1])

    def contract_last(self, x: Float[Array, "... E"]) -> Float[Array, "... V"]:
        """Contracts the last axis of x with the last of an embedding [V, E], in float32."""

        def product(a: Array, b: Array) -> Array:
            return jnp.einsum("...e,ve->...v", a, b, preferred_element_type=_WIDE)

        return self._sum(x, product)

    def _sum(self, x: Array, product: Callable[[Array, Array], Array]) -> Array:
        """Sums, in float32, the products of the parts of x along E with the blocks."""
        width = self.block_width

        @jax.checkpoint
        def add(total: Array, start: Array) -> tuple[Array, None]:
            part = lax.dynamic_slice_in_dim(x, start, width, axis=-1)
            return total + product(part, self._block(start, width)), None

        first = product(lax.slice_in_dim(x, 0, width, axis=-1), self._block(0, width))
        starts = jnp.arange(width, self.shape[self.axis], width)
        return lax.scan(add, first, starts)[0] if len(starts) else first

    def _each(self, product: Callable[[Array], Array]) -> Array:
        """A product with each block, stacked in front."""
        width = self.block_width

        @jax.checkpoint
        def one(start: Array) -> Array:
            return product(self._block(start, width))

        starts = jnp.arange(0, self.shape[self.axis], width)
        return lax.map(one, starts) if len(starts) > 1 else one(starts[0])[None]

    @property
    def block_width(self) -> int:
        """Columns or rows along E that are dequantized at once."""
        length = self.shape[self.axis]
        unit = 1 if self.scheme == "int8" else GROUP
        fits = _BLOCK // max(1, 4 * self.size // length)
        widths = [w for w in range(unit, length + 1, unit) if length % w == 0]
        least = next((w for w in widths if w >= GROUP), length)
        return max((w for w in widths if least <= w <= fits and 2 * w <= length), default=least)

    def _block(self, start: Any, width: int) -> Array:
        values, scale = self.values, self.scale
        if self.scheme == "int8":
            values = lax.dynamic_slice_in_dim(values, start, width, self.axis)
            if scale.shape[self.axis] > 1:
                scale = lax.dynamic_slice_in_dim(scale, start, width, self.axis)
        else:
            values = lax.dynamic_slice_in_dim(values, start // 2, width // 2, self.axis)
            scale = lax.dynamic_slice_in_dim(scale, start // GROUP, width // GROUP, self.axis)
        return _dense(values, scale, self.axis, self.dtype)


_WIDE = jnp.float32


def _dense(values: Array, scale: Array, axis: int, dtype: Any) -> Array:
    if values.dtype == jnp.int8:
        return (values.astype(_WIDE) * scale).astype(dtype)
    head, tail = values.shape[:axis], values.shape[axis + 1 :]
    pairs = values.reshape(*head, -1, GROUP // 2, *tail)
    low, high = (pairs & 0xF).astype(jnp.int8), (pairs >> 4).astype(jnp.int8)
    signed = jnp.concatenate([low, high], axis + 1) - 8
    wide = signed.astype(_WIDE) * jnp.expand_dims(scale.astype(_WIDE), axis + 1)
    return wide.reshape(*head, -1, *tail).astype(dtype)


def quantize(
    matrix: np.ndarray, scheme: Scheme, axis: int, outputs: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of a matrix, on the host, in passes that take little memory.

    Args:
      matrix: float32, float16 or bfloat16; any strides.
      scheme: "int8" or "int4".
      axis: which axis is E: the first, or the last.
      outputs: axes along which int8 has a scale for each position.

    Returns:
      what `QuantizedMatrix` takes, as numpy arrays.

    Raises:
      ConfigError: E is no multiple of GROUP, which int4 needs.
      ValueError: some weights are infinite or not numbers.
    """
    return _quantize_8(matrix, outputs) if scheme == "int8" else _quantize_4(matrix, axis)


def check_scheme(scheme: Any) -> Scheme:
    """A scheme by name.

    Raises:
      ConfigError: there is none of that name.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"quantize = {scheme!r} is not known; use one of {', '.join(SCHEMES)}")
    return scheme


def _passes(matrix: np.ndarray, unit: int) -> Iterator[slice]:
    """Stretches of the first axis, multiples of `unit`."""
    row = max(1, 4 * math.prod(matrix.shape[1:]))
    step = max(1, _PASS // row // unit) * unit
    for start in range(0, matrix.shape[0], step):
        yield slice(start, min(start + step, matrix.shape[0]))


def _wide(part: np.ndarray) -> np.ndarray:
    wide = part.astype(np.float32)
    if bad := wide.size - int(np.count_nonzero(np.isfinite(wide))):
        raise ValueError(f"{bad:,} of its values are infinite or not a number")
    return wide


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale; 0 where the scale is too small to invert."""
    tiny = np.abs(scale) <= np.finfo(np.float32).tiny
    return np.divide(1, scale, where=~tiny, out=np.zeros_like(scale))


def _quantize_8(matrix: np.ndarray, outputs: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    summed = tuple(a for a in range(matrix.ndim) if a not in outputs)
    shape = tuple(n if a in outputs else 1 for a, n in enumerate(matrix.shape))
    largest = np.zeros(shape, np.float32)
    for rows in _passes(matrix, 1):
        part = np.abs(_wide(matrix[rows])).max(axis=summed, keepdims=True)
        here = largest[rows] if 0 in outputs else largest
        np.maximum(here, part, out=here)
    scale = largest / np.float32(127)
    inverse = _inverse(scale)
    values = np.empty(matrix.shape, np.int8)
    for rows in _passes(matrix, 1):
        factor = inverse[rows] if 0 in outputs else inverse
        values[rows] = np.rint(_wide(matrix[rows]) * factor).clip(-127, 127)
    return values, scale


def _quantize_4(matrix: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    shape = list(matrix.shape)
    if shape[axis] % GROUP:
        raise ConfigError(
            f"int4 keeps groups of {GROUP} weights along the model dim, and {shape[axis]} is no "
            "multiple of that; use quantize='int8'"
        )
    head, tail = shape[:axis], shape[axis + 1 :]
    values = np.empty([*head, shape[axis] // 2, *tail], np.uint8)
    scale = np.empty([*head, shape[axis] // GROUP, *tail], ml_dtypes.bfloat16)
    for rows in _passes(matrix, GROUP if axis == 0 else 1):
        part = _wide(matrix[rows])
        length = rows.stop - rows.start
        groups = part.reshape(*([length, *head[1:]] if axis else []), -1, GROUP, *tail)
        low, high = groups.min(axis + 1), groups.max(axis + 1)
        # The farthest value gets -8, so that all 16 are used.
        own = (np.where(high >= -low, high, low) / np.float32(-8)).astype(scale.dtype)
        wide = own.astype(np.float32)
        inverse = _inverse(wide)
        codes = np.rint(groups * np.expand_dims(inverse, axis + 1)).clip(-8, 7) + 8
        first, second = np.split(codes.astype(np.uint8), 2, axis + 1)
        packed = first | (second << 4)
        if axis == 0:
            values[rows.start // 2 : rows.stop // 2] = packed.reshape(-1, *tail)
            scale[rows.start // GROUP : rows.stop // GROUP] = own
        else:
            values[rows] = packed.reshape(length, *head[1:], -1)
            scale[rows] = own
    return values, scale
