"""Attention of many queries of one sequence over listed blocks of its keys.

Queries are taken in blocks. Each block has a list of key blocks for each kv head (`TileList`):
those that must be attended to come first, then the others by falling estimate. `attend_list`
gathers a few listed blocks at a time into one tile of scores. Its loop is as long as the list, so
keys that are not listed cost nothing, and a tile whose scores are all out of range skips the
softmax and V.

The G heads of a kv head share one list: keys are read once, the matmuls have G times the rows, and
on real keys a shared list needs no more blocks for the same mass than one for each head
(benchmarks/sparse_prefill.py).

The loops take one kv head at a time. On a mesh, call this inside `shard_map`, so that each device
has its own heads. Where pages are spread as well, each device lists and attends to its own pages
and the partial attentions are merged. Both rules still hold, since a share of every device's mass
is that share of the whole, and no device's best score exceeds the best of all; but more is kept
than on a single device.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alaya_jax.attention.selection import TileList, select_tiles, whole_blocks
from alaya_jax.attention.softmax import Partial, Running, finish, fold, start
from alaya_jax.cache import UNUSED
from alaya_jax.cache.tiers import Pool, Tiers
from alaya_jax.cache.views import Pages, on_cpu
from alaya_jax.query import Tiles

VISIT_TOKENS = 256
"""Keys per tile. More make larger matmuls; fewer waste less where a list ends inside a tile
(`python benchmarks/sparse_prefill.py --parts visits`)."""


def attend_tiles(
    q: Float[Array, "K G T D"], pages: Pages, positions: Int[Array, " T"], rule: Tiles
) -> tuple[Partial, Int[Array, "K G T"]]:
    """Attention by a rule. A query at position p sees keys 0..p; at p = -1 it sees none.

    Args:
      q: queries of one sequence, rotated and unscaled.
      pages: the keys and values of the sequence, including those of the queries.
      positions: positions of the queries, in any order; cheapest if neighbours are close.
      rule: which keys to attend to.

    Returns:
      the partial attention [K, G, T], and how many keys each query attended to.

    Raises:
      RequestError: the rule's blocks do not fit the pages.
    """
    tiles = select_tiles(q, pages, positions, rule)
    partial, attended, _ = attend_list(q, pages, positions, tiles, rule.beta)
    return partial, attended


def attend_list(
    q: Float[Array, "K G T D"],
    pages: Pages,
    positions: Int[Array, " T"],
    tiles: TileList,
    beta: float | jax.Array,
) -> tuple[Partial, Int[Array, "K G T"], Int[Array, "K QB"]]:
    """Attention over the listed blocks of keys, except those that the range `beta` rules out.

    Returns:
      as `attend_tiles`, and how many blocks of each list were scored and then skipped.
    """
    heads, group, t, dim = q.shape
    pages = whole_blocks(pages, tiles.kv_block // pages.size)
    q_block, q_blocks = tiles.q_block, tiles.count.shape[1]
    pad = q_blocks * q_block - t
    positions = jnp.pad(positions, (0, pad), constant_values=-1).reshape(q_blocks, q_block)
    rows = jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0)))
    rows = jnp.moveaxis(rows.reshape(heads, group, q_blocks, q_block, dim), 1, 2)
    beta = jnp.broadcast_to(jnp.asarray(beta, jnp.float32), (heads * group,))
    beta = beta.reshape(heads, group, 1)

    def unit(index: Array) -> tuple[Array, ...]:
        head, block = index // q_blocks, index % q_blocks
        return _attend_block(
            rows[head, block], positions[block], pages, tiles, head, block, beta[head]
        )

    out, lse, attended, skipped = lax.map(unit, jnp.arange(heads * q_blocks))

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(heads, q_blocks, group, q_block, *x.shape[3:]), 2, 1)
        return x.reshape(heads, group, q_blocks * q_block, *x.shape[4:])[:, :, :t]

    attended = jnp.broadcast_to(attended[:, None], lse.shape)
    return Partial(join(out), join(lse)), join(attended), skipped.reshape(heads, q_blocks)


def _attend_block(
    q: Float[Array, "G T D"],
    positions: Int[Array, " T"],
    pages: Pages,
    tiles: TileList,
    head: Array,
    block: Array,
    beta: Float[Array, "G 1"],
) -> tuple[Float[Array, "G T D"], Float[Array, "G T"], Int[Array, " T"], Int[Array, ""]]:
    """Attention of one block of queries of one kv head. Scores are raw, as in DIPR's range."""
    group, t, dim = q.shape
    scale = dim**-0.5
    entries = tiles.kv_block // pages.size
    at_once = max(1, VISIT_TOKENS // tiles.kv_block)
    listed = jnp.pad(tiles.blocks[head, block], (0, at_once))
    count, kept = tiles.count[head, block], tiles.kept[head, block]

    def visit(i: Array, carry: tuple[Running, Array, Array]) -> tuple[Running, Array, Array]:
        running, attended, skipped = carry
        slots = i * at_once + jnp.arange(at_once)
        blocks = lax.dynamic_slice_in_dim(listed, i * at_once, at_once)
        entry = blocks[:, None] * entries + jnp.arange(entries)
        begins = jnp.where((slots < count)[:, None], pages.starts()[entry], UNUSED)
        key_positions = (begins.reshape(-1, 1) + jnp.arange(pages.size)).ravel()
        ids = pages.ids[entry.ravel()]
        seen = key_positions <= positions[:, None]
        k = _read(pages.k, head, ids)
        scores = _dot("rd,sd->rs", q.reshape(group * t, dim), k).reshape(group, t, -1)
        scores = jnp.where(seen, scores, -jnp.inf)
        best = jnp.max(scores, axis=-1)

        def add() -> tuple[Running, Array, Array]:
            v = _read(pages.v, head, ids)
            # Slots out of range may hold anything, and 0 * NaN must not reach the sum.
            v = jnp.where(seen.any(0)[:, None], v, 0)

            def weigh(p: Array) -> Array:
                return _dot("rs,sd->rd", p.reshape(group * t, -1), v).reshape(group, t, dim)

            more = jnp.sum(seen, axis=-1, dtype=jnp.int32)
            return fold(running, scores, scale, weigh, best), attended + more, skipped

        # Every row must rule the tile out, each by its own best score. Comparing the tile's maximum
        # with the lowest threshold would skip less and save nothing, because the softmax needs the
        # maxima of the rows anyway. An infinite beta skips nothing.
        hopeless = jnp.all(best < running.top - beta) & (i * at_once >= kept)
        blocks_here = jnp.minimum(count - i * at_once, at_once)
        return lax.cond(hopeless, lambda: (running, attended, skipped + blocks_here), add)

    none = start((group, t), dim), jnp.zeros(t, jnp.int32), jnp.int32(0)
    running, attended, skipped = lax.fori_loop(0, -(-count // at_once), visit, none)
    partial = finish(running, scale)
    return partial.out, partial.lse, attended, skipped


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _read(pool: Pool, head: Array, ids: Int[Array, " N"]) -> Array:
    """Pages of one kv head, [N * Z, D]; on CPUs one at a time and in float32, see `Pages.read`."""
    size, dim = pool.shape[2:]
    if not on_cpu() and not isinstance(pool, Tiers):
        return pool[head, ids].reshape(-1, dim)

    def copy(i: Array, tile: Array) -> Array:
        if isinstance(pool, Tiers):
            page = pool.page(head, ids[i])
        else:
            page = lax.dynamic_slice(pool, (head, ids[i], 0, 0), (1, 1, size, dim))[0, 0]
        return lax.dynamic_update_slice(tile, page, (i * size, 0))

    n = ids.shape[0]
    return lax.fori_loop(0, n, copy, jnp.zeros((n * size, dim), pool.dtype)).astype(jnp.float32)


__all__ = ["TileList", "attend_list", "attend_tiles", "select_tiles"]
