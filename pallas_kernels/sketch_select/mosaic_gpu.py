"""The scan of a sketch for Hopper: Pallas, Mosaic GPU.

A scan reads much and computes little. So what matters is bytes in flight, and how little is done to
each key on its way through shared memory.

    grid: (split of the steps) x kv head x sequence    two warpgroups compute, one copies

    A step is 512 keys of a sequence: 32 pages of 16 tokens (a longer page counts as several). The
    compute warpgroups take turns.

    GMEM    codes, scale, spread [16]  centre        of each page
              |                   TMA: a whole step at once if its pages are neighbours in the pool.
              |                   Else codes are copied page by page; the rest, of which a page has
              |                   less than TMA can place, comes from a copy by XLA in the order of
              |                   the sequence. `stages` steps are in flight
    SMEM    codes of 512 keys
              |                     64 keys at a time, as their layout has it (mosaic_layouts.py)
    wgmma   int32 [64 keys, N heads] = codes x the query's integers    N = 8, G of them used
              |
    regs    estimate = scale * (slope * . + offset) + centre; error; best = max(estimate - error)
              |
    SMEM    upper [8 x 8 heads, 64 keys]      read transposed: 16 columns are a page
              |
    regs    max over each page             ->      GMEM: 4 bytes per page and head

No score is written to memory. The products of the query with the 32 centres of a step are a wgmma
too, in the query's dtype (32 of its 64 rows are unused).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.pallas_kernels import mosaic
from alaya_jax.pallas_kernels.dispatch import Target
from alaya_jax.pallas_kernels.sketch_select.mosaic_layouts import (
    COMPUTE,
    HEADS,
    KEYS,
    ROWS,
    TOKENS,
    Fields,
    Words,
    layout_of,
    product,
    tiled,
)
from alaya_jax.pallas_kernels.sketch_select.request import Bounds, Codes, Query, Signs

PAGES = KEYS // TOKENS
"""Pages per step, as the kernel counts them."""

_LOG2_E = math.log2(math.e)
_LOWEST = float(jnp.finfo(jnp.float32).min)


_BOX = 16  # pages per copy at most: 256 rows


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Choices that may differ between devices. They change results by rounding at most.

    Attributes:
      stages: steps in shared memory at once.
      blocks: blocks that the device holds at once; one per multiprocessor on an H100.
    """

    stages: int = 3
    blocks: int = 132


def bounds(
    query: Query,
    keys: Codes | Signs,
    pages: Int[Array, "B N"],
    low: Int[Array, " B"],
    high: Int[Array, " B"],
    *,
    scale: float | None,
    target: Target,
    tuning: Tuning | None = None,
) -> Bounds:
    """Computes `Bounds`."""
    batch, n = pages.shape
    kv_heads, pool, size = keys.scale.shape
    layout, dtype = layout_of(keys), query.q.dtype
    group = query.q.shape[1] // kv_heads
    repeats = size // TOKENS  # pages of the kernel per page
    steps = -(-n * repeats // PAGES)
    # Log-sum-exp needs a second buffer of estimates, which takes the room of one stage of large
    # codes.
    large = isinstance(layout, Fields) and layout.dim > 64
    tuning = tuning or Tuning(stages=2 if scale is not None and large else 3)
    stages = tuning.stages
    splits = max(1, min(tuning.blocks // (batch * kv_heads), -(-steps // COMPUTE)))

    def padded(x: Array) -> Array:  # [B, H, ...] -> [B, K, 8, ...]
        x = x.reshape(batch, kv_heads, group, *x.shape[2:])
        return jnp.pad(x, ((0, 0), (0, 0), (0, HEADS - group)) + ((0, 0),) * (x.ndim - 3))

    given = layout.operands(query, keys)
    factors = (given.slope, given.offset, query.of_spread, query.of_scale)
    factors = jnp.stack([padded(x) for x in factors], axis=2)
    flat = (kv_heads, pool * size)
    # First row of each of the kernel's pages in the pool of rows, and the factor of its centre.
    table = jnp.pad(pages, ((0, 0), (0, -n % (PAGES // repeats))))
    some = jnp.arange(table.shape[1]) * size < high[:, None]
    table = jnp.where(some, table, table[:, :1])
    first_row = table[..., None] * size + jnp.arange(repeats) * TOKENS
    first_row = first_row.reshape(batch, -1)
    runs = _runs(first_row, jnp.repeat(some, repeats, axis=1), flat[1])

    def in_order(x: Array, ids: Array) -> Array:  # [K, P, ...] -> [B, K, M, ...]
        return jnp.moveaxis(x.at[:, ids].get(mode="clip"), 0, 1)

    unit = jnp.repeat(in_order(keys.unit, table).astype(jnp.float32), repeats, axis=2)
    # A run reads these from the pool, so any page will do here, and one page is quickest.
    of_run = jnp.repeat(runs == 1, PAGES // repeats, axis=1)
    loose = jnp.where(of_run, 0, table)
    scales, spreads = (
        in_order(x, loose).reshape(batch, kv_heads, -1) for x in (keys.scale, keys.spread)
    )
    centre_pool = lax.bitcast_convert_type(keys.centre, jnp.int8)
    centres = jnp.repeat(in_order(centre_pool, loose if repeats == 1 else table), repeats, axis=2)
    codes = [given.codes] + ([in_order(given.codes, loose)] if layout.small else [])

    kernel = functools.partial(
        _kernel,
        _Shape(
            splits,
            stages,
            repeats,
            layout,
            dtype,
            None if scale is None else scale * _LOG2_E,
            target.interpret,
        ),
    )
    out_type = [
        jax.ShapeDtypeStruct((batch, kv_heads, steps, ROWS // TOKENS, ROWS), jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads, splits, COMPUTE, ROWS, HEADS), jnp.float32),
    ]
    upper, best, *lse = plgpu.kernel(
        kernel,
        out_type=out_type + ([] if scale is None else out_type[:1]),
        scratch_types=_scratch(layout, stages, dtype, scale is not None),
        grid=(splits, kv_heads, batch),
        grid_names=("split", "head", "batch"),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        kernel_name="sketch_select",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=mosaic.interpret(target),
    )(
        padded(given.q),
        [padded(x) for x in given.integers],
        factors,
        codes,
        keys.scale.reshape(flat),
        keys.spread.reshape(flat),
        centre_pool,
        scales,
        spreads,
        centres,
        unit,
        first_row,
        runs,
        low,
        high,
    )

    def of_pages(x: Array) -> Float[Array, "B K N M G"]:
        x = x.reshape(batch, kv_heads, steps, ROWS // TOKENS, KEYS // ROWS, HEADS)
        x = jnp.moveaxis(x, 3, 4).reshape(batch, kv_heads, -1, repeats, HEADS)
        return x[:, :, :n, :, :group]

    return Bounds(
        upper=jnp.max(of_pages(upper), axis=3),
        best=jnp.max(best, axis=(2, 3, 4))[..., :group],
        lse=jax.nn.logsumexp(of_pages(lse[0]), axis=3) if lse else None,
    )


def _runs(first_row: Int[Array, "B M"], some: Bool[Array, "B M"], rows: int) -> Int[Array, "B C"]:
    """1 for steps whose pages, as far as they exist, are neighbours in the pool."""
    steps = (first_row.shape[0], -1, PAGES)
    first_row = first_row.reshape(steps)
    begin = first_row[..., 0]
    next_to = first_row == begin[..., None] + TOKENS * jnp.arange(PAGES)
    run = jnp.all(next_to | ~some.reshape(steps), axis=-1)
    return (run & (begin >= 0) & (begin <= rows - KEYS)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The static sizes that the kernel is compiled for."""

    splits: int
    stages: int
    repeats: int
    layout: Fields | Words
    dtype: Any
    to_log2: float | None  # factor from an estimate to an exponent of 2; None: no log-sum-exp
    interpret: bool


def _turns(stages: int) -> int:
    """After how many steps the same warpgroup uses the same slot again.

    A thread knows the phase of a barrier by counting its own waits. So each barrier for arrivals
    belongs to one warpgroup, even if its slot does not.
    """
    return math.lcm(stages, COMPUTE)


def _scratch(layout: Fields | Words, stages: int, dtype: Any, lse: bool) -> list[Any]:
    """Shared memory and barriers, in the order of `_kernel`'s arguments."""

    def columns(*shape: int) -> Any:  # written eight float32 columns at a time
        return plgpu.SMEM(shape, jnp.float32, transforms=mosaic.swizzled(4 * HEADS, 4))

    small = 2 * PAGES // _BOX + 2
    of_pages = 1 if layout.small else layout.page_copies
    return [
        tiled(COMPUTE, HEADS, layout.dim, dtype=dtype, part=layout.centre_part),
        layout.integer_scratch(),
        plgpu.SMEM((COMPUTE, 4, HEADS), jnp.float32),
        layout.scratch(stages),
        plgpu.SMEM((stages, KEYS), jnp.float16),
        plgpu.SMEM((stages, KEYS), jnp.float16),
        plgpu.SMEM((stages, ROWS, layout.centre_bytes), jnp.int8),
        plgpu.SMEM((stages, ROWS), jnp.float32),
        tiled(COMPUTE, ROWS, layout.dim, dtype=dtype, part=layout.centre_part),
        plgpu.SMEM((COMPUTE, ROWS, HEADS), jnp.float32),
        columns(COMPUTE, ROWS, ROWS),
        columns(COMPUTE, ROWS, ROWS if lse else HEADS),
        plgpu.Barrier(num_arrivals=2 + len(layout.integer_scratch()), num_barriers=COMPUTE),
        plgpu.Barrier(num_arrivals=layout.run_copies + small, num_barriers=_turns(stages)),
        plgpu.Barrier(num_arrivals=of_pages + small, num_barriers=_turns(stages)),
        plgpu.Barrier(num_barriers=stages),
    ]


def _kernel(shape: _Shape, *all_refs: Any) -> None:
    (q_ref, integer_refs, factor_ref, code_refs, scale_ref, spread_ref, centre_ref, scales_ref,
     spreads_ref, centres_ref, unit_ref, row_ref, run_ref, low_ref, high_ref,
     *refs) = all_refs  # fmt: skip
    layout = shape.layout
    outs, refs = (refs[:2], refs[2:]) if shape.to_log2 is None else (refs[:3], refs[3:])
    (q_smem, integer_smem, factor_smem, (code_smem, *code_work), scale_smem, spread_smem,
     centre_smem, unit_smem, *work, query_ready, run_ready, page_ready, free) = refs  # fmt: skip
    split = lax.axis_index("split")
    k = lax.axis_index("head")
    b = lax.axis_index("batch")
    wg = lax.axis_index("wg")
    low, high = low_ref[b], high_ref[b]
    begin = lax.div(low, jnp.int32(KEYS))
    end = jnp.where(low < high, lax.div(high - 1, jnp.int32(KEYS)) + 1, begin)
    # One in `splits` of the steps from begin to end belongs to this block.
    mine = lax.div(jnp.maximum(end - begin - split, 0) + shape.splits - 1, jnp.int32(shape.splits))

    def step_at(i: Any) -> Any:
        return begin + split + i * shape.splits

    def arrived(i: Any) -> None:
        turn = lax.rem(i, jnp.int32(_turns(shape.stages)))
        run = run_ref[b, step_at(i)] == 1
        pl.when(run)(lambda: plgpu.barrier_wait(run_ready.at[turn]))
        pl.when(jnp.logical_not(run))(lambda: plgpu.barrier_wait(page_ready.at[turn]))

    @pl.when(wg < COMPUTE)
    def _compute() -> None:
        ready = query_ready.at[wg]
        # Each of the two compute warpgroups has its own copies.
        mosaic.bring(q_ref.at[b, k], q_smem.at[wg], ready)
        for source, to in zip(integer_refs, integer_smem, strict=True):
            mosaic.bring(source.at[b, k], to.at[wg], ready)
        mosaic.bring(factor_ref.at[b, k], factor_smem.at[wg], ready)
        plgpu.barrier_wait(ready)
        query = (q_smem.at[wg], [x.at[wg] for x in integer_smem], factor_smem.at[wg])
        stage = (code_smem, scale_smem, spread_smem, centre_smem, unit_smem)
        steps = _Steps((b, k), low, high, mine, step_at, arrived, free)
        own = ([x.at[wg] for x in code_work], *(x.at[wg] for x in work))
        best = _compute_steps(shape, query, stage, own, outs, steps, wg)
        outs[1][b, k, split, wg] = best

    @pl.when(wg == COMPUTE)
    def _copy() -> None:
        def bring(i: Any) -> None:
            step, slot = step_at(i), lax.rem(i, jnp.int32(shape.stages))
            turn = lax.rem(i, jnp.int32(_turns(shape.stages)))
            here = pl.ds(pl.multiple_of(step * PAGES, PAGES), PAGES)
            boxes = [pl.ds(at * TOKENS, _BOX * TOKENS) for at in range(0, PAGES, _BOX)]
            small = ((scale_smem, scale_ref, scales_ref), (spread_smem, spread_ref, spreads_ref))

            def in_order(ready: Any) -> None:
                """Copies what XLA has put into the order of the sequence."""
                pairs = [(unit_ref, unit_smem)]
                if ready is page_ready or shape.repeats > 1:
                    pairs.append((centres_ref, centre_smem))
                for source, target in pairs:
                    to = target.at[slot, pl.ds(0, PAGES)]
                    mosaic.bring(source.at[b, k, here], to, ready.at[turn])

            run = run_ref[b, step] == 1

            @pl.when(run)
            def _run() -> None:
                ready, first = run_ready.at[turn], row_ref[b, step * PAGES]
                in_order(run_ready)
                layout.bring_run(code_refs[0].at[k], first, code_smem.at[slot], ready)
                for at, to in zip(range(0, PAGES, _BOX), boxes, strict=True):
                    begin = pl.multiple_of(first + at * TOKENS, TOKENS)
                    rows = pl.ds(begin, _BOX * TOKENS)
                    for smem, pool, _ in small:
                        mosaic.bring(pool.at[k, rows], smem.at[slot, to], ready)
                if shape.repeats == 1:
                    pages = pl.ds(lax.div(first, jnp.int32(TOKENS)), PAGES)
                    to = centre_smem.at[slot, pl.ds(0, PAGES)]
                    mosaic.bring(centre_ref.at[k, pages], to, ready)

            @pl.when(jnp.logical_not(run))
            def _page_by_page() -> None:
                ready = page_ready.at[turn]
                # Request all of them before the first is needed.
                of_codes = 0 if layout.small else PAGES
                firsts = [row_ref[b, step * PAGES + at] for at in range(of_codes)]
                in_order(page_ready)
                for at, to in zip(range(0, PAGES, _BOX), boxes, strict=True):
                    begin = pl.multiple_of(step * KEYS + at * TOKENS, TOKENS)
                    rows = pl.ds(begin, _BOX * TOKENS)
                    for smem, _, copy in small:
                        mosaic.bring(copy.at[b, k, rows], smem.at[slot, to], ready)
                if layout.small:
                    layout.bring_run(code_refs[1].at[b, k], step * KEYS, code_smem.at[slot], ready)
                else:
                    layout.bring_pages(code_refs[0].at[k], firsts, code_smem.at[slot], ready)

        @pl.loop(0, mine)
        def _step(i: Any) -> None:
            @pl.when(i >= shape.stages)
            def _() -> None:
                plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(shape.stages))])

            bring(i)

        # Whoever waits at a barrier must not miss any of its phases.
        @pl.loop(jnp.maximum(mine - shape.stages, 0), mine)
        def _drain(i: Any) -> None:
            plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(shape.stages))])


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The steps of one block.

    Attributes:
      where: the sequence and the kv head.
      low, high: the positions in range.
      mine: how many steps this block has.
      step_at: the number of its i-th step.
      arrived: waits until the data of the i-th step is in its slot.
      free: barriers that signal that a slot has been read.
    """

    where: tuple[Any, Any]
    low: Any
    high: Any
    mine: Any
    step_at: Callable[[Any], Any]
    arrived: Callable[[Any], None]
    free: Any


def _compute_steps(
    shape: _Shape, query: Any, stage: Any, work: Any, outs: Any, steps: _Steps, wg: Any
) -> Array:
    """Runs the steps of a compute warpgroup; returns the best score of each row and head."""
    q_smem, integer_smem, factor_smem = query
    code_smem, scale_smem, spread_smem, centre_smem, unit_smem = stage
    code_work, wide_smem, score_smem, upper_smem, estimate_smem = work
    low, high, where = steps.low, steps.high, steps.where
    tile = (ROWS, HEADS)
    layout = plgpu.Layout.WGMMA
    of_key, of_head = layout.reduce(1), layout.reduce(0)

    def load(ref: Any, layout: Any) -> Any:
        return plgpu.load(ref, layout=layout, optimized=False)

    def wide(x: Any, axis: int) -> Any:
        return lax.broadcast_in_dim(x, tile, [axis])

    slope, offset, of_spread, of_scale = (
        wide(load(factor_smem.at[i], of_head), 1) for i in range(4)
    )
    row = plgpu.broadcasted_iota(jnp.int32, tile, 0, layout=layout)

    def visit(j: Any, best: Any) -> Any:
        i = j * COMPUTE + wg
        slot, step = lax.rem(i, jnp.int32(shape.stages)), steps.step_at(i)
        steps.arrived(i)
        shape.layout.centre(centre_smem.at[slot], wide_smem, shape.dtype)
        plgpu.commit_smem()
        centre = product(jnp.float32, [(wide_smem, q_smem)])
        score_smem[...] = centre * wide(load(unit_smem.at[slot], of_key), 0)
        plgpu.commit_smem()

        def keys(t: Any, best: Any) -> Any:
            rows = pl.ds(pl.multiple_of(t * ROWS, ROWS), ROWS)
            heads = pl.ds(pl.multiple_of(t * HEADS, HEADS), HEADS)
            inner = shape.layout.inner(
                code_smem.at[slot], t, code_work, integer_smem, shape.interpret
            )
            scale, spread = (
                wide(load(x.at[slot, rows], of_key).astype(jnp.float32), 0)
                for x in (scale_smem, spread_smem)
            )
            # Four pages of 16 rows each.
            first = t * (ROWS // TOKENS)
            centre = wide(load(score_smem.at[first], of_head), 1)
            for page in range(1, ROWS // TOKENS):
                other = wide(load(score_smem.at[first + page], of_head), 1)
                centre = jnp.where(row >= page * TOKENS, other, centre)
            estimate = scale * (slope * inner.astype(jnp.float32) + offset) + centre
            error = jnp.where(of_spread > 0, of_spread * spread, 0.0) + of_scale * scale
            position = step * KEYS + t * ROWS + row
            seen = (position >= low) & (position < high)
            upper = jnp.where(seen, estimate + error, -jnp.inf)
            upper_smem.at[:, heads][...] = upper
            if shape.to_log2 is not None:
                scaled = jnp.where(seen, estimate * shape.to_log2, -jnp.inf)
                estimate_smem.at[:, heads][...] = scaled
            return jnp.maximum(best, jnp.where(seen, estimate - error, -jnp.inf))

        best = lax.fori_loop(0, KEYS // ROWS, keys, best)
        plgpu.commit_smem()  # the threads' reads come before the next copy's writes
        plgpu.barrier_arrive(steps.free.at[slot])
        # One row per head and 64 keys; 16 columns are a page.
        pages = [slice(page * TOKENS, (page + 1) * TOKENS) for page in range(ROWS // TOKENS)]
        uppers = load(upper_smem.transpose((1, 0)), layout)
        for page, columns in enumerate(pages):
            outs[0][*where, step, page] = uppers[:, columns].max(axis=1)
        if shape.to_log2 is not None:
            estimates = load(estimate_smem.transpose((1, 0)), layout)
            for page, columns in enumerate(pages):
                scaled = estimates[:, columns]
                top = jnp.maximum(scaled.max(axis=1), _LOWEST)
                mass = jnp.exp2(scaled - lax.broadcast_in_dim(top, scaled.shape, [0])).sum(axis=1)
                outs[2][*where, step, page] = (top + jnp.log2(mass)) * (1 / _LOG2_E)
        return best

    start = plgpu.layout_cast(jnp.full(tile, -jnp.inf, jnp.float32), layout)
    turns = lax.div(jnp.maximum(steps.mine - wg, 0) + COMPUTE - 1, jnp.int32(COMPUTE))
    return lax.fori_loop(0, turns, visit, start)
