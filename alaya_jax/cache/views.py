"""A sequence's pages as one device sees them, read tile by tile; scores over a range of them.

A tile is some consecutive pages of the sequence. The loop's trip count follows the true length, so
cost and compiled program do not depend on how long the page table is. A tile whose pages are
consecutive in the pool too (the allocator sees to it) is read as one slice; else page by page.

Everything here is for one sequence, with query rows `[K, G, T]`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alaya_jax.cache.paged import UNUSED
from alaya_jax.cache.tiers import Pool, Tiers
from alaya_jax.pallas_kernels.dispatch import current_target

TILE_TOKENS = 512
"""Keys a tile: large enough for the loop's overhead, small enough to stay in a core's cache."""

FEW_ROWS = 16
"""Query rows of a kv head, at most, for which time goes into reading keys, not scoring them."""

LONG_TILE = 4096
"""Keys a tile, at most, for few rows that see all of a long sequence."""

WINDOW_TILE = 256
"""Keys a tile for few rows that see the ends of a range: its tiles reach less beyond them."""

DEVICE_TOKENS = 2**16
"""Keys a tile for few rows on a GPU, where each turn of a loop costs some launches and a wait for
the host."""

Read = Callable[[Pool, Array], Array]
"""(pool [K, P, Z, D], tile) -> keys or values [K, S, D] of the tile's tokens."""


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

    def mask(self, positions: Int[Array, "... S"]) -> Array:
        """bool [..., T, S]: whether the key at each position is in the row's range."""
        at = positions[..., None, :]
        seen = (at >= self.low[:, None]) & (at < self.high[:, None])
        if self.gap_low is None or self.gap_high is None:
            return seen
        return seen & ((at < self.gap_low[:, None]) | (at >= self.gap_high[:, None]))


@dataclasses.dataclass(frozen=True)
class Pages:
    """One layer's keys and values of one sequence, as far as a device holds them.

    Tokens are numbered by *column*: the one in slot z of entry i has column i * Z + z. Arrays of
    scores go by column, S of them. Columns ascend with positions, and equal them where the device
    holds all pages of the sequence.

    Attributes:
      k, v: [K, P, Z, D], the pool, or two under one numbering.
      ids: int32 [N], the sequence's pages.
      start: int32 [N], position of each page's first token; None: i * Z.
      tile: tokens a tile, about; None: `TILE_TOKENS`. Static.
    """

    k: Float[Array, "K P Z D"] | Tiers
    v: Float[Array, "K P Z D"] | Tiers
    ids: Int[Array, " N"]
    start: Int[Array, " N"] | None = None
    tile: int | None = None

    @property
    def size(self) -> int:
        """Z, tokens a page."""
        return self.k.shape[2]

    @property
    def columns(self) -> int:
        """S, tokens of the whole table."""
        return self.ids.shape[0] * self.size

    @property
    def tile_pages(self) -> int:
        """Pages a tile."""
        return max(1, min((self.tile or TILE_TOKENS) // self.size, self.ids.shape[0]))

    @property
    def tile_tokens(self) -> int:
        """Tokens a tile."""
        return self.tile_pages * self.size

    @property
    def num_tiles(self) -> int:
        """Tiles of the whole table."""
        return -(-self.ids.shape[0] // self.tile_pages)

    def in_tiles(self, tokens: int | None) -> "Pages":
        """The same in tiles of so many tokens on a CPU, of `DEVICE_TOKENS` elsewhere."""
        return dataclasses.replace(self, tile=tokens if on_cpu() else DEVICE_TOKENS)

    def read_by(self, q: Float[Array, "K G T D"]) -> "Pages":
        """The same in tiles fit for queries that see all keys: a sixteenth of a long sequence, for
        few rows on a CPU. There XLA copies and multiplies large tiles faster.
        """
        if self.tile is not None or not on_cpu() or q.shape[1] * q.shape[2] > FEW_ROWS:
            return self
        tile = max(TILE_TOKENS, min(self.columns // 16, LONG_TILE))
        return dataclasses.replace(self, tile=tile)

    def first_page(self, tile: Array) -> Array:
        """Entry that a tile begins with: the last tile may reach back into the one before."""
        return jnp.minimum(tile * self.tile_pages, self.ids.shape[0] - self.tile_pages)

    def tile_ids(self, tile: Array) -> Int[Array, " n"]:
        """Ids of a tile's pages."""
        return lax.dynamic_slice_in_dim(self.ids, self.first_page(tile), self.tile_pages)

    def first_column(self, tile: Array) -> Array:
        """Column that a tile begins with."""
        return self.first_page(tile) * self.size

    def positions(self, tile: Array) -> Int[Array, " S"]:
        """Positions of the tokens of a tile."""
        if self.start is None:
            return self.first_column(tile) + jnp.arange(self.tile_tokens)
        start = lax.dynamic_slice_in_dim(self.start, self.first_page(tile), self.tile_pages)
        return (start[:, None] + jnp.arange(self.size)).ravel()

    def starts(self) -> Int[Array, " N"]:
        """Position of each entry's first token."""
        return jnp.arange(self.ids.shape[0]) * self.size if self.start is None else self.start

    def position_of(self, column: Int[Array, "..."]) -> Int[Array, "..."]:
        """Position of the token in each column."""
        if self.start is None:
            return column
        return jnp.take(self.start, column // self.size, mode="clip") + column % self.size

    def all_positions(self) -> Int[Array, " S"]:
        """Position of every column."""
        return self.position_of(jnp.arange(self.columns))

    def before(self, position: Array) -> Int[Array, ""]:
        """How many entries begin before a position."""
        if self.start is None:
            return jnp.clip(-(-position // self.size), 0, self.ids.shape[0])
        return jnp.sum(self.start < position, dtype=jnp.int32)

    def fresh(self, tile: Array) -> Array:
        """bool [S]: tokens of a tile that no earlier tile holds (the last tile may reach back)."""
        column = self.first_column(tile) + jnp.arange(self.tile_tokens)
        return column >= tile * self.tile_tokens

    def is_run(self, end: Array) -> Array:
        """Whether the tiles up to entry `end` can be read as slices of the pool."""
        n, entry = self.tile_pages, jnp.arange(self.ids.shape[0])
        last = self.first_page(jnp.maximum(-(-end // n) - 1, 0))
        in_order = (self.ids == self.ids[0] + entry) | (entry >= end)
        if isinstance(self.k, Tiers):
            return jnp.all(in_order) & self.k.is_run(self.ids[0], last + n)
        return jnp.all(in_order) & (self.ids[0] + last + n <= self.k.shape[1])

    def read_run(self, pool: Pool, tile: Array) -> Array:
        """A tile [K, n, ...] of any pool of these pages, where `is_run`."""
        if isinstance(pool, Tiers):
            return pool.run(self.ids[0] + self.first_page(tile), self.tile_pages)
        return lax.dynamic_slice_in_dim(
            pool, self.ids[0] + self.first_page(tile), self.tile_pages, axis=1
        )

    def read(self, pool: Pool, tile: Array) -> Float[Array, "K S D"]:
        """The keys or values of a tile; float32 on CPU, whose other matmuls are slow."""
        ids = self.tile_ids(tile)
        pages = read_pages(pool, ids)
        tokens = pages.reshape(pages.shape[0], -1, pages.shape[3])
        return tokens.astype(jnp.float32) if on_cpu() else tokens

    def gather(self, pool: Pool, column: Int[Array, "K C"]) -> Float[Array, "K C D"]:
        """Keys or values in these columns, in `operand_dtype`; a column past S reads any."""
        page = jnp.take(self.ids, column // self.size, mode="clip")
        if isinstance(pool, Tiers):
            head = jnp.arange(pool.shape[0])[:, None]
            rows = pool.tokens(head, page, column % self.size)
        else:
            rows = jax.vmap(lambda pool, p, z: pool[p, z])(pool, page, column % self.size)
        return rows.astype(self.operand_dtype)

    @property
    def operand_dtype(self) -> jnp.dtype:
        """The dtype that scores are computed in, from queries as well as keys."""
        return jnp.dtype(jnp.float32 if on_cpu() else self.k.dtype)


def on_cpu() -> bool:
    """Whether what is traced now is for a CPU: also where it is compiled for a GPU elsewhere."""
    return current_target().platform == "cpu"


def read_pages(pool: Pool, ids: Array) -> Array:
    """Pages `ids` of a pool [K, P, ...]."""
    return read_on_cpu(pool, ids) if on_cpu() or isinstance(pool, Tiers) else pool[:, ids]


def read_on_cpu(pool: Pool, ids: Array) -> Array:
    """Pages `ids` of a pool [K, P, ...], copied as one slice if they are a run, else page by page.

    A gather is no faster, and the compiler would account for it as a read of the whole pool. The
    pool must come as it is: reshaped here, it would be copied whole into the branches.
    """
    heads, num_pages, *page_shape = pool.shape
    n = ids.shape[0]

    def run(first: Array, n: int) -> Array:
        if isinstance(pool, Tiers):
            return pool.run(first, n)
        return lax.dynamic_slice_in_dim(pool, first, n, axis=1)

    def page_by_page() -> Array:
        def copy(i: Array, tile: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(tile, run(ids[i], 1), i, axis=1)

        return lax.fori_loop(0, n, copy, jnp.zeros((heads, n, *page_shape), pool.dtype))

    if n > num_pages:  # a table wider than the pool repeats pages past a sequence's end
        return page_by_page()
    is_run = jnp.all(ids == ids[0] + jnp.arange(n))
    if isinstance(pool, Tiers):
        if n > min(pool.device.shape[1], pool.host.shape[1]):
            return page_by_page()
        is_run &= pool.is_run(ids[0], n)
    else:
        is_run &= ids[0] + n <= num_pages
    return lax.cond(is_run, lambda: run(ids[0], n), page_by_page)


def products(q: Array, k: Array) -> Float[Array, "K G T S"]:
    """Raw inner products of queries [K, G, T, D] with keys [K, S, D], float32."""
    if on_cpu() and q.shape[1] * q.shape[2] <= FEW_ROWS:
        # Keys as rows: a CPU reads them as they lie, where else it would lay them out anew.
        by_key = jnp.einsum("ksd,kgtd->ksgt", k, q.astype(k.dtype))
        return jnp.moveaxis(by_key, 1, -1).astype(jnp.float32)
    return jnp.einsum("kgtd,ksd->kgts", q.astype(k.dtype), k, preferred_element_type=jnp.float32)


def score_range(
    q: Float[Array, "K G T D"],
    pages: Pages,
    keys: KeyRange,
    into: Float[Array, "K G T S"] | None = None,
) -> Float[Array, "K G T S"]:
    """Raw inner products with every key in range; elsewhere what `into` holds, or -inf."""

    def visit(read: Read, tile: Array, scores: Array) -> Array:
        seen = keys.mask(pages.positions(tile))
        start, n = pages.first_column(tile), pages.tile_tokens
        new = products(q, read(pages.k, tile))
        old = lax.dynamic_slice_in_dim(scores, start, n, axis=-1)
        return lax.dynamic_update_slice_in_dim(scores, jnp.where(seen, new, old), start, axis=-1)

    pages, fold = reader(q, pages, keys)
    return fold(visit, jnp.full((*q.shape[:-1], pages.columns), -jnp.inf) if into is None else into)


def reader(q: Array, pages: Pages, keys: KeyRange) -> tuple[Pages, Callable[[Any, Any], Any]]:
    """The pages in tiles fit for that many query rows, and what folds `visit(read, tile, carry)`
    over those in range.

    For few rows on a CPU most time goes into reading. There the loop is compiled twice: in the one
    for consecutive pages what is sliced goes straight to where it is used.
    """
    few = on_cpu() and q.shape[1] * q.shape[2] <= FEW_ROWS
    if few and keys.gap_low is not None:
        pages = dataclasses.replace(pages, tile=min(WINDOW_TILE, TILE_TOKENS))

    def by(read: Read) -> Callable[[Any, Any], Any]:
        return lambda visit, start: over_tiles(pages, keys, functools.partial(visit, read), start)

    if not few or keys.gap_low is not None or pages.tile_pages > pages.k.shape[1]:
        return pages, by(pages.read)

    def as_tokens(pool: Pool, tile: Array) -> Array:
        run = pages.read_run(pool, tile)
        return run.reshape(run.shape[0], -1, run.shape[3]).astype(jnp.float32)

    def fold(visit: Any, start: Any) -> Any:
        is_run = pages.is_run(pages.before(jnp.max(keys.high)))
        whole, parts = by(as_tokens), by(pages.read)
        return lax.cond(is_run, lambda: whole(visit, start), lambda: parts(visit, start))

    return pages, fold


def over_tiles(pages: Pages, keys: KeyRange, visit: Callable[[Array, Any], Any], start: Any) -> Any:
    """Folds `visit` over the tiles that hold a key in some row's range."""
    n, some = pages.tile_pages, keys.high > keys.low

    def tiles(low: Array, high: Array) -> tuple[Array, Array]:
        # A page that begins `size` or more before the lowest position ends before it.
        lowest = jnp.min(jnp.where(some, low, UNUSED))
        first = pages.before(lowest - pages.size + 1) // n
        last = -(-pages.before(jnp.max(jnp.where(some, high, 0))) // n)
        return first, last

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
