"""Attention of many queries of one sequence over blocks of its keys, at a cost that falls with what
is left out.

Queries are taken in blocks. Each block has, for each kv head, a list of key blocks (`TileList`):
the ones that must be attended first, then the others by falling estimate. `attend_list` visits a
list some blocks at a time, gathered to one tile of scores; its loop runs as often as the list is
long, so that keys which are not listed cost nothing, and a visit whose scores are hopeless ends
before the softmax and V.

One list for the G heads of a kv head: keys are read once, the matmuls have G times the rows, and on
real keys it needs no more blocks than lists of their own for the same mass
(benchmarks/sparse_prefill.py).

The loops take one kv head after another. On a mesh call this inside `shard_map`, so that each
device has its own heads. Where pages are spread too, each device lists and attends to its own, and
the partial attentions merge. Both rules hold then: a share of each device's mass is a share of the
whole, and a device's best is not above the best of all. They keep more than one device would.
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
"""Keys a visit: many make large matmuls, few waste little where a list ends inside a visit
(`python benchmarks/sparse_prefill.py --parts visits`)."""


def attend_tiles(
    q: Float[Array, "K G T D"], pages: Pages, positions: Int[Array, " T"], rule: Tiles
) -> tuple[Partial, Int[Array, "K G T"]]:
    """Attention by a rule. A query at position p sees the keys 0..p; p = -1 sees none.

    Args:
      q: rotated, unscaled queries of one sequence.
      pages: its keys and values, those of the queries among them.
      positions: of the queries, in any order; cheapest where neighbours are near.
      rule: which keys.

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
    """Attention over listed blocks of keys, less those that the range `beta` rules out.

    Returns:
      as `attend_tiles`; and how many of a list's blocks were scored and then skipped.
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
    """One block of queries of one kv head. Scores are raw, as DIPR's range is."""
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
            # Pages hold whatever was there before: 0 * NaN must not reach the sum.
            v = jnp.where(seen.any(0)[:, None], v, 0)

            def weigh(p: Array) -> Array:
                return _dot("rs,sd->rd", p.reshape(group * t, -1), v).reshape(group, t, dim)

            more = jnp.sum(seen, axis=-1, dtype=jnp.int32)
            return fold(running, scores, scale, weigh, best), attended + more, skipped

        # By row, and all rows must agree: a row's range hangs on its own best. The tile's maximum
        # against the least of the thresholds would be cheaper by nothing, as the softmax wants the
        # rows' maxima anyway, and would skip less. An infinite beta skips nothing.
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
    """Pages of one kv head, [N * Z, D]; on CPU one by one and in float32, see `Pages.read`."""
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
