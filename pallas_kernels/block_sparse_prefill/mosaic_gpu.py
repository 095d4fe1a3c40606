"""Prefill attention over pages, for Hopper.

One CTA has 128 queries of one head, and three warpgroups: two compute, 64 queries each, and one
that brings keys and values. A tile of keys is 128 (or 64) tokens, gathered from several pages: one
TMA copy a page, all counted by one barrier.

    pages in GMEM    [Z,D] [Z,D] [Z,D] ...           q [64,D]   q [64,D]
                       |     |     |                    |          |
    warpgroup 2        v     v     v   TMA, `stages`    |          |
    SMEM             k[slot] [keys,D]  tiles ahead   ---+----------+--- S = q k'   wgmma
                     v[slot] [keys,D]                   |          |    softmax    registers
                                                     ---+----------+--- O += P v   wgmma
    warpgroups 0, 1: each for itself; a slot is free when both have arrived at its barrier

For each tile a compute warpgroup multiplies, masks (only where the tile reaches a query's own
position or the chunk's end), and takes the rows' maxima. With `beta`, the tile is skipped if every
row's maximum is below that row's running maximum - beta: then neither the exponentials nor P v are
computed. Its values come in all the same, since the other warpgroup may want them.

Tokens behind a sequence's end may hold anything, NaN too. So the page that is not full is read
from `tail`, a copy with zeros there that XLA makes; and again where a tile goes on behind it, since
those keys have no weight whatever they are.

P goes through SMEM: the simulator knows no register operand of wgmma, and what runs is what was
proven. `Tuning(p_in_registers=True)` saves that way where a device has shown it to be right.
"""

import dataclasses
import functools
import math

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

_LOW = float(jnp.finfo(jnp.float32).min)  # a running maximum below every score; finite
_COMPUTE = 2  # warpgroups
_SWIZZLE = 128  # bytes: rows of 64 two-byte numbers


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may differ between devices; nothing of it changes the result beyond rounding.

    Attributes:
      stages: tiles of keys and values in SMEM.
      p_in_registers: P as a register operand of wgmma; else through SMEM.
    """

    stages: int = 2
    p_in_registers: bool = False


def tuning_of(head_dim: int) -> Tuning:
    """As many stages as shared memory holds with tiles of 128 keys."""
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
    """See `block_sparse_prefill`."""
    tokens = q.shape[1]
    q = pad_queries(q)
    batch, padded, heads, dim = q.shape
    kv_heads, _, page, _ = k_pages.shape
    group = heads // kv_heads
    q_blocks = padded // QUERY_BLOCK
    tile_pages = block_kv // page
    tuning = tuning or tuning_of(dim)
    stages = tuning.stages
    through_smem = target.interpret or not tuning.p_in_registers
    dtype = q.dtype
    to_log2 = scale * math.log2(math.e)
    whole, tail_k, tail_v = _tails(k_pages, v_pages, pages, lengths + count)

    operands = [q, k_pages, v_pages, tail_k, tail_v, pages, lengths, count, whole]
    operands += [] if beta is None else [beta]
    operands += [] if lists is None else [lists.blocks, lists.count, lists.kept]

    def kernel(q_ref, k_ref, v_ref, tail_k_ref, tail_v_ref, page_ref, length_ref, count_ref,
               whole_ref, *refs):  # fmt: skip
        beta_ref, refs = (None, refs) if beta is None else (refs[0], refs[1:])
        list_ref, n_ref, always_ref, refs = (
            (None, None, None, refs) if lists is None else (*refs[:3], refs[3:])
        )
        out_ref, lse_ref, skipped_ref, *refs = refs
        q_smem, k_smem, v_smem, lse_smem, wanted_smem, *refs = refs
        q_ready, k_ready, v_ready, k_free, v_free, *p_smem = refs
        head = lax.axis_index("head")
        block = q_blocks - 1 - lax.axis_index("block")  # the longest first
        b = lax.axis_index("batch")
        wg = lax.axis_index("wg")
        kv_head = lax.div(head, jnp.int32(group))
        length, new = length_ref[b], count_ref[b]
        start = block * QUERY_BLOCK
        # Tiles that hold a key some query of the block may see, the last first: the query's own
        # neighbourhood gives the running maximum that later tiles are judged by.
        last = length + jnp.minimum(start + QUERY_BLOCK, new) - 1
        visible = jnp.where(start < new, lax.div(last, jnp.int32(block_kv)) + 1, 0)
        if lists is None or n_ref is None or list_ref is None or always_ref is None:
            tiles, always = visible, 0

            def tile_at(i):
                return visible - 1 - i
        else:
            of_list = head if lists.blocks.shape[1] == heads else kv_head
            tiles = jnp.where(start < new, n_ref[b, of_list, block], 0)
            always = always_ref[b, of_list, block]

            def tile_at(i):
                return list_ref[b, of_list, block, i]

        @pl.when(wg < _COMPUTE)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            first = start + wg * ROWS  # the warpgroup's first query
            q_tile = q_smem.at[wg]
            mosaic.bring(q_ref.at[b, pl.ds(first, ROWS), head], q_tile, q_ready.at[wg])
            plgpu.barrier_wait(q_ready.at[wg])

            def iota(axis):
                shape = (ROWS, block_kv)
                return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

            def step(i, carry):
                top, total, acc, skipped = carry
                slot = lax.rem(i, jnp.int32(stages))
                tile = tile_at(i)
                plgpu.barrier_wait(k_ready.at[slot])

                def scores(ref):
                    plgpu.wgmma(ref, q_tile, k_smem.at[slot].transpose((1, 0)))
                    return ref[...]

                s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((ROWS, block_kv), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])

                def masked(s):
                    row, key = first + iota(0), tile * block_kv + iota(1)
                    return jnp.where((key <= length + row) & (row < new), s, -jnp.inf)

                ragged = ((tile + 1) * block_kv > length + first + 1) | (first + ROWS > new)
                s = lax.cond(ragged, masked, lambda s: s, s)
                tile_top = s.max(axis=1)

                def attend(top, total, acc):
                    new_top = jnp.maximum(top, tile_top)
                    fade = jnp.exp2((top - new_top) * to_log2)
                    # Rows without a key yet have p = exp2(-inf).
                    p = jnp.exp2((s - _over_columns(new_top, s.shape)) * to_log2)
                    total = total * fade + p.sum(axis=1)
                    p = p.astype(dtype)
                    if p_smem:
                        p_smem[0].at[wg][...] = p
                        plgpu.commit_smem()
                    plgpu.barrier_wait(v_ready.at[slot])

                    def weigh(ref):
                        plgpu.wgmma(ref, p_smem[0].at[wg] if p_smem else p, v_smem.at[slot])
                        return ref[...]

                    pv = pl.run_scoped(weigh, plgpu.WGMMAAccumulatorRef((ROWS, dim), jnp.float32))
                    return new_top, total, acc * _over_columns(fade, acc.shape) + pv

                if beta_ref is None:
                    top, total, acc = attend(top, total, acc)
                else:
                    # A maximum over warps, through SMEM of our own: the compiler's scratch for
                    # it is one for both warpgroups. Each warp reads all rows.
                    wanted = wanted_smem.at[wg]
                    wanted[...] = jnp.where(tile_top >= top - beta_ref[head], 1.0, 0.0)
                    wanted = plgpu.load(wanted, layout=plgpu.Layout.WGMMA.reduce(0))
                    keep = ragged | (i < always) | (jnp.max(wanted) > 0)

                    def skip(top, total, acc):
                        plgpu.barrier_wait(v_ready.at[slot])
                        return top, total, acc

                    top, total, acc = lax.cond(keep, attend, skip, top, total, acc)
                    skipped += jnp.where(keep, 0, 1)
                plgpu.barrier_arrive(v_free.at[slot])
                return top, total, acc, skipped

            row = plgpu.Layout.WGMMA.reduce(1)
            top, total, acc, skipped = lax.fori_loop(
                0,
                tiles,
                step,
                (
                    plgpu.layout_cast(jnp.full((ROWS,), _LOW, jnp.float32), row),
                    plgpu.layout_cast(jnp.full((ROWS,), 0.0, jnp.float32), row),
                    plgpu.layout_cast(jnp.full((ROWS, dim), 0.0, jnp.float32), plgpu.Layout.WGMMA),
                    jnp.int32(0),
                ),
            )
            some = total > 0
            total = jnp.where(some, total, 1.0)
            lse = jnp.where(some, top * scale + jnp.log(total), -jnp.inf)
            q_tile[...] = (acc / _over_columns(total, acc.shape)).astype(dtype)
            lse_smem.at[wg][...] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, out_ref.at[b, pl.ds(first, ROWS), head])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, head, pl.ds(first, ROWS)])
            skipped_ref[b, head, block * _COMPUTE + wg] = skipped
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == _COMPUTE)
        def load():
            plgpu.set_max_registers(24, action="decrease")
            full = whole_ref[b]  # whole pages; the next is the tail

            @pl.loop(0, tiles)
            def tile_step(i):
                slot = lax.rem(i, jnp.int32(stages))
                tile = tile_at(i)

                def bring(pool, tail, smem, ready):
                    for j in range(tile_pages):
                        n = tile * tile_pages + j
                        to = smem.at[slot, pl.ds(j * page, page)]

                        @pl.when(n < full)
                        def _(n=n, to=to):
                            here = pool.at[kv_head, page_ref[b, n]]
                            mosaic.bring(here, to, ready.at[slot])

                        @pl.when(n >= full)
                        def _(n=n, to=to):
                            here = tail.at[kv_head, b]
                            mosaic.bring(here, to, ready.at[slot])

                @pl.when(i >= stages)
                def _():
                    plgpu.barrier_wait(k_free.at[slot])

                bring(k_ref, tail_k_ref, k_smem, k_ready)

                @pl.when(i >= stages)
                def _():
                    plgpu.barrier_wait(v_free.at[slot])

                bring(v_ref, tail_v_ref, v_smem, v_ready)

            # Whoever waits at a barrier has to see all its phases.
            @pl.loop(jnp.maximum(tiles - stages, 0), tiles)
            def drain(i):
                slot = lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

    tiled = mosaic.swizzled(_SWIZZLE, 2)

    def smem(*shape):
        return plgpu.SMEM(shape, dtype, transforms=tiled)

    scratch = [
        smem(_COMPUTE, ROWS, dim),
        smem(stages, block_kv, dim),
        smem(stages, block_kv, dim),
        plgpu.SMEM((_COMPUTE, ROWS), jnp.float32),
        plgpu.SMEM((_COMPUTE, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=_COMPUTE),
        plgpu.Barrier(num_arrivals=tile_pages, num_barriers=stages),
        plgpu.Barrier(num_arrivals=tile_pages, num_barriers=stages),
        plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=stages),
        plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=stages),
    ]
    if through_smem:
        scratch.append(smem(_COMPUTE, ROWS, block_kv))
    out, lse, skipped = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, padded // ROWS), jnp.int32),
        ),
        scratch_types=scratch,
        grid=(heads, q_blocks, batch),
        grid_names=("head", "block", "batch"),
        num_threads=_COMPUTE + 1,
        thread_name="wg",
        kernel_name="block_sparse_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=mosaic.interpret(target),
    )(*operands)
    used = -(-tokens // ROWS)
    return Prefill(out[:, :tokens], lse[..., :tokens], skipped[..., :used])


def _over_columns(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


@functools.partial(jax.jit, inline=True)
def _tails(k_pages, v_pages, pages, length):
    """For each sequence the number of its whole pages, and keys and values [K, B, Z, D] of the next
    page as far as it is filled, zeros behind.
    """
    page = k_pages.shape[2]
    whole = length // page
    ids = jnp.take_along_axis(pages, whole[:, None], axis=1, mode="clip")[:, 0]
    filled = jnp.arange(page) < (length - whole * page)[:, None]
    return whole, *(
        jnp.where(filled[None, :, :, None], pool[:, ids], 0) for pool in (k_pages, v_pages)
    )
