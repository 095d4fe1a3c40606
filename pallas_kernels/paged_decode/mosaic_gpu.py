r"""`paged_decode` for Hopper: Pallas, Mosaic GPU.

Decoding reads each key once and computes little with it. So what matters is bytes in flight;
registers matter only in that too many would keep a second block off a multiprocessor.

    grid: (row = sequence x kv head) x (split of the row's list of pages)      one warpgroup a block

    list of pages  [ 7 | 3 | 9 | 4 | 1 | 8 | 2 | 5 | ...]      Z = 16: four pages fill one tile
                    \____________/ \____________/
                       tile 0           tile 1            ...   64 keys each

    GMEM    K page, V page              TMA, one copy a page, swizzled to what wgmma reads
              |
    SMEM    K [stages][64 keys, D]      V [stages][64 keys, D]     stages - 1 tiles in flight
              |                           |
    wgmma   S^T [64 keys, N heads] = K q^T      N = G padded to 8. Keys are the 64 rows of wgmma, so
              |                           |     no row is wasted on heads that do not exist
    regs    mask, max over keys, p = 2^(..)     4 numbers per thread
              |                           |
    SMEM    P [N, 64]                     |     written transposed
               \__________  ____________/
    wgmma   O^T [D, N] = V^T P^T                8 numbers per thread for D = 128
              |
    GMEM    O^T, max, sum of each split   ->    merged in XLA (a few hundred KB at most)

    loop    wait K(i)  S  mask  max  P  commit | issue tile i + stages - 1 | wait V(i)  O += ...
                                               ^ every warp has read tile i - 1 by now

8-bit pages are widened to bf16 in SMEM, tile by tile, before wgmma reads them. A key's scale
multiplies its scores, a value's scale its weights.

In a tile with keys that are not seen (past the end of a sequence, in a gap), their rows of V are
first set to 0 in SMEM: they may hold NaN, and 0 * NaN would reach the sum.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.pallas_kernels import mosaic
from alaya_jax.pallas_kernels.dispatch import Target
from alaya_jax.pallas_kernels.paged_decode.keys import LOWEST, Keys, PagedDecode

TILE = 64
"""Keys per tile: the rows of one wgmma."""

WIDENED = {"int8": jnp.bfloat16, "float8_e4m3fn": jnp.bfloat16}
"""Type of 8-bit numbers once they are widened in shared memory. It holds each of them exactly, and
also weights times a small scale of V, which float16 does not."""

_NOWHERE = 1 << 30  # a position that no sequence reaches


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Choices that may differ between devices. They change results by rounding at most.

    Attributes:
      stages: tiles of K and of V in shared memory; one is in use while the others arrive.
      splits: blocks that share the keys of one row; None: enough to fill the device.
      blocks: blocks that the device holds at once; 132 multiprocessors x 2 on an H100.
    """

    stages: int = 3
    splits: int | None = None
    blocks: int = 264

    def splits_of(self, batch: int, kv_heads: int, tiles: int) -> int:
        """How many blocks share one row of at most `tiles` tiles.

        A single sequence gets one round of equal blocks. Several sequences differ in length, and
        which is the longest is not known here; with two rounds, the blocks of short ones make room
        early.
        """
        rounds = 1 if batch == 1 else 2
        wanted = self.splits or max(1, rounds * self.blocks // (batch * kv_heads))
        return max(1, min(wanted, tiles))


SIMULATED = Tuning(stages=2, splits=2)
"""For the simulator: a few tiles are then enough to reuse each slot, and splits are merged."""


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The static sizes that the kernel is compiled for.

    `lists` is J; `heads` is N, the heads of a kv head, padded; `dtype` is the type that wgmma
    multiplies and `stored` that of the pages.
    """

    rows: int
    kv_heads: int
    lists: int
    heads: int
    dim: int
    page_size: int
    splits: int
    stages: int
    dtype: Any
    stored: Any
    scale: float
    starts: bool
    gap: bool
    threshold: bool
    mask: bool

    @property
    def word_keys(self) -> int:
        """How many keys of a page share one word of the mask."""
        return min(self.page_size, 32)

    @property
    def pages(self) -> int:
        """Pages per tile."""
        return TILE // self.page_size

    @property
    def quantized(self) -> bool:
        """Whether pages hold 8-bit numbers, to be widened in shared memory before wgmma."""
        return self.stored != self.dtype

    def smem(self, *size: int, stored: bool = False) -> Any:
        """Shared memory for rows of head_dim or of keys, with the widest swizzle that fits both."""
        dtype = jnp.dtype(self.stored if stored else self.dtype)
        width = self.dim * dtype.itemsize
        swizzle = next(s for s in (128, 64, 32) if width % s == 0)
        return plgpu.SMEM(size, dtype, transforms=mosaic.swizzled(swizzle, dtype.itemsize))

    @property
    def d_blocks(self) -> tuple[tuple[int, int], ...]:
        """(first, size) of the rows of O^T that each wgmma computes; they overlap for D = 96."""
        return ((0, 64), (32, 64)) if self.dim == 96 else ((0, self.dim),)


def paged_decode(
    q: Float[Array, "B H D"],
    k_pages: Float[Array, "K P Z D"],
    v_pages: Float[Array, "K P Z D"],
    keys: Keys,
    k_scale: Float[Array, "K P Z"] | None,
    v_scale: Float[Array, "K P Z"] | None,
    *,
    scale: float,
    want_kept: bool,
    target: Target,
    tuning: Tuning | None = None,
) -> PagedDecode:
    """As `paged_decode.paged_decode`."""
    tuning = tuning or (SIMULATED if target.interpret else Tuning())
    batch, heads, dim = q.shape
    kv_heads, _, size, _ = k_pages.shape
    groups = heads // kv_heads
    padded = -(-groups // 8) * 8
    rows = batch * kv_heads
    tiles = -(-keys.page_ids.shape[2] * size // TILE)
    shape = _Shape(
        rows=rows,
        kv_heads=kv_heads,
        lists=keys.page_ids.shape[1],
        heads=padded,
        dim=dim,
        page_size=size,
        splits=tuning.splits_of(batch, kv_heads, tiles),
        stages=tuning.stages,
        dtype=WIDENED.get(jnp.dtype(k_pages.dtype).name, k_pages.dtype),
        stored=k_pages.dtype,
        scale=scale,
        starts=keys.starts is not None,
        gap=keys.gap_low is not None,
        threshold=keys.threshold is not None,
        mask=keys.mask is not None,
    )
    pad = ((0, 0), (0, padded - groups))
    queries = jnp.pad(q.astype(shape.dtype).reshape(rows, groups, dim), (*pad, (0, 0)))
    low = jnp.zeros_like(keys.high) if keys.low is None else keys.low
    if keys.gap_low is None or keys.gap_high is None:
        ranges = jnp.stack([low, keys.high], axis=1)
    else:
        ranges = jnp.stack([low, keys.high, keys.gap_low, keys.gap_high], axis=1)
    operands = [queries, keys.page_ids, keys.count, ranges.astype(jnp.int32)]
    if keys.starts is not None:
        operands.append(keys.starts)
    if keys.threshold is not None:
        floor = keys.threshold.astype(jnp.float32).reshape(rows, groups)
        operands.append(jnp.pad(floor, pad, constant_values=-jnp.inf))
    if keys.mask is not None:
        operands.append(_words(keys.mask, shape))
    scales = [_scales(x, keys, shape) for x in (k_scale, v_scale) if x is not None]
    acc, top, total, kept = _kernel(shape, target)(*operands, *scales, k_pages, v_pages)

    # The second stage: merge the splits of a row, which are parts of one softmax.
    best = jnp.max(top, axis=1, keepdims=True)
    weight = jnp.exp(scale * (top - best))  # [R, splits, N]
    total = jnp.sum(weight * total, axis=1)[:, :groups]
    # Not a matmul, because a GPU would compute it in TF32.
    acc = jnp.sum(weight[:, :, None] * acc, axis=1).swapaxes(1, 2)[:, :groups]
    safe = jnp.where(total > 0, total, 1.0)
    best = jnp.where(total > 0, best[:, 0, :groups], -jnp.inf)
    lse = jnp.where(total > 0, scale * best + jnp.log(safe), -jnp.inf)
    out = acc / safe[..., None]
    number = jnp.sum(kept, axis=1)[:, :groups].astype(jnp.int32).reshape(batch, heads)
    return PagedDecode(
        out.reshape(q.shape),
        lse.reshape(batch, heads),
        best.reshape(batch, heads),
        number if want_kept else None,
    )


def _words(mask: Bool[Array, "B H N Z"], shape: _Shape) -> Int[Array, "R N W heads"]:
    """A mask as bits, lowest bit first: R rows, W words per page."""
    groups = mask.shape[0] * mask.shape[1] // shape.rows
    bits = mask.reshape(shape.rows, groups, mask.shape[2], -1, shape.word_keys)
    shifts = jnp.arange(shape.word_keys, dtype=jnp.uint32)
    words = jnp.sum(bits.astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)
    words = jnp.moveaxis(lax.bitcast_convert_type(words, jnp.int32), 1, -1)
    return jnp.pad(words, ((0, 0), (0, 0), (0, 0), (0, shape.heads - groups)))


def _scales(scale: Float[Array, "K P Z"], keys: Keys, shape: _Shape) -> Float[Array, "R tokens"]:
    """The scales of the listed pages, copied into the order of the lists.

    Those of a page of 16 keys are 64 bytes, which is less than TMA can place in shared memory.
    """
    ids = jnp.pad(keys.page_ids, ((0, 0), (0, 0), (0, -keys.page_ids.shape[2] % shape.pages)))
    ids = jnp.broadcast_to(ids, (ids.shape[0], shape.kv_heads, ids.shape[2]))
    head = jnp.arange(shape.kv_heads)[:, None]
    return scale.at[head, ids].get(mode="clip").reshape(shape.rows, -1)


def _kernel(shape: _Shape, target: Target) -> Any:
    per_split = (shape.rows, shape.splits)
    tiles = shape.smem(shape.stages, TILE, shape.dim, stored=True)
    arrives = plgpu.Barrier(num_arrivals=shape.pages + shape.quantized, num_barriers=shape.stages)
    scratch = {
        "q_smem": shape.smem(shape.heads, shape.dim),
        "k_smem": tiles,
        "v_smem": tiles,
        "p_smem": shape.smem(shape.heads, TILE),
        "q_arrived": plgpu.Barrier(),
        "k_arrived": arrives,
        "v_arrived": arrives,
    }
    if shape.quantized:
        for name in "kv":
            scratch[f"{name}_wide"] = shape.smem(TILE, shape.dim)
            scratch[f"{name}_scale"] = plgpu.SMEM((shape.stages, TILE), jnp.float32)
    per_head = jax.ShapeDtypeStruct((*per_split, shape.heads), jnp.float32)
    return plgpu.kernel(
        functools.partial(_body, shape),
        out_type=(
            jax.ShapeDtypeStruct((*per_split, shape.dim, shape.heads), jnp.float32),
            per_head,
            per_head,
            per_head,
        ),
        scratch_types=scratch,
        grid=per_split,
        grid_names=("row", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode",
        interpret=mosaic.interpret(target),
    )


def _body(
    shape: _Shape,
    q_ref: Any,
    ids_ref: Any,
    count_ref: Any,
    range_ref: Any,
    *refs: Any,
    **scratch: Any,
) -> None:
    *optional, k_ref, v_ref, acc_ref, top_ref, total_ref, kept_ref = refs
    starts_ref = optional[0] if shape.starts else None
    floor_ref = optional[int(shape.starts)] if shape.threshold else None
    word_ref = optional[shape.starts + shape.threshold] if shape.mask else None
    k_scale_ref, v_scale_ref = optional[-2:] if shape.quantized else (None, None)
    q_smem, k_smem, v_smem, p_smem = (scratch[f"{x}_smem"] for x in "qkvp")
    q_arrived, k_arrived, v_arrived = (scratch[f"{x}_arrived"] for x in "qkv")

    row, split = lax.axis_index("row"), lax.axis_index("split")
    batch, head = lax.div(row, shape.kv_heads), lax.rem(row, shape.kv_heads)
    which = head if shape.lists > 1 else 0
    count = jnp.minimum(count_ref[batch, which], ids_ref.shape[2])
    tiles = lax.div(count + (shape.pages - 1), shape.pages)
    first = lax.div(tiles * split, shape.splits)
    steps = lax.div(tiles * (split + 1), shape.splits) - first
    low, high = range_ref[batch, 0], range_ref[batch, 1]
    gap_low, gap_high = (range_ref[batch, 2], range_ref[batch, 3]) if shape.gap else (0, 0)

    def page_ids(step: Any) -> list[Any]:
        """The pages of one tile. Past the end of the list, its last page is repeated."""
        begin = (first + step) * shape.pages
        last = jnp.maximum(count - 1, 0)
        return [ids_ref[batch, which, jnp.minimum(begin + j, last)] for j in range(shape.pages)]

    def words(step: Any) -> list[Any]:
        """The mask of one tile, in words for each head."""
        if word_ref is None:
            return []
        found = []
        for key in range(0, TILE, shape.word_keys):
            page, offset = divmod(key, shape.page_size)
            entry = jnp.minimum((first + step) * shape.pages + page, jnp.maximum(count - 1, 0))
            word = word_ref.at[row, entry, offset // shape.word_keys]
            found.append(plgpu.load(word, layout=wgmma.reduce(0), optimized=False))
        return found

    def issue(step: Any, pages: list[Any]) -> None:
        """Starts the copies of one tile."""
        slot = lax.rem(step, shape.stages)
        for ref, smem, arrived in ((k_ref, k_smem, k_arrived), (v_ref, v_smem, v_arrived)):
            for j, page in enumerate(pages):
                rows = pl.ds(j * shape.page_size, shape.page_size)
                mosaic.bring(ref.at[head, page], smem.at[slot, rows], arrived.at[slot])
        if k_scale_ref is not None and v_scale_ref is not None:
            of_tile = pl.ds(pl.multiple_of((first + step) * TILE, TILE), TILE)
            for ref, name, arrived in (
                (k_scale_ref, "k_scale", k_arrived),
                (v_scale_ref, "v_scale", v_arrived),
            ):
                mosaic.bring(ref.at[row, of_tile], scratch[name].at[slot], arrived.at[slot])

    wgmma = plgpu.Layout.WGMMA
    mosaic.bring(q_ref.at[row], q_smem, q_arrived)
    for step in range(shape.stages - 1):
        pages = page_ids(step)
        pl.when(step < steps)(functools.partial(issue, jnp.int32(step), pages))
    per_key = functools.partial(plgpu.broadcasted_iota, jnp.int32)
    tile_shape = (TILE, shape.heads)
    floor = None
    if floor_ref is not None:
        floor = plgpu.load(floor_ref.at[row], layout=wgmma.reduce(0), optimized=False)
    plgpu.barrier_wait(q_arrived)

    def visit(step: Any, carry: Any) -> Any:
        pages, masks, top, total, kept, acc = carry
        slot = lax.rem(step, shape.stages)
        tile = first + step
        begins = []  # position of each page's first key; `_NOWHERE` past the end of the list
        for j in range(shape.pages):
            entry = tile * shape.pages + j
            begin = entry * shape.page_size
            if starts_ref is not None:
                begin = starts_ref[batch, which, jnp.minimum(entry, count - 1)]
            begins.append(jnp.where(entry < count, begin, _NOWHERE))

        def seen(key: Any) -> Any:
            """Whether the key in each row of the tile is seen."""
            position = key + begins[0]
            for j in range(1, shape.pages):
                size = j * shape.page_size
                position = jnp.where(key >= size, key + (begins[j] - size), position)
            inside = (position >= low) & (position < high)
            if shape.gap:
                inside = inside & ((position < gap_low) | (position >= gap_high))
            return inside

        whole = jnp.bool_(True)
        for begin in begins:
            end = begin + shape.page_size
            whole = whole & (begin >= low) & (end <= high)
            if shape.gap:
                whole = whole & ((end <= gap_low) | (begin >= gap_high))

        def operand(name: str, tiles: Any) -> Any:
            """The tile in the form that wgmma reads; 8-bit numbers are widened, exactly."""
            if not shape.quantized:
                return tiles.at[slot]
            wide = scratch[f"{name}_wide"]
            values = plgpu.load(tiles.at[slot], layout=wgmma)
            if values.dtype != jnp.int8:
                values = values.astype(jnp.float32)  # Hopper converts fp8 to no 16-bit type but f16
            wide[...] = values.astype(shape.dtype)
            return wide

        def factors(name: str) -> Any:
            """The scale of each key, for all heads."""
            scale = plgpu.load(scratch[f"{name}_scale"].at[slot], layout=wgmma.reduce(1))
            return lax.broadcast_in_dim(scale, tile_shape, [0])

        plgpu.barrier_wait(k_arrived.at[slot])
        k_tile = operand("k", k_smem)
        if shape.quantized:
            plgpu.commit_smem()

        def score(acc_ref: Any) -> Any:
            plgpu.wgmma(acc_ref, k_tile, q_smem.transpose((1, 0)))
            return acc_ref[...]

        scores = pl.run_scoped(score, plgpu.WGMMAAccumulatorRef(tile_shape, jnp.float32))
        if shape.quantized:
            scores = scores * factors("k")
        keep = seen(per_key(tile_shape, 0, layout=wgmma))
        if floor is not None:
            keep = keep & (scores >= lax.broadcast_in_dim(floor, tile_shape, [1]))
        if masks:
            key = per_key(tile_shape, 0, layout=wgmma)
            word = lax.broadcast_in_dim(masks[0], tile_shape, [1])
            for j in range(1, len(masks)):
                later = lax.broadcast_in_dim(masks[j], tile_shape, [1])
                word = jnp.where(key >= j * shape.word_keys, later, word)
            bit = lax.shift_right_logical(word, key & (shape.word_keys - 1)) & 1
            keep = keep & (bit != 0)
        scores = jnp.where(keep, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=0))
        log2e = shape.scale * math.log2(math.e)
        fade = jnp.exp2((top - new_top) * log2e)
        p = jnp.exp2((scores - lax.broadcast_in_dim(new_top, tile_shape, [1])) * log2e)
        if not shape.quantized:
            p_smem.transpose((1, 0))[...] = plgpu.layout_cast(p.astype(shape.dtype), wgmma)
        plgpu.barrier_wait(v_arrived.at[slot])
        v_tile = operand("v", v_smem)
        if shape.quantized:  # the scale of a key that is not seen may be NaN too
            weight = jnp.where(keep, p * factors("v"), 0.0)
            p_smem.transpose((1, 0))[...] = plgpu.layout_cast(weight.astype(shape.dtype), wgmma)

        @pl.when(jnp.logical_not(whole))
        def _blank() -> None:
            keep_v = seen(per_key((TILE, shape.dim), 0, layout=wgmma))
            values = plgpu.load(v_tile, layout=wgmma)
            v_tile[...] = jnp.where(keep_v, values, jnp.zeros_like(values))

        plgpu.commit_smem()
        # Every warp has read the previous tile, so its slot is free.
        ahead = step + (shape.stages - 1)
        pl.when(ahead < steps)(functools.partial(issue, ahead, pages))
        pages = page_ids(ahead + 1)  # read one tile ahead, so that nothing waits for them
        masks = words(step + 1)
        total = total * lax.broadcast_in_dim(fade, tile_shape, [1]) + p
        kept = kept + jnp.where(keep, 1.0, 0.0)

        def weigh(begin: int, size: int, acc_ref: Any) -> Any:
            v_block = v_tile.at[:, pl.ds(begin, size)]
            plgpu.wgmma(acc_ref, v_block.transpose((1, 0)), p_smem.transpose((1, 0)))
            return acc_ref[...]

        new_acc = []
        for (begin, size), old in zip(shape.d_blocks, acc, strict=True):
            out_shape = (size, shape.heads)
            new = pl.run_scoped(
                functools.partial(weigh, begin, size),
                plgpu.WGMMAAccumulatorRef(out_shape, jnp.float32),
            )
            new_acc.append(old * lax.broadcast_in_dim(fade, out_shape, [1]) + new)
        return pages, masks, new_top, total, kept, tuple(new_acc)

    def full(size: tuple[int, ...], value: float, layout: Any) -> Any:
        return plgpu.layout_cast(jnp.full(size, value, jnp.float32), layout)

    start = (
        page_ids(shape.stages - 1),
        words(0),
        full((shape.heads,), LOWEST, wgmma.reduce(0)),
        full(tile_shape, 0.0, wgmma),
        full(tile_shape, 0.0, wgmma),
        tuple(full((size, shape.heads), 0.0, wgmma) for _, size in shape.d_blocks),
    )
    _, _, top, total, kept, acc = lax.fori_loop(0, steps, visit, start)
    for ref, value in (
        (top_ref, top),
        (total_ref, total.sum(axis=0)),
        (kept_ref, kept.sum(axis=0)),
    ):
        mosaic.store_part(ref.at[row, split], value)
    for (begin, size), block in zip(shape.d_blocks, acc, strict=True):
        mosaic.store_part(acc_ref.at[row, split, pl.ds(begin, size)], block)
