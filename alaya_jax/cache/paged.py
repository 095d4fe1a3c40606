"""Pages of keys and values, and tables that say which pages make a sequence. Pure functions.

A page is Z consecutive tokens of one sequence, for one layer and all kv heads. Sequences share
pages; whoever writes must own the page alone (see `allocator.py` for copy on write).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alaya_jax.cache.tiers import Pool, Tiers
from alaya_jax.models.config import LlamaConfig
from alaya_jax.sharding import ShardingRules

NO_PAGE = 0
"""The page that belongs to nobody. What must not be written goes there, so that no write needs a
condition: a conditional write reads the page first, and looks to the compiler like the whole pool.
"""

UNUSED = 2**30
"""The `start` of a table's entry that holds no page: past every position."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKV:
    """Keys (after RoPE) and values of every layer.

    One array a layer, not one array with a layer axis: a layer's update then touches that layer's
    buffer only, in place when the cache is donated.

    Attributes:
      k, v: L arrays [K, P, Z, D].
    """

    k: tuple[Float[Array, "K P Z D"], ...]
    v: tuple[Float[Array, "K P Z D"], ...]

    @classmethod
    def create(
        cls,
        config: LlamaConfig,
        num_pages: int,
        page_size: int,
        dtype: jax.typing.DTypeLike,
        mesh: jax.sharding.Mesh | None = None,
        rules: ShardingRules | None = None,
        *,
        each: Callable[..., Iterable[Array]] = map,
    ) -> "PagedKV":
        """An empty cache of `num_pages` pages; on a mesh, kv heads and pages sharded by `rules`.

        `each` makes the arrays, as `map` does, one after another.
        """
        shape = (page_size, config.head_dim)

        def zeros(_: int) -> Array:
            return page_zeros(config, num_pages, mesh, rules, shape, dtype)

        made = tuple(each(zeros, range(2 * config.num_hidden_layers)))
        return cls(made[::2], made[1::2])

    @property
    def num_pages(self) -> int:
        """P."""
        return self.k[0].shape[1]

    @property
    def page_size(self) -> int:
        """Z, tokens."""
        return self.k[0].shape[2]

    def replace_layer(self, layer: int, k: Array, v: Array) -> "PagedKV":
        """The same cache with other pages in one layer."""
        return PagedKV(_replaced(self.k, layer, k), _replaced(self.v, layer, v))

    def part(self, first: int, count: int) -> "PagedKV":
        """Of some consecutive layers."""
        return PagedKV(self.k[first : first + count], self.v[first : first + count])

    def replace_part(self, first: int, part: "PagedKV") -> "PagedKV":
        """The same cache with another in place of some consecutive layers."""
        end = first + len(part.k)
        return PagedKV(
            (*self.k[:first], *part.k, *self.k[end:]), (*self.v[:first], *part.v, *self.v[end:])
        )

    def __repr__(self) -> str:
        if not isinstance(self.k[0], jax.Array | jax.ShapeDtypeStruct):
            return "PagedKV(...)"  # a tree of something else, while jax transforms it
        heads, pages, size, dim = self.k[0].shape
        return (
            f"PagedKV({len(self.k)} layers, {pages} pages of {size} tokens, "
            f"{heads} kv heads of {dim}, {self.k[0].dtype})"
        )


def page_zeros(
    config: LlamaConfig,
    num_pages: int,
    mesh: jax.sharding.Mesh | None,
    rules: ShardingRules | None,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
) -> Array:
    """An array [K, P, *shape] of zeros, where the cache of this mesh lies."""
    rules, shape = rules or ShardingRules(), (config.num_key_value_heads, num_pages, *shape)
    if mesh is None:
        return _zeros(shape, jnp.dtype(dtype))
    return jnp.zeros(shape, dtype, device=rules.sharding(mesh, ("kv_heads", "pages"), shape))


@functools.partial(jax.jit, static_argnums=(0, 1))  # one program; jnp.zeros alone is two
def _zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
    return jnp.zeros(shape, dtype)


def _replaced(arrays: tuple[Array, ...], i: int, new: Array) -> tuple[Array, ...]:
    return (*arrays[:i], new, *arrays[i + 1 :])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Which pages hold a batch of sequences.

    Attributes:
      pages: int32 [B, N], page ids in order; entries past a sequence's last page are never read as
        keys.
      length: int32 [B], tokens that each sequence holds.
      start: int32 [B, N], position of each page's first token, ascending; `UNUSED` for entries past
        the last page. None: entry i starts at i * Z. It is given when pages are spread over the
        context axis of a mesh, where a device holds some of a sequence's pages: N is then split
        over that axis like the pool's P, and ids count from the first page of the device.
    """

    pages: Int[Array, "B N"]
    length: Int[Array, " B"]
    start: Int[Array, "B N"] | None = None


def append(
    kv: PagedKV,
    layer: int,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    table: PageTable,
    count: Int[Array, " B"],
) -> PagedKV:
    """Writes `count[b]` new tokens of one layer behind the `length[b]` tokens of each sequence.

    The pages that are written must be in the table and owned by that sequence alone; tokens past
    `count` are not written.
    """
    return kv.replace_layer(layer, *append_layer(kv.k[layer], kv.v[layer], k, v, table, count))


def append_layer(
    k_pages: Float[Array, "K P Z D"],
    v_pages: Float[Array, "K P Z D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    table: PageTable,
    count: Int[Array, " B"],
) -> tuple[Array, Array]:
    """`append` to the pages of one layer."""
    return _append(k_pages, k, table, count), _append(v_pages, v, table, count)


def _append(pool: Array, new: Array, table: PageTable, count: Array) -> Array:
    size = pool.shape[2]
    new = new.astype(pool.dtype)
    t = new.shape[1]
    if t == 1:
        page = _page_at(table, (table.length // size)[:, None], size)[:, 0]
        page = jnp.where(count > 0, page, NO_PAGE)
        return _put(pool, (page, table.length % size), new[:, 0].swapaxes(0, 1))
    # Whole pages at a time (an update a page, not an update a token): the touched pages are read,
    # overlaid with the new tokens, and written back.
    touched = -(-t // size) + 1
    first = table.length // size
    index = first[:, None] + jnp.arange(touched)  # [B, touched]
    page = _page_at(table, index, size)
    position = index[:, :, None] * size + jnp.arange(size)  # [B, touched, Z]
    source = position - table.length[:, None, None]
    fresh = (source >= 0) & (source < count[:, None, None])
    source = jnp.clip(source, 0, t - 1).reshape(source.shape[0], -1, 1, 1)
    values = jnp.take_along_axis(new, source, axis=1).reshape(*position.shape, *new.shape[2:])
    values = jnp.where(fresh[None, ..., None], jnp.moveaxis(values, 3, 0), pool[:, page])
    return _put(pool, (jnp.where(fresh.any(-1), page, NO_PAGE),), values)


def _page_at(table: PageTable, index: Int[Array, "B n"], size: int) -> Int[Array, "B n"]:
    """Ids of a sequence's pages number `index`; `NO_PAGE` for those of other devices."""
    if table.start is None:
        return jnp.take_along_axis(table.pages, index, axis=1, mode="clip")
    entry = jax.vmap(jnp.searchsorted)(table.start, index * size)
    start, page = (
        jnp.take_along_axis(x, entry, axis=1, mode="clip") for x in (table.start, table.pages)
    )
    return jnp.where(start == index * size, page, NO_PAGE)


def _put(pool: Array, where: tuple[Array, ...], values: Array) -> Array:
    return pool.at[(slice(None), *where)].set(values, mode="promise_in_bounds")


def copy_pages(kv: PagedKV, source: Int[Array, " N"], target: Int[Array, " N"]) -> PagedKV:
    """Copies pages `source[i]` to `target[i]` in every layer."""
    return jax.tree.map(lambda pool: _put(pool, (target,), pool[:, source]), kv)


def write_pages(
    pool: Float[Array, "K P Z D"], pages: Int[Array, " N"], new: Float[Array, "K N Z D"]
) -> Float[Array, "K P Z D"]:
    """Writes whole pages; what is meant for `NO_PAGE` is lost."""
    return _put(pool, (pages,), new.astype(pool.dtype))


def read_tokens(pool: Pool, pages: Int[Array, " N"]) -> Float[Array, "K N*Z D"]:
    """The tokens of a list of pages, in order."""
    heads, _, size, dim = pool.shape
    read = pool.pages(pages) if isinstance(pool, Tiers) else pool[:, pages]
    return read.reshape(heads, pages.shape[0] * size, dim)
