"""What the Hopper kernel does to a sketch's codes, for each of the two layouts that codes have.

`Fields` are the 4-bit levels of `Codes`. A byte holds two, which are widened to int8 in shared
memory, where wgmma reads both operands:

    SMEM    bytes [512, D/2]
    regs    byte & 15 ^ 8, byte & 0xf0      the low field + 8, and 16 times the high field
    SMEM    int8 2 x [64, D/2]

`Words` are the signs of `Signs`, which need no shared memory: (word << j) & 0x80808080 is -128 or 0
in each byte, the four signs 7 - j, 15 - j, 23 - j and 31 - j. That is how wgmma takes its first
operand from registers, if the query's integers are in the same order. A thread has words
c, c + 4, ... of two keys, c its place among the four threads that share a row:

    SMEM    words [pages, W, Z]
    regs    int8 [64, 128] for each 4 words      16 shifts, 16 ands

Words that a group of four lacks are read again and meet zeros.
"""

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

from alaya_jax.pallas_kernels import mosaic
from alaya_jax.pallas_kernels.sketch_select.request import WORD, Codes, Query, Signs

TOKENS = 16
"""Tokens per page, as the kernel counts pages."""

KEYS = 512
"""Keys per step."""

ROWS = 64
"""Keys that a wgmma takes at once."""

HEADS = 8
"""Query heads per kv head, padded: the fewest that wgmma takes."""

COMPUTE = 2
"""Warpgroups that compute."""

_BOX = 256  # rows of a copy at most
_LANE_WORDS = 4  # threads that share a row of wgmma's first operand
_SIGNS = _LANE_WORDS * WORD


def tiled(*shape: int, dtype: Any = jnp.int8, part: int | None = None) -> Any:
    """A matrix in shared memory, as wgmma reads it; `part`: columns that are written at a time."""
    itemsize = jnp.dtype(dtype).itemsize
    row = next(x for x in (128, 64, 32) if (part or shape[-1]) * itemsize % x == 0)
    return plgpu.SMEM(shape, dtype, transforms=mosaic.swizzled(row, itemsize))


def product(dtype: Any, pairs: Any) -> Any:
    """The sum of some matrix products, [64, 8]; second operands are transposed."""

    def run(ref: Any) -> Any:
        for left, right in pairs:
            plgpu.wgmma(ref, left, right.transpose((1, 0)))
        return ref[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((ROWS, HEADS), dtype))


@dataclasses.dataclass(frozen=True)
class Operands:
    """A call's arrays as the kernel takes them.

    Attributes:
      q: [B, H, D], for the integers of centres as `centre` gives them.
      integers: int8 [B, H, I] each, as many as `integer_scratch`.
      slope, offset: float32 [B, H]; scale * (slope * inner + offset) is what an estimate has
        beside its centre.
      codes: the pool of codes, [K, ...].
    """

    q: Float[Array, "B H D"]
    integers: list[Int8[Array, "B H I"]]
    slope: Float[Array, "B H"]
    offset: Float[Array, "B H"]
    codes: Array


@dataclasses.dataclass(frozen=True)
class Fields:
    """Two levels to a byte, channel by channel."""

    dim: int

    @property
    def half(self) -> int:
        """Bytes of a key, and channels of a half."""
        return self.dim // 2

    @property
    def centre_bytes(self) -> int:
        """Of a page."""
        return self.dim

    @property
    def centre_part(self) -> int:
        """Columns that `centre` writes at a time."""
        return self.dim

    @property
    def small(self) -> bool:
        """Whether a page has less than TMA can place."""
        return False

    def operands(self, query: Query, keys: Codes | Signs) -> Operands:
        """A call's arrays."""
        # The kernel multiplies 16 times the fields, plus 128 in the low halves; a level is 2
        # fields + 1.
        low_half, whole = (
            jnp.sum(x, axis=-1, dtype=jnp.int32).astype(jnp.float32)
            for x in (query.integers[..., : self.half], query.integers)
        )
        return Operands(
            query.q,
            jnp.split(query.integers, 2, axis=-1),
            query.step / 8,
            query.step * (whole - 16 * low_half),
            lax.bitcast_convert_type(keys.codes, jnp.int8).reshape(
                keys.codes.shape[0], -1, self.half
            ),
        )

    def scratch(self, stages: int) -> list[Any]:
        """Of codes as they arrive, and of what is made of them by each warpgroup."""
        half = self.half
        return [tiled(stages, KEYS, half), tiled(COMPUTE, ROWS, half), tiled(COMPUTE, ROWS, half)]

    def integer_scratch(self) -> list[Any]:
        """Of the query's integers."""
        return [tiled(COMPUTE, HEADS, self.half)] * 2

    @property
    def run_copies(self) -> int:
        """Copies of `bring_run`."""
        return KEYS // _BOX

    @property
    def page_copies(self) -> int:
        """Copies of `bring_pages`."""
        return KEYS // TOKENS

    def bring_run(self, pool: Any, first_row: Any, slot: Any, arrived: Any) -> None:
        """The codes of a step, whose pages are neighbours."""
        for at in range(0, KEYS, _BOX):
            rows = pl.ds(pl.multiple_of(first_row + at, TOKENS), _BOX)
            mosaic.bring(pool.at[rows], slot.at[pl.ds(at, _BOX)], arrived)

    def bring_pages(self, pool: Any, first_rows: list[Any], slot: Any, arrived: Any) -> None:
        """The codes of a step, 16 keys each from a row of its own."""
        for at, first in enumerate(first_rows):
            rows = pl.ds(pl.multiple_of(first, TOKENS), TOKENS)
            mosaic.bring(pool.at[rows], slot.at[pl.ds(at * TOKENS, TOKENS)], arrived)

    def centre(self, slot: Any, wide: Any, dtype: Any) -> None:
        """Widens a step's centres for a wgmma with q."""
        centre = plgpu.load(slot, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        wide[...] = plgpu.layout_cast(centre.astype(dtype), plgpu.Layout.WGMMA)

    def inner(self, slot: Any, t: Any, work: Any, integers: Any, interpret: bool) -> Any:
        """Of 64 keys and the query's integers, int32 [64, 8]."""
        del interpret
        low, high = work
        rows = pl.ds(pl.multiple_of(t * ROWS, ROWS), ROWS)
        byte = plgpu.load(slot.at[rows], layout=plgpu.Layout.WGMMA_8BIT)
        low[...] = (byte & 15) ^ 8
        high[...] = byte & -16
        plgpu.commit_smem()
        inner = 16 * product(jnp.int32, [(low, integers[0])])
        return inner + product(jnp.int32, [(high, integers[1])])


@dataclasses.dataclass(frozen=True)
class Words:
    """Signs, 32 to a word, word by word."""

    dim: int
    words: int
    size: int

    @property
    def groups(self) -> int:
        """Of four words."""
        return -(-self.words // _LANE_WORDS)

    @property
    def centre_bytes(self) -> int:
        """Of a page."""
        return self.dim // 2

    @property
    def centre_part(self) -> int:
        """Columns that `centre` writes at a time."""
        return self.dim // 2

    @property
    def small(self) -> bool:
        """Whether a page has less than TMA can place."""
        return 4 * self.words * self.size % mosaic.ALIGNMENT != 0

    def operands(self, query: Query, keys: Codes | Signs) -> Operands:
        """A call's arrays."""
        batch, heads, signs = query.integers.shape
        missing = (0, self.groups * _SIGNS - signs)
        x = jnp.pad(query.integers, ((0, 0), (0, 0), missing))
        x = x.reshape(batch, heads, self.groups, _LANE_WORDS, WORD // 8, 8)
        x = jnp.flip(jnp.moveaxis(x, -1, 3), 3)  # [B, H, groups, j, words, bytes]
        total = jnp.sum(query.integers, axis=-1, dtype=jnp.int32).astype(jnp.float32)
        low, high = jnp.split(query.q, 2, axis=-1)
        return Operands(
            jnp.concatenate([low, high / 16], axis=-1),  # see `centre`; a power of two
            [x.reshape(batch, heads, -1)],
            query.step / -64,  # what is positive counts twice, and -128 each time
            -query.step * total,
            keys.codes,
        )

    def scratch(self, stages: int) -> list[Any]:
        """Of codes as they arrive."""
        return [plgpu.SMEM((stages, KEYS // self.size, self.words, self.size), jnp.uint32)]

    def integer_scratch(self) -> list[Any]:
        """Of the query's integers."""
        return [tiled(COMPUTE, HEADS, self.groups * _SIGNS)]

    @property
    def run_copies(self) -> int:
        """Copies of `bring_run`."""
        return 1

    @property
    def page_copies(self) -> int:
        """Copies of `bring_pages`."""
        return KEYS // self.size

    def bring_run(self, pool: Any, first_row: Any, slot: Any, arrived: Any) -> None:
        """The codes of a step, whose pages are neighbours."""
        pages = pl.ds(lax.div(first_row, jnp.int32(self.size)), KEYS // self.size)
        mosaic.bring(pool.at[pages], slot, arrived)

    def bring_pages(self, pool: Any, first_rows: list[Any], slot: Any, arrived: Any) -> None:
        """The codes of a step, page by page; first rows are of 16 keys each."""
        for at, first in enumerate(first_rows[:: self.size // TOKENS]):
            mosaic.bring(pool.at[lax.div(first, jnp.int32(self.size))], slot.at[at], arrived)

    def centre(self, slot: Any, wide: Any, dtype: Any) -> None:
        """Widens a step's centres for a wgmma with q: low fields, and 16 times the high ones."""
        byte = plgpu.load(slot, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        low = ((byte & 15) ^ 8).astype(dtype) - 8
        for at, half in enumerate((low, (byte & -16).astype(dtype))):
            columns = pl.ds(at * self.dim // 2, self.dim // 2)
            wide.at[:, columns][...] = plgpu.layout_cast(half, plgpu.Layout.WGMMA)

    def inner(self, slot: Any, t: Any, work: Any, integers: Any, interpret: bool) -> Any:
        """-128 times the sum of the integers of signs that are set, of 64 keys, int32 [64, 8]."""
        del work
        if self.size <= ROWS:
            pages = ROWS // self.size
            words = slot.at[pl.ds(t * pages, pages)]
        else:
            parts = jnp.int32(self.size // ROWS)
            part = pl.ds(pl.multiple_of(lax.rem(t, parts) * ROWS, ROWS), ROWS)
            words = slot.at[pl.ds(lax.div(t, parts), 1), :, part]
        spread = _spread_simulated if interpret else _spread
        left = [spread(words, group) for group in range(self.groups)]
        right = [integers[0].at[:, pl.ds(group * _SIGNS, _SIGNS)] for group in range(self.groups)]
        if not interpret:
            return product(jnp.int32, zip(left, right, strict=True))
        # The simulator knows no operand of wgmma in registers.
        contract = (((1,), (1,)), ((), ()))
        return sum(
            lax.dot_general(x, y[...], contract, preferred_element_type=jnp.int32)
            for x, y in zip(left, right, strict=True)
        )


_TOP = 0x80808080


def _spread(words: Any, group: int) -> Any:
    """int8 [64, 128] in registers of the 64 keys' four words, in the order of `operands`.

    Pallas has no operation that makes four int8 of a word.
    """
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref, vector

    _, count, size = words.shape
    shape, layout = (ROWS, _SIGNS), plgpu.Layout.WGMMA_8BIT

    def spread(ctx: Any, ref: Any) -> Any:
        del ctx
        of_words, i32 = layout.to_mgpu(), ir.IntegerType.get_signless(32)
        i8, index = ir.IntegerType.get_signless(8), ir.IndexType.get()

        def number(x: int, kind: Any = index) -> Any:
            return arith.constant(kind, ir.IntegerAttr.get(kind, x))

        registers = np.empty(of_words.registers_shape(shape), object)
        loaded = {}
        places = of_words.thread_idxs(shape)
        for at, (row, column) in zip(np.ndindex(registers.shape), places, strict=True):
            j, key = at[1], (at[0], *at[2:])  # 16 columns are bytes of four words
            if j == 0:
                word = arith.addi(arith.divui(column, number(4)), number(_LANE_WORDS * group))
                word = arith.minui(word, number(count - 1))
                page, token = arith.divui(row, number(size)), arith.remui(row, number(size))
                loaded[key] = memref.load(ref, [page, word, token])
            shifted = arith.shli(loaded[key], number(j, i32))
            top = arith.andi(shifted, number(_TOP - 2**32, i32))
            one = vector.broadcast(ir.VectorType.get((1,), i32), top)
            registers[at] = vector.bitcast(ir.VectorType.get((4,), i8), one)
        return mgpu.FragmentedArray(_registers=registers, _layout=of_words, _is_signed=True)

    inline = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, layout=layout),
    )
    return inline(spread)(words)


def _spread_simulated(words: Any, group: int) -> Array:
    """The same."""
    _, count, _ = words.shape
    x = jnp.swapaxes(words[...], 1, 2).reshape(ROWS, count)
    at = np.minimum(_LANE_WORDS * group + np.arange(_LANE_WORDS), count - 1)
    x = jnp.stack([x[:, int(i)] for i in at], axis=1)
    top = jnp.stack([(x << j) & jnp.uint32(_TOP) for j in range(8)], axis=1)  # [64, j, words]
    return lax.bitcast_convert_type(top, jnp.int8).reshape(ROWS, _SIGNS)


def layout_of(keys: Codes | Signs) -> Fields | Words:
    """The layout of a sketch."""
    if isinstance(keys, Signs):
        _, _, words, size = keys.codes.shape
        return Words(2 * keys.centre.shape[2], words, size)
    return Fields(keys.centre.shape[2])
