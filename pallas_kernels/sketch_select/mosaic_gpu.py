"""The scan of a sketch for Hopper: Pallas, Mosaic GPU.

A scan reads much and computes little, so the kernel is about bytes in flight, and about what is
done to a key on its way through shared memory.

    grid: (split of the steps) x kv head x sequence    two compute warpgroups, and one that copies

    A step is 32 pages of 16 tokens of a sequence (a longer page counts as several), 512 keys. The
    compute warpgroups take steps by turns.

    GMEM    codes [16, D/2]  scale, spread [16]  centre [D]         of each page
              |                   TMA: all of a step at once where its pages are neighbours in the
              |                   pool, else page by page; `stages` steps are under way
    SMEM    bytes [512, D/2]
              |                     64 keys at a time:
    regs    byte << 4, byte & 0xf0    16 times the two fields of each byte, signed
              |
    SMEM    int8 2 x [64, D/2]
              |
    wgmma   int32 [64 keys, N heads] = fields x the query's integers    N = 8, G of them used
              |
    regs    estimate = scale * (slope * . + offset) + centre; error; best = max(estimate - error)
              |
    SMEM    upper [8 heads x 32 pages, 16 tokens]      written transposed, so that a page's tokens
              |                                        are a row
    regs    max over each row                  ->      GMEM: 4 bytes a page and head

No score is written to memory. The product of query and centre is a wgmma too, in the query's dtype,
of the step's 32 centres (the other 32 of its rows are not used).
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

from alaya_jax.pallas_kernels.dispatch import Target, not_a_hopper
from alaya_jax.pallas_kernels.sketch_select.request import Bounds, Codes, Query

TOKENS = 16
"""Of a page, as the kernel counts pages."""

PAGES = 64
"""Of a step: the rows of one wgmma."""

HEAD_DIMS = (64, 128)
PAGE_SIZES = (16, 32, 64, 128)
_LOG2_E = math.log2(math.e)
_LOWEST = float(jnp.finfo(jnp.float32).min)


_KEYS = TOKENS * PAGES
_HEADS = 8  # columns of wgmma, at least
_COMPUTE = 2  # warpgroups
_PAD = 16  # bytes between the pages in shared memory, so that they begin in different banks


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may differ between devices; nothing of it changes the result beyond rounding.

    Attributes:
      stages: steps in shared memory.
      blocks: blocks that the device holds at a time; one for each multiprocessor of an H100.
    """

    stages: int = 2
    blocks: int = 132


def unfit(target: Target, query: Query, keys: Codes, *_: Any, **__: Any) -> str | None:
    """Why this kernel cannot run a call; None if it can."""
    if (why := not_a_hopper(target)) is not None:
        return why
    if query.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries are {query.q.dtype}; needs bfloat16 or float16"
    if query.q.shape[2] not in HEAD_DIMS:
        return f"head_dim is {query.q.shape[2]}; needs one of {HEAD_DIMS}"
    if keys.codes.shape[2] not in PAGE_SIZES:
        return f"the page size is {keys.codes.shape[2]} tokens; needs one of {PAGE_SIZES}"
    if keys.codes.shape[1] * keys.codes.shape[2] < _KEYS:
        return f"the pool has {keys.codes.shape[1]} pages; needs at least {_KEYS} tokens"
    if query.q.shape[1] > _HEADS * keys.codes.shape[0]:
        return f"{query.q.shape[1] // keys.codes.shape[0]} heads a kv head; needs at most {_HEADS}"
    return None


def bounds(
    query: Query,
    keys: Codes,
    pages: Int[Array, "B N"],
    low: Int[Array, " B"],
    high: Int[Array, " B"],
    *,
    scale: float | None,
    target: Target,
    tuning: Tuning = Tuning(),
) -> Bounds:
    """See `Bounds`."""
    batch, n = pages.shape
    kv_heads, pool, size, half = keys.codes.shape
    dim, dtype = 2 * half, query.q.dtype
    group = query.q.shape[1] // kv_heads
    repeats = size // TOKENS  # pages of the kernel in a page
    steps = -(-n * repeats // PAGES)
    stages = tuning.stages
    splits = max(1, min(tuning.blocks // (batch * kv_heads), steps))

    def padded(x: Array) -> Array:  # [B, H, ...] -> [B, K, 8, ...]
        x = x.reshape(batch, kv_heads, group, *x.shape[2:])
        return jnp.pad(x, ((0, 0), (0, 0), (0, _HEADS - group)) + ((0, 0),) * (x.ndim - 3))

    total = jnp.sum(query.integers, axis=-1, dtype=jnp.int32).astype(jnp.float32)
    factors = jnp.stack(
        [
            padded(x)
            # The products are of 16 times the fields, and a level is 2 fields + 1.
            for x in (query.step / 8, query.step * total, query.of_spread, query.of_scale)
        ],
        axis=2,
    )
    integers = padded(query.integers)
    # The kernel's pages: each of ours is some of its.
    table = jnp.pad(pages, ((0, 0), (0, -n % (PAGES // repeats))))
    some = jnp.arange(table.shape[1]) * size < high[:, None]
    table = jnp.where(some, table, table[:, :1])
    ids = (table[..., None] * repeats + jnp.arange(repeats)).reshape(batch, -1)
    runs = _runs(ids, jnp.repeat(some, repeats, axis=1), pool * repeats)
    unit = jnp.moveaxis(keys.unit.at[:, table].get(mode="clip"), 0, 1)
    unit = jnp.repeat(unit.astype(jnp.float32), repeats, axis=-1)

    kernel = functools.partial(
        _kernel,
        _Shape(
            splits,
            stages,
            repeats,
            dim,
            dtype,
            None if scale is None else scale * _LOG2_E,
        ),
    )
    out_type = [
        jax.ShapeDtypeStruct((batch, kv_heads, steps * PAGES, _HEADS), jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads, splits, PAGES, _HEADS), jnp.float32),
    ]
    upper, best, *lse = plgpu.kernel(
        kernel,
        out_type=out_type + ([] if scale is None else out_type[:1]),
        scratch_types=_scratch(stages, half, repeats, dtype),
        grid=(splits, kv_heads, batch),
        grid_names=("split", "head", "batch"),
        num_threads=_COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if target.interpret else None,
    )(
        padded(query.q),
        integers[..., :half],
        integers[..., half:],
        factors,
        lax.bitcast_convert_type(keys.codes, jnp.int8).reshape(
            kv_heads, pool * repeats, TOKENS * half
        ),
        keys.scale.reshape(kv_heads, pool * repeats, TOKENS),
        keys.spread.reshape(kv_heads, pool * repeats, TOKENS),
        keys.centre,
        unit,
        ids,
        runs,
        low,
        high,
    )

    def of_pages(x: Array) -> Float[Array, "B K N M G"]:
        return x.reshape(batch, kv_heads, -1, repeats, _HEADS)[:, :, :n, :, :group]

    return Bounds(
        upper=jnp.max(of_pages(upper), axis=3),
        best=jnp.max(best, axis=(2, 3))[..., :group],
        lse=jax.nn.logsumexp(of_pages(lse[0]), axis=3) if lse else None,
    )


def _runs(ids: Int[Array, "B M"], some: Bool[Array, "B M"], pool: int) -> Int[Array, "B C"]:
    """1 where the pages of a step, as far as there are some, are neighbours in the pool."""
    steps = (ids.shape[0], -1, PAGES)
    ids = ids.reshape(steps)
    begin = ids[..., 0]
    run = jnp.all((ids == begin[..., None] + jnp.arange(PAGES)) | ~some.reshape(steps), axis=-1)
    return (run & (begin >= 0) & (begin <= pool - PAGES)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the kernel is compiled for."""

    splits: int
    stages: int
    repeats: int
    dim: int
    dtype: Any
    to_log2: float | None  # of an estimate, if log-sum-exp is wanted


def _scratch(stages: int, half: int, repeats: int, dtype: Any) -> list[Any]:
    """Shared memory and barriers, in the order of `_kernel`'s arguments."""

    def tiled(*shape: int, dtype: Any = jnp.int8) -> Any:  # as wgmma reads it
        itemsize = jnp.dtype(dtype).itemsize
        row = min(128, shape[-1] * itemsize)
        tiling = plgpu.TilingTransform((8, row // itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(row)))

    bounds = plgpu.SMEM((PAGES, _HEADS), jnp.float32)
    run_copies = PAGES + 4 if repeats == 1 else 2 * PAGES + 3
    return [
        tiled(_HEADS, 2 * half, dtype=dtype),
        tiled(_HEADS, half),
        tiled(_HEADS, half),
        plgpu.SMEM((4, _HEADS), jnp.float32),
        plgpu.SMEM((stages, PAGES, TOKENS * half + _PAD), jnp.int8),
        plgpu.SMEM((stages, PAGES, TOKENS), jnp.float16),
        plgpu.SMEM((stages, PAGES, TOKENS), jnp.float16),
        plgpu.SMEM((stages, PAGES, 2 * half), jnp.int8),
        plgpu.SMEM((stages, PAGES), jnp.float32),
        tiled(_COMPUTE, PAGES, half),
        tiled(_COMPUTE, PAGES, half),
        tiled(PAGES, 2 * half, dtype=dtype),
        [bounds] * 4,
        plgpu.Barrier(num_arrivals=4),
        plgpu.Barrier(num_arrivals=run_copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=4 * PAGES + 1, num_barriers=stages),
        plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=stages),
        plgpu.Barrier(num_barriers=2),
    ]


def _kernel(shape: _Shape, *refs: Any) -> None:
    (q_ref, integer_low_ref, integer_high_ref, factor_ref, code_ref, scale_ref, spread_ref,
     centre_ref, unit_ref, id_ref, run_ref, low_ref, high_ref, *refs) = refs  # fmt: skip
    outs, refs = (refs[:2], refs[2:]) if shape.to_log2 is None else (refs[:3], refs[3:])
    (q_smem, integer_low, integer_high, factor_smem, code_smem, scale_smem, spread_smem,
     centre_smem, unit_smem, low_smem, high_smem, wide_smem, bound_smem,
     query_ready, run_ready, page_ready, free, handed) = refs  # fmt: skip
    split = lax.axis_index("split")
    k = lax.axis_index("head")
    b = lax.axis_index("batch")
    wg = lax.axis_index("wg")
    low, high = low_ref[b], high_ref[b]
    begin = lax.div(low, jnp.int32(_KEYS))
    end = jnp.where(low < high, lax.div(high - 1, jnp.int32(_KEYS)) + 1, begin)
    # Of the steps between begin and end, one in `splits` is this block's.
    mine = lax.div(jnp.maximum(end - begin - split, 0) + shape.splits - 1, jnp.int32(shape.splits))

    def step_at(i: Any) -> Any:
        return begin + split + i * shape.splits

    def slot_at(i: Any) -> Any:
        return lax.rem(i, jnp.int32(shape.stages))

    @pl.when(wg < _COMPUTE)
    def _compute() -> None:
        @pl.when(wg == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(q_ref.at[b, k], q_smem, query_ready)
            plgpu.copy_gmem_to_smem(integer_low_ref.at[b, k], integer_low, query_ready)
            plgpu.copy_gmem_to_smem(integer_high_ref.at[b, k], integer_high, query_ready)
            plgpu.copy_gmem_to_smem(factor_ref.at[b, k], factor_smem, query_ready)

        plgpu.barrier_wait(query_ready)
        tile = (PAGES, _HEADS)
        layout = plgpu.Layout.WGMMA
        of_page, of_head = layout.reduce(1), layout.reduce(0)

        def load(ref: Any, layout: Any) -> Any:
            return plgpu.load(ref, layout=layout, optimized=False)

        def wide(x: Any, axis: int) -> Any:
            return lax.broadcast_in_dim(x, tile, [axis])

        def everywhere(x: float) -> Any:
            return plgpu.layout_cast(jnp.full(tile, x, jnp.float32), layout)

        def product(dtype: Any, *pairs: Any) -> Any:
            def run(ref: Any) -> Any:
                for left, right in pairs:
                    plgpu.wgmma(ref, left, right.transpose((1, 0)))
                return ref[...]

            return pl.run_scoped(run, plgpu.ACC(tile, dtype))

        slope, offset, of_spread, of_scale = (
            wide(load(factor_smem.at[i], of_head), 1) for i in range(4)
        )
        page = plgpu.broadcasted_iota(jnp.int32, tile, 0, layout=layout)
        half = shape.dim // 2
        fields = (low_smem.at[wg], high_smem.at[wg])

        def visit(i: Any, best: Any) -> Any:
            slot, step = slot_at(i), step_at(i)
            run = run_ref[b, step] == 1
            pl.when(run)(lambda: plgpu.barrier_wait(run_ready.at[slot]))
            pl.when(jnp.logical_not(run))(lambda: plgpu.barrier_wait(page_ready.at[slot]))
            first = (step * PAGES + page) * TOKENS  # position of each page's first token

            def token(j: Any, bounds: Any) -> Any:
                upper, lower, top, mass = bounds
                z = j * _COMPUTE + wg
                at = pl.ds(pl.multiple_of(z * half, half), half)
                byte = load(code_smem.at[slot, :, at], plgpu.Layout.WGMMA_8BIT)
                fields[0][...] = byte << 4
                fields[1][...] = byte & -16
                plgpu.commit_smem()
                inner = product(jnp.int32, (fields[0], integer_low), (fields[1], integer_high))
                scale, spread = (
                    wide(load(x.at[slot, :, z], of_page).astype(jnp.float32), 0)
                    for x in (scale_smem, spread_smem)
                )
                estimate = scale * (slope * inner.astype(jnp.float32) + offset)
                error = jnp.where(of_spread > 0, of_spread * spread, 0.0) + of_scale * scale
                seen = (first + z >= low) & (first + z < high)
                upper = jnp.maximum(upper, jnp.where(seen, estimate + error, -jnp.inf))
                lower = jnp.maximum(lower, jnp.where(seen, estimate - error, -jnp.inf))
                if shape.to_log2 is not None:
                    scaled = jnp.where(seen, estimate * shape.to_log2, -jnp.inf)
                    new_top = jnp.maximum(top, scaled)
                    mass = mass * jnp.exp2(top - new_top) + jnp.exp2(scaled - new_top)
                    top = new_top
                return upper, lower, top, mass

            start = tuple(map(everywhere, (-jnp.inf, -jnp.inf, _LOWEST, 0.0)))
            bounds = lax.fori_loop(0, TOKENS // _COMPUTE, token, start)
            return finish(i, slot, step, bounds, best)

        def finish(i: Any, slot: Any, step: Any, bounds: Any, best: Any) -> Any:
            """The second warpgroup hands its bounds to the first, which adds the centres."""
            used = bound_smem if shape.to_log2 is not None else bound_smem[:2]

            def hand_over(best: Any) -> Any:
                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_wait(handed.at[1])

                for ref, x in zip(used, bounds, strict=False):
                    ref[...] = x
                plgpu.barrier_arrive(handed.at[0])
                plgpu.barrier_arrive(free.at[slot])
                return best

            def take(best: Any) -> Any:
                centre = load(centre_smem.at[slot], plgpu.Layout.WGMMA_8BIT)
                wide_smem[...] = centre.astype(shape.dtype)
                plgpu.commit_smem()
                centre = product(jnp.float32, (wide_smem, q_smem))
                centre *= wide(load(unit_smem.at[slot], of_page), 0)
                plgpu.barrier_arrive(free.at[slot])
                plgpu.barrier_wait(handed.at[0])
                upper, lower, *other = (load(ref, layout) for ref in used)
                rows = pl.ds(step * PAGES, PAGES)
                outs[0][b, k, rows] = jnp.maximum(bounds[0], upper) + centre
                if shape.to_log2 is not None:
                    top = jnp.maximum(bounds[2], other[0])
                    mass = bounds[3] * jnp.exp2(bounds[2] - top) + other[1] * jnp.exp2(
                        other[0] - top
                    )
                    log2 = top + centre * shape.to_log2 + jnp.log2(mass)
                    outs[2][b, k, rows] = log2 * (1 / _LOG2_E)
                plgpu.barrier_arrive(handed.at[1])
                return jnp.maximum(best, jnp.maximum(bounds[1], lower) + centre)

            return lax.cond(wg == 0, take, hand_over, best)

        best = lax.fori_loop(0, mine, visit, everywhere(-jnp.inf))

        @pl.when(wg == 0)
        def _() -> None:
            outs[1][b, k, split] = best

        @pl.when((wg == 1) & (mine > 0))
        def _() -> None:
            plgpu.barrier_wait(handed.at[1])

    @pl.when(wg == _COMPUTE)
    def _copy() -> None:
        def bring(i: Any) -> None:
            step, slot = step_at(i), slot_at(i)
            here = pl.ds(step * PAGES, PAGES)

            def copies(ready: Any, *pairs: Any) -> None:
                for source, target in pairs:
                    plgpu.copy_gmem_to_smem(source, target, ready.at[slot])

            def codes(ready: Any, source: Any, at: Any) -> None:
                bytes_ = pl.ds(0, TOKENS * shape.dim // 2)
                copies(ready, (code_ref.at[k, source], code_smem.at[slot, at, bytes_]))

            def centre(ready: Any, source: Any, at: Any) -> None:
                source = lax.div(source, jnp.int32(shape.repeats))
                copies(ready, (centre_ref.at[k, source], centre_smem.at[slot, at]))

            run = run_ref[b, step] == 1

            @pl.when(run)
            def _run() -> None:
                first = id_ref[b, step * PAGES]
                every = pl.ds(first, PAGES)
                copies(
                    run_ready,
                    (unit_ref.at[b, k, here], unit_smem.at[slot]),
                    (scale_ref.at[k, every], scale_smem.at[slot]),
                    (spread_ref.at[k, every], spread_smem.at[slot]),
                )
                if shape.repeats == 1:
                    copies(run_ready, (centre_ref.at[k, every], centre_smem.at[slot]))

                @pl.loop(0, PAGES)
                def _page(at: Any) -> None:
                    codes(run_ready, first + at, at)
                    if shape.repeats > 1:
                        centre(run_ready, first + at, at)

            @pl.when(jnp.logical_not(run))
            def _page_by_page() -> None:
                copies(page_ready, (unit_ref.at[b, k, here], unit_smem.at[slot]))

                @pl.loop(0, PAGES // 8)
                def _eight(j: Any) -> None:
                    # All eight ids are asked for before the first is needed.
                    some = [j * 8 + at for at in range(8)]
                    for at, page in [(at, id_ref[b, step * PAGES + at]) for at in some]:
                        codes(page_ready, page, at)
                        centre(page_ready, page, at)
                        copies(
                            page_ready,
                            (scale_ref.at[k, page], scale_smem.at[slot, at]),
                            (spread_ref.at[k, page], spread_smem.at[slot, at]),
                        )

        @pl.loop(0, mine)
        def _step(i: Any) -> None:
            @pl.when(i >= shape.stages)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot_at(i)])

            bring(i)

        # Whoever waits at a barrier has to see all its phases.
        @pl.loop(jnp.maximum(mine - shape.stages, 0), mine)
        def _drain(i: Any) -> None:
            plgpu.barrier_wait(free.at[slot_at(i)])
