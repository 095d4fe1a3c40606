"""Prefill attention over pages, for Hopper.

One CTA handles 128 queries of one head with three warpgroups: two compute, for 64 queries each, and
one copies keys and values. A tile of keys is 128 (or 64) tokens, gathered from several pages by one
TMA copy per page; one barrier counts them all.

    pages in GMEM    [Z,D] [Z,D] [Z,D] ...           q [64,D]   q [64,D]
                       |     |     |                    |          |
    warpgroup 2        v     v     v   TMA, `stages`    |          |
    SMEM             k[slot] [keys,D]  tiles ahead   ---+----------+--- S = q k'   wgmma
                     v[slot] [keys,D]                   |          |    softmax    registers
                                                     ---+----------+--- O += P v   wgmma
    warpgroups 0 and 1 work independently; a slot is free once both have arrived at its barrier

For each tile a compute warpgroup multiplies, masks (only if the tile reaches the position of a
query or the end of the chunk), and takes the maximum of each row. With `beta`, the tile is skipped
if every row's maximum is below that row's running maximum - beta: then neither the exponentials nor
P v are computed. Its values are copied anyway, since the other warpgroup may need them.

Slots past the end of a sequence may hold anything, even NaN. So the last page, if it is not full,
is read from `tail`, a copy by XLA that has zeros there. Where a tile continues past that page, the
same copy is read again: those keys have no weight, whatever they are.

P goes through SMEM because the simulator does not support a register operand of wgmma, and what
runs should be what was proven. `Tuning(p_in_registers=True)` avoids this step; use it on a device
where its results have been checked.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from alaya_jax.pallas_kernels import mosaic
from alaya_jax.pallas_kernels.block_sparse_prefill.layout import (
    QUERY_BLOCK,
    ROWS,
    Lists,
    Prefill,
    pad_queries,
)
from alaya_jax.pallas_kernels.dispatch import Target

_LOW = float(jnp.finfo(jnp.float32).min)  # a running maximum below every score, but finite
_COMPUTE = 2  # warpgroups
_SWIZZLE = 128  # bytes: a row of 64 two-byte numbers


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Choices that may differ between devices. They change results by rounding at most.

    Attributes:
      stages: tiles of keys and values in SMEM at once.
      p_in_registers: pass P to wgmma in registers, not through SMEM.
    """

    stages: int = 2
    p_in_registers: bool = False


def tuning_of(head_dim: int) -> Tuning:
    """As many stages of 128-key tiles as fit in shared memory."""
    return Tuning(stages=2 if head_dim > 64 else 4)


def prefill(
    q: Float[Array, "B T H D"],
    k_pages: Float[Array, "K P Z D"],
    v_pages: Float[Array, "K P Z D"],
    pages: Int[Array, "B N"],
    lengths: Int[Array, " B"],
    count: Int[Array, " B"],
    *,
    lists: Lists | None,
    beta: Float[Array, " H"] | None,
    block_kv: int,
    scale: float,
    target: Target,
    tuning: Tuning | None = None,
) -> Prefill:
    """As `block_sparse_prefill`."""
    tokens = q.shape[1]
    q = pad_queries(q)
    batch, padded, heads, dim = q.shape
    kv_heads, _, page, _ = k_pages.shape
    tuning = tuning or tuning_of(dim)
    shape = _Shape(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_blocks=padded // QUERY_BLOCK,
        dim=dim,
        page=page,
        block_kv=block_kv,
        stages=tuning.stages,
        p_in_smem=target.interpret or not tuning.p_in_registers,
        dtype=q.dtype,
        scale=scale,
    )
    whole, tail_k, tail_v = _tails(k_pages, v_pages, pages, lengths + count)
    given = _Given(q, k_pages, v_pages, tail_k, tail_v, pages, lengths, count, whole, beta, lists)
    out, lse, skipped = _kernel(shape, target)(given)
    used = -(-tokens // ROWS)
    return Prefill(out[:, :tokens], lse[..., :tokens], skipped[..., :used])


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The static sizes that the kernel is compiled for."""

    batch: int
    heads: int
    kv_heads: int
    q_blocks: int
    dim: int
    page: int
    block_kv: int
    stages: int
    p_in_smem: bool
    dtype: Any
    scale: float

    @property
    def tile_pages(self) -> int:
        """Pages per tile of keys."""
        return self.block_kv // self.page

    @property
    def to_log2(self) -> float:
        """Factor from a raw score to an exponent of 2."""
        return self.scale * math.log2(math.e)


class _Given(NamedTuple):
    """The kernel's inputs in GMEM; `beta` and `lists` may be None."""

    q: Any
    k: Any
    v: Any
    tail_k: Any
    tail_v: Any
    pages: Any
    lengths: Any
    count: Any
    whole: Any
    beta: Any
    lists: Any


class _Made(NamedTuple):
    """The kernel's outputs in GMEM."""

    out: Any
    lse: Any
    skipped: Any


class _Scratch(NamedTuple):
    """SMEM and the barriers that guard it. A slot of `k` and `v` holds one tile of keys."""

    q: Any
    k: Any
    v: Any
    lse: Any
    wanted: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    p: Any  # None: P stays in registers


def _scratch(shape: _Shape) -> _Scratch:
    tiled = mosaic.swizzled(_SWIZZLE, 2)

    def smem(*size: int) -> Any:
        return plgpu.SMEM(size, shape.dtype, transforms=tiled)

    tiles = smem(shape.stages, shape.block_kv, shape.dim)
    of_rows = plgpu.SMEM((_COMPUTE, ROWS), jnp.float32)
    ready = plgpu.Barrier(num_arrivals=shape.tile_pages, num_barriers=shape.stages)
    free = plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=shape.stages)
    return _Scratch(
        q=smem(_COMPUTE, ROWS, shape.dim),
        k=tiles,
        v=tiles,
        lse=of_rows,
        wanted=of_rows,
        q_ready=plgpu.Barrier(num_barriers=_COMPUTE),
        k_ready=ready,
        v_ready=ready,
        k_free=free,
        v_free=free,
        p=smem(_COMPUTE, ROWS, shape.block_kv) if shape.p_in_smem else None,
    )


def _kernel(shape: _Shape, target: Target) -> Any:
    padded = shape.q_blocks * QUERY_BLOCK
    by_head = (shape.batch, shape.heads)
    return plgpu.kernel(
        functools.partial(_body, shape),
        out_type=(
            jax.ShapeDtypeStruct((shape.batch, padded, shape.heads, shape.dim), shape.dtype),
            jax.ShapeDtypeStruct((*by_head, padded), jnp.float32),
            jax.ShapeDtypeStruct((*by_head, padded // ROWS), jnp.int32),
        ),
        scratch_types=[_scratch(shape)],
        grid=(shape.heads, shape.q_blocks, shape.batch),
        grid_names=("head", "block", "batch"),
        num_threads=_COMPUTE + 1,
        thread_name="wg",
        kernel_name="block_sparse_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=mosaic.interpret(target),
    )


def _body(
    shape: _Shape, given: _Given, out: Any, lse: Any, skipped: Any, scratch: _Scratch
) -> None:
    head = lax.axis_index("head")
    block = shape.q_blocks - 1 - lax.axis_index("block")  # longest blocks first
    b = lax.axis_index("batch")
    wg = lax.axis_index("wg")
    cta = _of_block(shape, given, head, block, b)
    pl.when(wg < _COMPUTE)(lambda: _compute(cta, given, _Made(out, lse, skipped), scratch, wg))
    pl.when(wg == _COMPUTE)(lambda: _load(cta, given, scratch))


@dataclasses.dataclass(frozen=True)
class _Cta:
    """The work of one CTA: a block of queries of one head, and the tiles of keys that it visits.

    Attributes:
      b, head, kv_head, block: which block of queries.
      length, new: tokens of the sequence before the chunk, and in the chunk.
      start: the block's first query, counted from the start of the chunk.
      tiles: how many tiles it visits; `tile_at` says which.
      always: how many of them, at the front, are never skipped.
    """

    shape: _Shape
    b: Any
    head: Any
    kv_head: Any
    block: Any
    length: Any
    new: Any
    start: Any
    tiles: Any
    always: Any
    tile_at: Callable[[Any], Any]

    def slot(self, i: Any) -> Any:
        """The slot of SMEM that holds the tile of visit i."""
        return lax.rem(i, jnp.int32(self.shape.stages))


def _of_block(shape: _Shape, given: _Given, head: Any, block: Any, b: Any) -> _Cta:
    kv_head = lax.div(head, jnp.int32(shape.heads // shape.kv_heads))
    length, new = given.lengths[b], given.count[b]
    start = block * QUERY_BLOCK
    # Visit the tiles that some query of the block may see, from the last to the first: the queries'
    # own neighbourhood gives a running maximum that later tiles are compared with.
    last = length + jnp.minimum(start + QUERY_BLOCK, new) - 1
    visible = jnp.where(start < new, lax.div(last, jnp.int32(shape.block_kv)) + 1, 0)
    lists = given.lists
    if lists is None:
        tiles, always = visible, 0

        def tile_at(i: Any) -> Any:
            return visible - 1 - i
    else:
        of_list = head if lists.blocks.shape[1] == shape.heads else kv_head
        tiles = jnp.where(start < new, lists.count[b, of_list, block], 0)
        always = lists.kept[b, of_list, block]

        def tile_at(i: Any) -> Any:
            return lists.blocks[b, of_list, block, i]

    return _Cta(shape, b, head, kv_head, block, length, new, start, tiles, always, tile_at)


def _load(cta: _Cta, given: _Given, scratch: _Scratch) -> None:
    """The warpgroup that copies, `stages` tiles ahead of those that compute."""
    plgpu.set_max_registers(24, action="decrease")
    shape = cta.shape
    full = given.whole[cta.b]  # full pages; the one after them is the tail

    def bring(pool: Any, tail: Any, tile: Any, smem: Any, ready: Any) -> None:
        for j in range(shape.tile_pages):
            n = tile * shape.tile_pages + j
            to = smem.at[pl.ds(j * shape.page, shape.page)]

            @pl.when(n < full)
            def _(n: Any = n, to: Any = to) -> None:
                mosaic.bring(pool.at[cta.kv_head, given.pages[cta.b, n]], to, ready)

            @pl.when(n >= full)
            def _(to: Any = to) -> None:
                mosaic.bring(tail.at[cta.kv_head, cta.b], to, ready)

    @pl.loop(0, cta.tiles)
    def _step(i: Any) -> None:
        slot, tile = cta.slot(i), cta.tile_at(i)
        for pool, tail, smem, ready, free in (
            (given.k, given.tail_k, scratch.k, scratch.k_ready, scratch.k_free),
            (given.v, given.tail_v, scratch.v, scratch.v_ready, scratch.v_free),
        ):
            pl.when(i >= shape.stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            bring(pool, tail, tile, smem.at[slot], ready.at[slot])

    # Whoever waits at a barrier must not miss any of its phases.
    @pl.loop(jnp.maximum(cta.tiles - shape.stages, 0), cta.tiles)
    def _drain(i: Any) -> None:
        slot = cta.slot(i)
        plgpu.barrier_wait(scratch.k_free.at[slot])
        plgpu.barrier_wait(scratch.v_free.at[slot])


def _compute(cta: _Cta, given: _Given, made: _Made, scratch: _Scratch, wg: Any) -> None:
    """A warpgroup that computes attention of its 64 queries over all tiles."""
    plgpu.set_max_registers(240, action="increase")
    shape = cta.shape
    first = cta.start + wg * ROWS  # the warpgroup's first query
    queries = (cta.b, pl.ds(first, ROWS), cta.head)
    q = scratch.q.at[wg]
    mosaic.bring(given.q.at[*queries], q, scratch.q_ready.at[wg])
    plgpu.barrier_wait(scratch.q_ready.at[wg])
    p = None if scratch.p is None else scratch.p.at[wg]

    def step(i: Any, carry: Any) -> Any:
        *running, skipped = carry
        slot, tile = cta.slot(i), cta.tile_at(i)
        plgpu.barrier_wait(scratch.k_ready.at[slot])
        s = _product(q, scratch.k.at[slot].transpose((1, 0)), (ROWS, shape.block_kv))
        plgpu.barrier_arrive(scratch.k_free.at[slot])
        ragged = (tile + 1) * shape.block_kv > cta.length + first + 1
        ragged = ragged | (first + ROWS > cta.new)
        s = lax.cond(ragged, functools.partial(_masked, cta, first, tile), lambda s: s, s)
        tile_top = s.max(axis=1)
        v_ready, v = scratch.v_ready.at[slot], scratch.v.at[slot]

        def attend(*running: Any) -> Any:
            return _fold(shape, running, s, tile_top, p, v_ready, v)

        def skip(*running: Any) -> Any:
            plgpu.barrier_wait(v_ready)
            return running

        if given.beta is None:
            running = attend(*running)
        else:
            near = tile_top >= running[0] - given.beta[cta.head]
            wanted = _any_row(near, scratch.wanted.at[wg])
            keep = ragged | (i < cta.always) | wanted
            running = lax.cond(keep, attend, skip, *running)
            skipped += jnp.where(keep, 0, 1)
        plgpu.barrier_arrive(scratch.v_free.at[slot])
        return *running, skipped

    start = (*_nothing(shape), jnp.int32(0))
    *running, skipped = lax.fori_loop(0, cta.tiles, step, start)
    out, lse = _finish(shape, *running)
    q[...] = out.astype(shape.dtype)
    scratch.lse.at[wg][...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, made.out.at[*queries])
    rows = made.lse.at[cta.b, cta.head, pl.ds(first, ROWS)]
    plgpu.copy_smem_to_gmem(scratch.lse.at[wg], rows)
    made.skipped[cta.b, cta.head, cta.block * _COMPUTE + wg] = skipped
    plgpu.wait_smem_to_gmem(0)


def _product(left: Any, right: Any, size: tuple[int, int]) -> Any:
    """A product by wgmma, accumulated in float32 registers."""

    def multiply(ref: Any) -> Any:
        plgpu.wgmma(ref, left, right)
        return ref[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(size, jnp.float32))


def _masked(cta: _Cta, first: Any, tile: Any, s: Any) -> Any:
    """Masks the scores of a tile that reaches a query's own position or the chunk's end."""

    def iota(axis: int) -> Any:
        return plgpu.broadcasted_iota(jnp.int32, s.shape, axis, layout=plgpu.Layout.WGMMA)

    row, key = first + iota(0), tile * cta.shape.block_kv + iota(1)
    return jnp.where((key <= cta.length + row) & (row < cta.new), s, -jnp.inf)


def _any_row(wanted: Any, smem: Any) -> Any:
    """Whether a condition holds for any row of the warpgroup.

    The maximum over warps goes through SMEM that belongs to this warpgroup, because the scratch
    space that the compiler would use is shared by both. Each warp reads all rows.
    """
    smem[...] = jnp.where(wanted, 1.0, 0.0)
    return jnp.max(plgpu.load(smem, layout=plgpu.Layout.WGMMA.reduce(0))) > 0


def _nothing(shape: _Shape) -> tuple[Any, Any, Any]:
    """The state before the first key: running maximum, sum of exponentials, sum of values."""
    wgmma = plgpu.Layout.WGMMA

    def full(size: tuple[int, ...], value: float, layout: Any) -> Any:
        return plgpu.layout_cast(jnp.full(size, value, jnp.float32), layout)

    row = wgmma.reduce(1)
    return (
        full((ROWS,), _LOW, row),
        full((ROWS,), 0.0, row),
        full((ROWS, shape.dim), 0.0, wgmma),
    )


def _fold(
    shape: _Shape, running: Any, s: Any, tile_top: Any, p_smem: Any, v_ready: Any, v: Any
) -> tuple[Any, Any, Any]:
    """One step of the online softmax: adds a tile's scores, and its values once they arrive."""
    top, total, acc = running
    new_top = jnp.maximum(top, tile_top)
    fade = jnp.exp2((top - new_top) * shape.to_log2)
    # Rows that have met no key yet get p = exp2(-inf) = 0.
    p = jnp.exp2((s - _over_columns(new_top, s.shape)) * shape.to_log2)
    total = total * fade + p.sum(axis=1)
    p = p.astype(shape.dtype)
    if p_smem is not None:
        p_smem[...] = p
        plgpu.commit_smem()
        p = p_smem
    plgpu.barrier_wait(v_ready)
    pv = _product(p, v, (ROWS, shape.dim))
    return new_top, total, acc * _over_columns(fade, acc.shape) + pv


def _finish(shape: _Shape, top: Any, total: Any, acc: Any) -> tuple[Any, Any]:
    """The attention and its log-sum-exp; 0 and -inf for rows without a key."""
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, top * shape.scale + jnp.log(total), -jnp.inf)
    return acc / _over_columns(total, acc.shape), lse


def _over_columns(x: Any, size: tuple[int, ...]) -> Any:
    return lax.broadcast_in_dim(x, size, [0])


@functools.partial(jax.jit, inline=True)
def _tails(k_pages, v_pages, pages, length):
    """How many full pages each sequence has, and the keys and values of the page after them.

    Returns:
      int32 [B]; keys and values [K, B, Z, D], zero past the end of the sequence.
    """
    page = k_pages.shape[2]
    whole = length // page
    ids = jnp.take_along_axis(pages, whole[:, None], axis=1, mode="clip")[:, 0]
    filled = jnp.arange(page) < (length - whole * page)[:, None]
    return whole, *(
        jnp.where(filled[None, :, :, None], pool[:, ids], 0) for pool in (k_pages, v_pages)
    )
