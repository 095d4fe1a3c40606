"""Which blocks of keys each block of queries attends to, as lists that a kernel can follow.

A few evenly spaced queries of each block are scored against all keys, and the mass that they put on
a block of keys is taken as an estimate for the whole block of queries. This costs samples / q_block
of the scores of full attention, and reads no V. On real keys it is nearly as good as the true
masses of all queries; antidiagonal sums (XAttention, arXiv 2503.16428) and means of queries and
keys (FlexPrefill, arXiv 2502.20766) keep less mass with more keys (benchmarks/sparse_prefill.py).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.cache import UNUSED, views
from alaya_jax.cache.views import KeyRange, Pages, over_tiles
from alaya_jax.errors import RequestError
from alaya_jax.query import Tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileList:
    """The blocks of keys to visit for each kv head and block of queries, in order.

    Attributes:
      blocks: int32 [K, QB, N], each block once. Block b covers columns b * kv_block to
        (b + 1) * kv_block - 1 (see `Pages`). Entries from `count` on are not to be visited.
      count: int32 [K, QB], blocks to visit.
      kept: int32 [K, QB], how many of them, at the front, no rule may skip: those of the window.
      mass: float32 [K, G, QB], estimated share of the attention mass in the listed blocks; 1
        without an estimate.
      q_block, kv_block: queries and keys per block; static.
    """

    blocks: Int[Array, "K QB N"]
    count: Int[Array, "K QB"]
    kept: Int[Array, "K QB"]
    mass: Float[Array, "K G QB"]
    q_block: int = dataclasses.field(metadata={"static": True})
    kv_block: int = dataclasses.field(metadata={"static": True})


def select_tiles(
    q: Float[Array, "K G T D"], pages: Pages, positions: Int[Array, " T"], rule: Tiles
) -> TileList:
    """The blocks that a rule scores. Its `beta` plays no part here.

    Args:
      q, positions: as in `attend_tiles`.
      pages: keys; values are not read.
      rule: see `Tiles`.

    Raises:
      RequestError: `kv_block` is not a multiple of the page size, or does not divide a tile.
    """
    heads, group, t, _ = q.shape
    size = pages.size
    kv_block = rule.kv_block or size
    tile = max(views.TILE_TOKENS // size, 1) * size
    if kv_block % size or tile % kv_block:
        raise RequestError(
            f"Tiles(kv_block={kv_block}): use a multiple of the page size, {size}, that divides "
            f"{tile}; None is one page"
        )
    q_block = min(rule.q_block, t)
    q_blocks = -(-t // q_block)
    rows = jnp.pad(positions, (0, q_blocks * q_block - t), constant_values=-1)
    rows = rows.reshape(q_blocks, q_block)
    starts = whole_blocks(pages, kv_block // size).starts().reshape(-1, kv_block // size)
    blocks = starts.shape[0]
    last = jnp.max(rows, axis=-1)
    first = jnp.min(jnp.where(rows >= 0, rows, UNUSED), axis=-1)
    start = starts[:, 0]
    end = jnp.max(jnp.where(starts < UNUSED, starts + size, 0), axis=-1)
    visible = start <= last[:, None]  # [QB, N]
    recent = end > (first + 1 - rule.window.recent)[:, None]
    always = visible & ((start < rule.window.sink) | recent)

    def listed(mass: Float[Array, "... QB N"]) -> Int[Array, "... QB N"]:
        # The window's blocks by position, then the others by falling mass, earlier ones first.
        key = jnp.where(always, 2.0, jnp.where(visible, mass, -1.0))
        return jnp.argsort(-key, axis=-1, stable=True).astype(jnp.int32)

    kept = jnp.broadcast_to(jnp.sum(always, axis=-1, dtype=jnp.int32), (heads, q_blocks))
    every = jnp.broadcast_to(jnp.sum(visible, axis=-1, dtype=jnp.int32), (heads, q_blocks))
    if rule.recovery is None:
        order = jnp.broadcast_to(listed(jnp.zeros(visible.shape)), (heads, *visible.shape))
        whole = jnp.ones((heads, group, q_blocks))
        return TileList(order, every, kept, whole, q_block, kv_block)

    index, valid = _spread(rows >= 0, min(rule.samples, q_block))
    at = jnp.minimum(jnp.arange(q_blocks)[:, None] * q_block + index, t - 1)
    sampled = jnp.where(valid, positions[at], -1)
    mass = block_mass(q[:, :, at.ravel()], pages, sampled.ravel(), kv_block)
    mass = mass.reshape(heads, group, q_blocks, -1, blocks)
    asked = jnp.maximum(jnp.sum(valid, axis=-1), 1)  # [QB]
    order = listed(jnp.sum(mass, axis=(1, 3)) / (group * asked[:, None]))
    held = jnp.cumsum(jnp.take_along_axis(mass, order[:, None, :, None], axis=-1), axis=-1)
    recovery = jnp.asarray(rule.recovery, jnp.float32)
    short = jnp.where(valid[..., None], held < recovery, False)
    needed = 1 + jnp.max(jnp.sum(short, axis=-1, dtype=jnp.int32), axis=(1, 3))
    # A running sum of shares may round to 1 before its last term.
    needed = jnp.where(recovery >= 1, every, jnp.minimum(needed, every))
    count = jnp.maximum(needed, kept)
    reached = jnp.take_along_axis(held, jnp.maximum(count - 1, 0)[:, None, :, None, None], axis=-1)
    reached = jnp.sum(jnp.where(valid, reached[..., 0], 0.0), axis=-1) / asked
    return TileList(order, count, kept, reached, q_block, kv_block)


def whole_blocks(pages: Pages, block: int) -> Pages:
    """The table, padded to a multiple of `block` entries with ones that hold no position."""
    pad = (0, -pages.ids.shape[0] % block)
    return dataclasses.replace(
        pages,
        ids=jnp.pad(pages.ids, pad, mode="edge"),
        start=jnp.pad(pages.starts(), pad, constant_values=UNUSED),
    )


def _spread(
    real: Bool[Array, "QB T"], samples: int
) -> tuple[Int[Array, "QB N"], Bool[Array, "QB N"]]:
    """Evenly spaced rows among the real ones of each block, including the last."""
    rank = jnp.cumsum(real, axis=-1)
    n = rank[:, -1:]
    wanted = (jnp.arange(1, samples + 1) * n + samples - 1) // samples
    # The row of rank r is the first row that has this rank.
    index = jnp.sum(rank[:, None, :] < wanted[..., None], axis=-1)
    return jnp.minimum(index, real.shape[1] - 1), jnp.broadcast_to(n > 0, index.shape)


def block_mass(
    q: Float[Array, "K G T D"], pages: Pages, positions: Int[Array, " T"], kv_block: int
) -> Float[Array, "K G T N"]:
    """The exact share of each query's attention mass in each block of keys. V is not read.

    Args:
      q, positions: queries and their positions; a query at -1 has no mass.
      pages: the keys.
      kv_block: keys per block, a multiple of the page size that divides a tile.
    """
    size = pages.size
    scale = q.shape[-1] ** -0.5
    blocks = -(-pages.columns // kv_block)
    # Pad to whole tiles, so that none overlaps the one before and each holds whole blocks.
    step = max(views.TILE_TOKENS // size, 1)
    pages = whole_blocks(pages, step if pages.ids.shape[0] > step else kv_block // size)
    keys = KeyRange(jnp.zeros_like(positions), positions + 1)

    def visit(tile: Array, logs: Array) -> Array:
        k = pages.read(pages.k, tile)
        scores = scale * jnp.einsum(
            "kgtd,ksd->kgts", q.astype(k.dtype), k, preferred_element_type=jnp.float32
        )
        scores = jnp.where(keys.mask(pages.positions(tile)), scores, -jnp.inf)
        scores = scores.reshape(*scores.shape[:3], -1, kv_block)
        top = jnp.max(scores, axis=-1)
        base = jnp.where(jnp.isneginf(top), 0.0, top)
        new = base + jnp.log(jnp.sum(jnp.exp(scores - base[..., None]), axis=-1))
        return lax.dynamic_update_slice_in_dim(logs, new, tile * new.shape[-1], axis=-1)

    width = pages.num_tiles * pages.tile_tokens // kv_block
    logs = over_tiles(pages, keys, visit, jnp.full((*q.shape[:3], width), -jnp.inf))
    top = jnp.max(logs, axis=-1, keepdims=True)
    weight = jnp.exp(logs - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return (weight / jnp.where(total > 0, total, 1.0))[..., :blocks]


__all__ = ["TileList", "block_mass", "select_tiles", "whole_blocks"]
