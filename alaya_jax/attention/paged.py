"""Attention over a range of a sequence's keys, tile by tile, in XLA.

A tile is some consecutive pages of the sequence. The loop's trip count follows the true length, so
cost and compiled program do not depend on how long the page table is. A tile whose pages are
consecutive in the pool too (the allocator sees to it) is read as one slice; else page by page.

Everything here is for one sequence, with query rows `[K, G, T]`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alaya_jax.attention.partial import Partial

TILE_TOKENS = 512
"""Keys a tile: large enough for the loop's overhead, small enough to stay in a core's cache."""

_LOW = -1e30  # a running maximum below every score; finite, so that differences stay defined


@dataclasses.dataclass(frozen=True)
class KeyRange:
    """Positions that each query row may see: `low <= j < high`, and not `gap_low <= j < gap_high`.

    Attributes:
      low, high, gap_low, gap_high: int32 [T].
    """

    low: Int[Array, " T"]
    high: Int[Array, " T"]
    gap_low: Int[Array, " T"] | None = None
    gap_high: Int[Array, " T"] | None = None

    def mask(self, positions: Int[Array, " S"]) -> Array:
        """bool [T, S]: whether the key at each position is in the row's range."""
        seen = (positions >= self.low[:, None]) & (positions < self.high[:, None])
        if self.gap_low is None or self.gap_high is None:
            return seen
        return seen & ((positions < self.gap_low[:, None]) | (positions >= self.gap_high[:, None]))


@dataclasses.dataclass(frozen=True)
class Pages:
    """One layer's keys and values of one sequence: where the tiles are.

    Attributes:
      k, v: [K, P, Z, D], the pool.
      ids: int32 [N], the sequence's pages.
    """

    k: Float[Array, "K P Z D"]
    v: Float[Array, "K P Z D"]
    ids: Int[Array, " N"]

    @property
    def tile_pages(self) -> int:
        """Pages a tile."""
        return max(1, min(TILE_TOKENS // self.k.shape[2], self.ids.shape[0]))

    @property
    def tile_tokens(self) -> int:
        """Tokens a tile."""
        return self.tile_pages * self.k.shape[2]

    @property
    def num_tiles(self) -> int:
        """Tiles of the whole table."""
        return -(-self.ids.shape[0] // self.tile_pages)

    def positions(self, tile: Array) -> Int[Array, " S"]:
        """Positions of the tokens of a tile."""
        return self._first(tile) * self.k.shape[2] + jnp.arange(self.tile_tokens)

    def fresh(self, tile: Array) -> Array:
        """bool [S]: tokens of a tile that no earlier tile holds (the last tile may reach back)."""
        return self.positions(tile) >= tile * self.tile_tokens

    def _first(self, tile: Array) -> Array:
        return jnp.minimum(tile * self.tile_pages, self.ids.shape[0] - self.tile_pages)

    def read(self, pool: Array, tile: Array) -> Float[Array, "K S D"]:
        """The keys or values of a tile; float32 on CPU, whose other matmuls are slow."""
        ids = lax.dynamic_slice_in_dim(self.ids, self._first(tile), self.tile_pages)
        on_cpu = jax.default_backend() == "cpu"
        pages = read_on_cpu(pool, ids) if on_cpu else pool[:, ids]
        tokens = pages.reshape(pages.shape[0], -1, pages.shape[3])
        return tokens.astype(jnp.float32) if on_cpu else tokens


def read_on_cpu(pool: Array, ids: Array) -> Float[Array, "K N Z D"]:
    """Pages `ids`, copied as one slice if they are a run, else page by page.

    A gather is no faster, and the compiler would account for it as a read of the whole pool.
    """
    heads, num_pages, size, dim = pool.shape
    n = ids.shape[0]

    def run() -> Array:
        return lax.dynamic_slice_in_dim(pool, ids[0], n, axis=1)

    def page_by_page() -> Array:
        def copy(i: Array, tile: Array) -> Array:
            page = lax.dynamic_slice_in_dim(pool, ids[i], 1, axis=1)
            return lax.dynamic_update_slice_in_dim(tile, page, i, axis=1)

        return lax.fori_loop(0, n, copy, jnp.zeros((heads, n, size, dim), pool.dtype))

    if n > num_pages:  # a table wider than the pool repeats pages past a sequence's end
        return page_by_page()
    is_run = jnp.all(ids == ids[0] + jnp.arange(n)) & (ids[0] + n <= num_pages)
    return lax.cond(is_run, run, page_by_page)


def _scores(q: Array, k: Array) -> Float[Array, "K G T S"]:
    return jnp.einsum("kgtd,ksd->kgts", q.astype(k.dtype), k, preferred_element_type=jnp.float32)


def _weigh(p: Array, v: Array) -> Float[Array, "K G T D"]:
    return jnp.einsum("kgts,ksd->kgtd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)


def attend_range(
    q: Float[Array, "K G T D"], pages: Pages, keys: KeyRange
) -> tuple[Partial, Float[Array, "K G T"]]:
    """Softmax attention over the keys in range.

    Returns:
      the partial attention [K, G, T], and the best raw (unscaled) score, -inf where no key is in
      range.
    """
    scale = q.shape[-1] ** -0.5

    def visit(tile: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, acc = carry
        seen = keys.mask(pages.positions(tile)) & pages.fresh(tile)
        scores = scale * _scores(q, pages.read(pages.k, tile))
        scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        p = jnp.exp(scores - new_top[..., None])
        fade = jnp.exp(top - new_top)
        # Pages hold whatever was there before: 0 * NaN must not reach the sum.
        v = jnp.where(seen.any(0)[:, None], pages.read(pages.v, tile), 0)
        return (
            new_top,
            total * fade + jnp.sum(p, axis=-1),
            acc * fade[..., None] + _weigh(p, v),
        )

    rows = q.shape[:-1]
    start = (jnp.full(rows, _LOW), jnp.zeros(rows), jnp.zeros(q.shape))
    top, total, acc = over_tiles(pages, keys, visit, start)
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    partial = Partial(acc / safe[..., None], jnp.where(empty, -jnp.inf, top + jnp.log(safe)))
    return partial, jnp.where(empty, -jnp.inf, top / scale)


def score_range(
    q: Float[Array, "K G T D"], pages: Pages, keys: KeyRange
) -> Float[Array, "K G T S"]:
    """Raw inner products with every key in range, -inf elsewhere; S covers the whole page table."""
    width = pages.num_tiles * pages.tile_tokens

    def visit(tile: Array, scores: Array) -> Array:
        seen = keys.mask(pages.positions(tile))
        tile_scores = jnp.where(seen, _scores(q, pages.read(pages.k, tile)), -jnp.inf)
        start = pages.positions(tile)[0]
        return lax.dynamic_update_slice_in_dim(scores, tile_scores, start, axis=-1)

    return over_tiles(pages, keys, visit, jnp.full((*q.shape[:-1], width), -jnp.inf))


def attend_scores(
    scores: Float[Array, "K G T S"], pages: Pages, keys: KeyRange, head_dim: int
) -> Partial:
    """Softmax attention over the keys with a raw score; tiles where all are -inf are not read."""
    scores = scores * head_dim**-0.5
    top = jnp.max(scores, axis=-1)
    p = jnp.exp(scores - jnp.where(jnp.isneginf(top), 0.0, top)[..., None])
    total = jnp.sum(p, axis=-1)

    def visit(tile: Array, acc: Array) -> Array:
        first = pages.positions(tile)[0]
        weights = lax.dynamic_slice_in_dim(p, first, pages.tile_tokens, axis=-1)
        weights = jnp.where(pages.fresh(tile), weights, 0.0)
        used = jnp.any(weights > 0, axis=(0, 1, 2))

        def add() -> Array:
            v = jnp.where(used[:, None], pages.read(pages.v, tile), 0)
            return acc + _weigh(weights, v)

        return lax.cond(used.any(), add, lambda: acc)

    acc = over_tiles(pages, keys, visit, jnp.zeros((*scores.shape[:-1], head_dim)))
    safe = jnp.where(total > 0, total, 1.0)
    return Partial(acc / safe[..., None], jnp.where(total > 0, top + jnp.log(safe), -jnp.inf))


def over_tiles(pages: Pages, keys: KeyRange, visit: Callable[[Array, Any], Any], start: Any) -> Any:
    """Folds `visit` over the tiles that hold a key in some row's range."""
    size, some = pages.tile_tokens, keys.high > keys.low
    never = jnp.iinfo(jnp.int32).max

    def tiles(low: Array, high: Array) -> tuple[Array, Array]:
        first = jnp.min(jnp.where(some, low, never)) // size
        last = -(-jnp.max(jnp.where(some, high, 0)) // size)
        return jnp.minimum(first, pages.num_tiles), jnp.minimum(last, pages.num_tiles)

    if keys.gap_low is None or keys.gap_high is None:
        return lax.fori_loop(*tiles(keys.low, keys.high), visit, start)
    # Tiles before the gap, then those behind it; a tile on both sides is visited once.
    first, gap_first = tiles(keys.low, keys.gap_low)
    gap_last, last = tiles(keys.gap_high, keys.high)
    gap_last = jnp.maximum(gap_first, gap_last)
    skipped = gap_last - gap_first
    return lax.fori_loop(
        first,
        last - skipped,
        lambda i, carry: visit(jnp.where(i < gap_first, i, i + skipped), carry),
        start,
    )


def over_query_blocks(
    attend: Callable[..., Any], q: Float[Array, "K G T D"], positions: Int[Array, " T"], block: int
) -> Any:
    """Maps `attend(q [K,G,block,D], positions [block])` over blocks of T and joins results along T.

    Each result leaf has T as its third axis.
    """
    t = q.shape[2]
    if t <= block:
        return attend(q, positions)
    blocks = -(-t // block)
    pad = blocks * block - t
    # A padded row sits before every key: it attends to nothing.
    positions = jnp.pad(positions, (0, pad), constant_values=-1).reshape(blocks, block)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0)))
    q = jnp.moveaxis(q.reshape(*q.shape[:2], blocks, block, q.shape[3]), 2, 0)
    out = lax.map(lambda args: attend(*args), (q, positions))

    def join(leaf: Array) -> Array:
        leaf = jnp.moveaxis(leaf, 0, 2)
        return leaf.reshape(*leaf.shape[:2], blocks * block, *leaf.shape[4:])[:, :, :t]

    return jax.tree.map(join, out)


__all__ = ["KeyRange", "Pages", "attend_range", "attend_scores", "over_query_blocks", "score_range"]
