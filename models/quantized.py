"""Matrices kept in 8 or 4 bits, for hosts with little memory: a step reads fewer bytes, too.

Weights are integers with a scale for each group of up to 32 neighbours along what a product sums
over, as in the blocks of GGUF files, which are taken as they are. int8: symmetric, 8.5 bits a
weight. int4: from the least to the largest of a group, two values a byte, 5 bits a weight.

A product of a few rows is one of integers, whose cost follows the bytes: what the weights are
multiplied with is rounded to 16 bits a group, which is as near as float32 sums are (8 bits would
double the error of int8). More rows are multiplied by float32 parts. Derivatives, too.

Every matrix of the model has the axis E, and by default no mesh splits it. So where a part of a
matrix is dequantized at a time, the parts lie along E; on a CPU along what is not summed over,
where that is one axis.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int16

from alaya_jax.errors import ConfigError
from alaya_jax.models.matrices import at_least_two, summed

Scheme = Literal["int8", "int4", "stored"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
QUANTIZATION = "-2"
"""Part of a quantized model's identity: a number that rises when the same files and the same scheme
come to mean other values, since stored contexts of before are another model's then."""
GROUP = 32
"""Most weights that share a scale."""
_LEAST_GROUP = 8  # where a length has no such divisor, all of it is one group
_TILE = 64  # most outputs of a tile: whole rows, 4,096 bytes apart, share a place in the cache
_FEW = 4  # most rows of a product of integers: it costs by the row, dense parts hardly do
_SPLIT = 8  # devices that tiles of a long axis are to divide over, where some of their sizes does
_SAFE = 512  # longest group whose sum int32 holds, of 128 times _LARGEST
_PART = 512  # most rows or columns that are dequantized at once
_LARGEST = np.float32(32767)
_PASS = 1 << 24  # bytes of float32 quantized at once on the host
_WIDE = jnp.float32


class Blocks(NamedTuple):
    """A matrix in groups on the host; what `quantize` makes, and GGUF files hold.

    Attributes:
      values: int8; or uint8, half as long along the grouped axis: of each group, the first half in
        the low four bits and the second in the high.
      scale: bfloat16 or float16, one a group.
      offset: the same, or None: weights are `values * scale + offset`.
    """

    values: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix in 8 or 4 bits; a `Matrix`, see `alaya_jax.models.matrices`.

    Its axes lie with those that a product sums over first, and groups along the last of them: an
    embedding [V, E] lies as [E, V]. A group's integers for a few neighbouring outputs, a tile, lie
    together, so that a product reads memory from its begin to its end.

    Attributes:
      values: integers as in `Blocks`; of the axes in their order, groups in place of the last that
        is summed over and tiles in place of the last, then [group, tile] behind all.
      scale, offset: see `Blocks`.
      inputs: how many axes a product sums over.
      axis: which axis is E: the first, or the last.
      embedding: whether it is one.
      compute: name of the type that rows have, and parts are dequantized to.
    """

    values: Array
    scale: Array
    offset: Array | None
    inputs: int = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    embedding: bool = dataclasses.field(metadata={"static": True})
    compute: str = dataclasses.field(metadata={"static": True})

    @property
    def scheme(self) -> Scheme:
        """How it is kept, "int8" or "int4"."""
        return "int8" if self.values.dtype == jnp.int8 else "int4"

    @property
    def group(self) -> int:
        """How many weights share a scale."""
        return self.values.shape[-2] * (1 if self.scheme == "int8" else 2)

    @property
    def laid(self) -> tuple[int, ...]:
        """Shape as it lies, what is summed over first."""
        *shape, _, tile = self.values.shape
        shape[self.inputs - 1] *= self.group
        shape[-1] *= tile
        return tuple(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.laid[::-1] if self.embedding else self.laid

    @property
    def size(self) -> int:
        """How many weights it holds."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """Type of its rows."""
        return jnp.dtype(self.compute)

    def dense(self) -> Array:
        """The matrix; for tests, and whoever has the room."""
        whole = self._dense(self.values, self.scale, self.offset)
        return whole.T if self.embedding else whole

    def rows(self, ids: Int[Array, "..."]) -> Float[Array, "... E"]:
        """Rows of an embedding [V, E]."""
        assert self.embedding
        tile = self.values.shape[-1]
        some = at_least_two(ids)
        codes = self._whole(self.values[:, some // tile, :, some % tile], -1)  # [n, groups, group]
        offset = None if self.offset is None else self.offset[:, some].T
        wide = _scaled(codes, self.scale[:, some].T, offset, -1)
        rows = wide.reshape(len(some), -1)[: ids.size].astype(self.dtype)
        return rows.reshape(*ids.shape, rows.shape[-1])

    def contract(self, x: Array, n: int, preferred_element_type: Any = None) -> Array:
        """Contracts the last n axes of x with the first n of the matrix."""
        assert n == self.inputs
        assert not self.embedding
        return self._product(x).astype(preferred_element_type or x.dtype)

    def contract_last(self, x: Float[Array, "... E"]) -> Float[Array, "... V"]:
        """Contracts the last axis of x with the last of an embedding [V, E], in float32."""
        assert self.embedding
        return self._product(x)

    def _product(self, x: Array) -> Array:
        """Contracts the last `inputs` axes of x with the first ones; float32."""
        lead = x.shape[: x.ndim - self.inputs]
        groups = x.astype(_WIDE).reshape(math.prod(lead), -1, self.group)
        return _contract(groups, self).reshape(*lead, *self.laid[self.inputs :])

    def _whole(self, values: Array, axis: int) -> Array:
        """Integers as float32, one each; `axis` is that of a group."""
        if self.scheme == "int4":
            values = jnp.concatenate([values & 0xF, values >> 4], axis)
        return values.astype(_WIDE)

    def _dense(self, values: Array, scale: Array, offset: Array | None) -> Array:
        """Of these parts, in `dtype`, as they lie."""
        at = self.inputs
        wide = jnp.moveaxis(self._whole(values, -2), -2, at)  # [.. groups, group .. tiles, tile]
        wide = wide.reshape(*scale.shape[:at], self.group, *scale.shape[at:])
        wide = _scaled(wide, scale, offset, at)
        *lead, groups = scale.shape[:at]
        dense = wide.reshape(*lead, groups * self.group, *scale.shape[at:])
        return dense.astype(self.dtype)

    def part(self, axis: int) -> int:
        """Rows or columns along an axis that are dequantized at once."""
        length = self.laid[axis]
        unit = self.group if axis < self.inputs else self.values.shape[-1]
        fits = [w for w in range(unit, length // 2 + 1, unit) if length % w == 0 and w <= _PART]
        return max(fits, default=length)

    def _slice(self, start: Any, axis: int) -> Array:
        """A part of the matrix, dense, as it lies."""
        length, width = self.laid[axis], self.part(axis)

        def cut(x: Array | None) -> Any:
            if x is None:
                return None
            each = length // x.shape[axis]
            return lax.dynamic_slice_in_dim(x, start // each, width // each, axis)

        return self._dense(cut(self.values), cut(self.scale), cut(self.offset))


@jax.custom_jvp
def _contract(x: Float[Array, "R G g"], matrix: QuantizedMatrix) -> Float[Array, "R ..."]:
    """Rows, in groups, times a matrix; float32."""
    if len(x) > _FEW or matrix.group > _SAFE:
        return _in_parts(x, matrix)
    if len(x) == 1:
        return _in_integers(x, matrix)
    # For several rows XLA on GPUs would store the matrix in 32 bits.
    return lax.platform_dependent(x, matrix, cpu=_in_integers, default=_in_parts)


@_contract.defjvp
def _derivative(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    return _contract(*primals), jax.jvp(_in_parts, primals, tangents)[1]


def _rounded(x: Float[Array, "R G g"]) -> tuple[Int16[Array, "R G g"], Float[Array, "R G"]]:
    """To 16 bits: integers, and a scale for each group."""
    largest = jnp.max(jnp.abs(x), axis=-1)
    inverse = jnp.where(largest > 0, _LARGEST / jnp.where(largest > 0, largest, 1), 0)
    # A compiler that fused this into the product would round again for every column.
    codes = lax.optimization_barrier(jnp.round(x * inverse[..., None]).astype(jnp.int16))
    return codes, largest / _LARGEST


def _in_integers(x: Float[Array, "R G g"], matrix: QuantizedMatrix) -> Float[Array, "R ..."]:
    """Sums of integers in each group, and of the groups, scaled. One pass over the weights."""
    codes, scale = _rounded(x)
    groups, outputs = codes.shape[1], matrix.laid[matrix.inputs :]
    group, tile = matrix.values.shape[-2:]
    values = matrix.values.reshape(1, groups, -1, group, tile)
    wide = codes.astype(jnp.int32)
    if matrix.scheme == "int8":
        terms = wide[:, :, None, :, None] * values.astype(jnp.int32)
    else:
        low, high = jnp.split(wide[:, :, None, :, None], 2, axis=3)
        # A byte is b = 16 h + l, and low l + high h = low b + (high - 16 low) h.
        terms = low * values.astype(jnp.int32) + (high - 16 * low) * (values >> 4).astype(jnp.int32)
    # Sums of the groups are kept: a compiler that fused them into the next sum would store terms.
    sums = lax.optimization_barrier(jnp.sum(terms, axis=3, dtype=jnp.int32))
    sums = sums.reshape(len(codes), groups, -1).astype(_WIDE)
    total = sums * (scale[..., None] * _wide(matrix.scale).reshape(1, groups, -1))
    if matrix.offset is not None:
        of_x = scale * jnp.sum(wide, axis=2, dtype=jnp.int32).astype(_WIDE)
        total = total + of_x[..., None] * _wide(matrix.offset).reshape(1, groups, -1)
    # What was not finite has no integers. (A sum of products alone is taken apart by XLA on CPUs.)
    total = jnp.where(jnp.isfinite(scale)[..., None], total, np.float32(np.nan))
    return summed(total).reshape(-1, *outputs)


def _in_parts(x: Float[Array, "R G g"], matrix: QuantizedMatrix) -> Float[Array, "R ..."]:
    """By dense products with one part of the matrix after another; float32.

    On a CPU parts of [E, F] lie along F, so that each stays in its cache, and sums are complete.
    """
    along_e = functools.partial(_along, axis=matrix.axis)
    if matrix.inputs == 1 and len(matrix.laid) == 2 and matrix.axis == 0:
        along_f = functools.partial(_along, axis=1)
        return lax.platform_dependent(x, matrix, cpu=along_f, default=along_e)
    return along_e(x, matrix)


def _along(x: Float[Array, "R G g"], matrix: QuantizedMatrix, axis: int) -> Float[Array, "R ..."]:
    """`_in_parts`, along one axis."""
    width, length = matrix.part(axis), matrix.laid[axis]
    starts = jnp.arange(0, length, width)
    rows = x.astype(matrix.dtype).reshape(len(x), *matrix.laid[: matrix.inputs])
    product = functools.partial(
        jnp.tensordot, axes=matrix.inputs, preferred_element_type=jnp.float32
    )
    if axis < matrix.inputs:

        @jax.checkpoint
        def add(total: Array, start: Array) -> tuple[Array, None]:
            some = lax.dynamic_slice_in_dim(rows, start, width, axis=1 + axis)
            return total + product(some, matrix._slice(start, axis)), None

        none = jnp.zeros((len(x), *matrix.laid[matrix.inputs :]), _WIDE)
        return lax.scan(add, none, starts)[0] if len(starts) > 1 else add(none, starts[0])[0]

    @jax.checkpoint
    def one(start: Array) -> Array:
        return product(rows, matrix._slice(start, axis))

    if len(starts) == 1:
        return one(starts[0])
    return jnp.moveaxis(lax.map(one, starts), 0, -2).reshape(len(x), *matrix.laid[matrix.inputs :])


def _scaled(codes: Array, scale: Array, offset: Array | None, axis: int) -> Array:
    """Weights of integers, float32; `axis` is that of a group."""
    weights = codes * jnp.expand_dims(_wide(scale), axis)
    return weights if offset is None else weights + jnp.expand_dims(_wide(offset), axis)


def _wide(x: Array) -> Array:
    """bfloat16 or float16 as float32, exactly, by operations that every CPU has for vectors."""
    if x.dtype != jnp.float16:
        return x.astype(_WIDE)
    bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    size = lax.bitcast_convert_type((bits & 0x7FFF) << 13, _WIDE) * np.float32(2.0**112)
    # Subnormal ones would be so in float32, too, which XLA takes for zeros.
    least = (bits & 0x3FF).astype(_WIDE) * np.float32(2.0**-24)
    size = jnp.where(bits & 0x7C00 == 0, least, size)
    return jnp.where(bits >> 15 == 1, -size, size)


def group_of(length: int, even: bool = False) -> int:
    """How many weights share a scale where a product sums over an axis of this length.

    Args:
      length: of the axis; of several, of the last.
      even: whether two values share a byte.

    Raises:
      ConfigError: two cannot.
    """
    fits = [n for n in range(_LEAST_GROUP, GROUP + 1) if length % n == 0 and not (even and n % 2)]
    if not fits and even:
        raise ConfigError(
            f"int4 keeps groups of {_LEAST_GROUP} to {GROUP} weights, an even number, and no such "
            f"number divides {length}; use quantize='int8'"
        )
    return max(fits, default=length)


def tiled(values: np.ndarray, groups: int, axis: int) -> np.ndarray:
    """Integers as a `QuantizedMatrix` has them; a view.

    Args:
      values: of `Blocks`, axes that are summed over first.
      groups: how many groups lie along the last of those.
      axis: which that is.
    """
    *lead, last = values.shape[axis + 1 :]
    tile = tile_of(last)
    split = values.reshape(*values.shape[:axis], groups, -1, *lead, last // tile, tile)
    return np.moveaxis(split, axis + 1, -2)


def tile_of(length: int) -> int:
    """How many outputs of so many lie together; a mesh that splits them must divide the tiles."""
    fits = [n for n in range(1, min(_TILE, length) + 1) if length % n == 0]
    even = [n for n in fits if n % 16 == 0 and length // n % _SPLIT == 0]
    return max(even if even and length >= _SPLIT * _TILE else fits)


def quantize(matrix: np.ndarray, scheme: Literal["int8", "int4"], axis: int) -> Blocks:
    """A matrix in groups along one axis, on the host, in passes that take little memory.

    Args:
      matrix: float32, float16 or bfloat16; any strides.
      scheme: "int8" or "int4".
      axis: that groups lie along.

    Returns:
      the groups; axes as those of the matrix. Scales are bfloat16: its range is float32's.

    Raises:
      ConfigError: the length of the axis does not suit int4.
      ValueError: some weights are infinite or not numbers.
    """
    last = np.moveaxis(matrix, axis, -1)
    *lead, length = last.shape
    size = group_of(length, even=scheme == "int4")
    scale = np.empty([*lead, length // size], ml_dtypes.bfloat16)
    four = scheme == "int4"
    values = np.empty([*lead, length // 2] if four else last.shape, np.uint8 if four else np.int8)
    offset = np.empty_like(scale) if four else None
    for rows in _passes(last):
        groups = _finite(last[rows]).reshape(*scale[rows].shape, size)
        if offset is None:
            codes, scale[rows] = _rounded_8(groups)
        else:
            codes, scale[rows], offset[rows] = _rounded_4(groups)
        values[rows] = codes.reshape(values[rows].shape)
    parts = (x if x is None else np.moveaxis(x, -1, axis) for x in (values, scale, offset))
    return Blocks(*parts)  # type: ignore[arg-type]


def check_scheme(scheme: Any) -> Scheme:
    """A scheme by name.

    Raises:
      ConfigError: there is none of that name.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"quantize = {scheme!r} is not known; use one of {', '.join(SCHEMES)}")
    return scheme


def packed(codes: np.ndarray) -> np.ndarray:
    """Values of 0 to 15 [..., group], two a byte: the first half low, the second high."""
    low, high = np.split(codes.astype(np.uint8), 2, -1)
    return low | (high << 4)


def _passes(matrix: np.ndarray) -> Iterator[slice]:
    """Stretches of the first axis."""
    step = max(1, _PASS // max(1, 4 * math.prod(matrix.shape[1:])))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, min(start + step, matrix.shape[0]))


def _finite(part: np.ndarray) -> np.ndarray:
    wide = part.astype(np.float32)
    if bad := wide.size - int(np.count_nonzero(np.isfinite(wide))):
        raise ValueError(f"{bad:,} of its values are infinite or not a number")
    return wide


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale; 0 where the scale is too small to invert."""
    tiny = np.abs(scale) <= np.finfo(np.float32).tiny
    return np.divide(1, scale, where=~tiny, out=np.zeros_like(scale))


def _rounded_8(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales of groups [..., group]."""
    scale = (np.abs(groups).max(-1) / np.float32(127)).astype(ml_dtypes.bfloat16)
    inverse = _inverse(scale.astype(np.float32))
    return np.rint(groups * inverse[..., None]).clip(-127, 127).astype(np.int8), scale


def _rounded_4(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed integers, scales and offsets of groups [..., group]."""
    least, most = groups.min(-1), groups.max(-1)
    offset = least.astype(ml_dtypes.bfloat16)
    start = offset.astype(np.float32)
    scale = ((most - start) / np.float32(15)).astype(ml_dtypes.bfloat16)
    inverse = _inverse(scale.astype(np.float32))
    codes = np.rint((groups - start[..., None]) * inverse[..., None]).clip(0, 15)
    return packed(codes), scale, offset
