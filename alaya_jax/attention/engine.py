"""Attention of a batch, one layer, by a plan: select, attend, merge (AlayaDB, section 7.2).

Full          every key
Window        first and last keys
DIPR, TopK    the window, and the keys retrieved outside it: score through the index, select,
              attend, then merge the two partial attentions
Tiles         blocks of keys for each block of queries, in a prefill

On a mesh each device works on the sequences (data), heads (tensor) and pages (context) that it
holds. What crosses the context axis does not grow with the context: the best score, log-sum-exp and
sum of the partial attentions, each device's k best scores for `TopK`, and the mass (and what is
missing) beyond a few thresholds for `DIPR(recovery)` and `DIPR(error)`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from alaya_jax import cache
from alaya_jax.attention import kernels, met
from alaya_jax.attention.counts import Counts
from alaya_jax.attention.gradient import computed_by, not_reversed
from alaya_jax.attention.graph import attend_graph
from alaya_jax.attention.kept import attend_kept
from alaya_jax.attention.layer import LayerQueries
from alaya_jax.attention.paged import attend_range
from alaya_jax.attention.retrieve import retrieve
from alaya_jax.attention.rows import Axes, Held, Rows
from alaya_jax.attention.selection import select_tiles
from alaya_jax.attention.softmax import merge, merge_across, relative_error, share_read
from alaya_jax.attention.tiles import attend_list
from alaya_jax.attention.window import Split
from alaya_jax.cache import PageTable
from alaya_jax.cache.views import KeyRange, Pages, over_query_blocks
from alaya_jax.errors import RequestError
from alaya_jax.index import BOUND, Graph, GraphLayer, Graphs, LayerIndex
from alaya_jax.index.memory import LayerMemory
from alaya_jax.query import Full, Tiles, Window
from alaya_jax.query.plan import Plan
from alaya_jax.settings import under_own_settings
from alaya_jax.sharding import ShardingRules, across

QUERY_BLOCK = 128
"""Query tokens per step. It bounds the scores in memory, [H, QUERY_BLOCK, tile or context]."""

SCORES = 2**26
"""At most so many scores in memory: a query that scores all keys takes fewer tokens per step."""


@functools.partial(jax.jit, static_argnames=("mesh", "rules"))  # traced once, not once a layer
@under_own_settings
def attend(
    plan: Plan,
    q: Float[Array, "B T H D"],
    memory: LayerMemory,
    count: Int[Array, " B"],
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[Float[Array, "B T H D"], Counts]:
    """Causal attention of the last `count[b]` tokens of each sequence over its keys.

    Args:
      plan: which keys to attend to, and how to find them.
      q: queries of T tokens, rotated and unscaled; the output of tokens past `count` is zero.
      memory: pages of the layer, with the new tokens already written. The lengths in its table do
        *not* include them. `covered` is not used with a graph, which knows what it covers.
      count: int32 [B], new tokens of each sequence, at most T.
      mesh, rules: how the arrays are laid out; None: on one device.

    Returns:
      the attention output in q's dtype, and how many keys were read.

    Raises:
      RequestError: the plan asks a graph and none was given, pages are spread over the mesh
        without `PageTable.start`, or the pages do not suit the query.
      KernelError: the plan names an implementation that cannot run it.
    """
    batch = LayerQueries(q, memory, count)
    if mesh is None:
        return _attend(plan, batch)
    return _on_mesh(plan, batch, mesh, rules or ShardingRules())


@under_own_settings
def append(
    kv: cache.PagedKV,
    layer: int,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    table: PageTable,
    count: Int[Array, " B"],
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> cache.PagedKV:
    """`cache.append` on a mesh: each device writes to the pages that it holds.

    Raises:
      RequestError: pages are spread over the mesh without `PageTable.start`.
    """
    rules = rules or ShardingRules()
    if rules.axis("pages", mesh) is None or mesh is None:
        return cache.append(kv, layer, k, v, table, count)
    heads, pages = rules.axis("kv_heads", mesh), _page_axis(mesh, rules, table)
    pool, new = PartitionSpec(heads, pages), PartitionSpec(None, None, heads)
    write = jax.shard_map(
        cache.append_layer,
        mesh=mesh,
        in_specs=(pool, pool, new, new, _table_spec(table, None, pages), PartitionSpec()),
        out_specs=(pool, pool),
        check_vma=False,
    )
    return kv.replace_layer(layer, *write(kv.k[layer], kv.v[layer], k, v, table, count))


def _page_axis(mesh: Mesh, rules: ShardingRules, table: PageTable) -> str | None:
    """The mesh axis that pages are spread over, checked against the table."""
    axis = rules.axis("pages", mesh)
    if axis is not None and mesh.shape[axis] > 1 and table.start is None:
        raise RequestError(
            f"pages are spread over mesh axis {axis!r} of size {mesh.shape[axis]}, and the page "
            "table does not say which positions each device holds; give PageTable(start=...), as "
            "PagePool.table does, or use ShardingRules(pages=None)"
        )
    return axis


def _table_spec(table: PageTable, batch: str | None, pages: str | None) -> Any:
    entries: Any = PartitionSpec(batch, pages)
    length: Any = PartitionSpec(batch)
    return PageTable(entries, length, None if table.start is None else entries)


def _on_mesh(plan: Plan, batch: LayerQueries, mesh: Mesh, rules: ShardingRules) -> Any:
    memory = batch.memory
    # Only the plan's numbers go through shard_map: a plan that is rebuilt from the specs or tracers
    # that shard_map puts in their place would refuse them.
    numbers, structure = jax.tree.flatten(plan)
    spec: Any = PartitionSpec
    heads, pages = rules.axis("kv_heads", mesh), _page_axis(mesh, rules, memory.table)
    data = rules.axis("batch", mesh)
    if data is not None and (len(batch.q) % mesh.shape[data] or isinstance(memory.index, tuple)):
        data = None  # every device of that axis does all sequences
    by_head, pool = spec(data, None, heads), spec(heads, pages)
    places = LayerQueries(
        by_head,
        LayerMemory(
            pool,
            pool,
            _table_spec(memory.table, data, pages),
            _index_spec(memory.index, heads, pages),
            None if memory.covered is None else spec(data),
        ),
        spec(data),
    )
    axes = Axes(pages if pages is not None and mesh.shape[pages] > 1 else None, heads)

    def attend(numbers: list[Any], batch: LayerQueries) -> tuple[Array, Counts]:
        return _attend(
            jax.tree.unflatten(structure, numbers), dataclasses.replace(batch, axes=axes)
        )

    run = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=([spec(heads) if jnp.ndim(x) else spec() for x in numbers], places),
        out_specs=(by_head, Counts(*(by_head,) * 6)),
        check_vma=False,
    )
    return run(numbers, batch)


def _index_spec(index: LayerIndex | Graphs | None, heads: str | None, pages: str | None) -> Any:
    spec = PartitionSpec
    if isinstance(index, tuple):  # per kv head, and not laid out by pages
        return jax.tree.map(lambda x: spec(heads) if x.ndim else spec(), index)
    if index is None:
        return None
    of_pages = jax.tree.map(lambda x: spec(heads, pages), index.seen_by(None))
    return of_pages.seen_by(jax.tree.map(lambda x: spec(heads), index.basis))


def _attend(plan: Plan, asked: LayerQueries) -> tuple[Float[Array, "B T H D"], Counts]:
    of_graph = isinstance(plan.index, Graph) and plan.retrieves
    if of_graph and not isinstance(asked.memory.index, tuple):
        raise RequestError(f"{plan}: no graph was given; a session gets it from its context")
    choice = kernels.choose(plan, asked)
    by_xla = choice.implementation == "xla" or asked.memory.host is not None

    def by_kernels(plan: Plan, asked: LayerQueries) -> tuple[Float[Array, "B T H D"], Counts]:
        return kernels.attend(plan, asked, choice.implementation, choice.target)

    if not isinstance(plan.query, Full | Window):
        out, counts = _by_xla(plan, asked) if by_xla else by_kernels(plan, asked)
        return not_reversed(out, type(plan.query).__name__), counts
    asked = dataclasses.replace(asked, memory=dataclasses.replace(asked.memory, index=None))
    return _by_xla(plan, asked) if by_xla else computed_by(by_kernels, _by_xla, plan, asked)


def _by_xla(plan: Plan, asked: LayerQueries) -> tuple[Float[Array, "B T H D"], Counts]:
    q, memory, axes = asked.q, asked.memory, asked.axes
    table, index = memory.table, memory.index
    batch, t, heads, dim = q.shape
    kv_heads, _, page, _ = memory.k.shape
    rows = jnp.transpose(q.reshape(batch, t, kv_heads, heads // kv_heads, dim), (0, 2, 3, 1, 4))
    offset = jnp.arange(t)
    positions = jnp.where(offset < asked.count[:, None], table.length[:, None] + offset, -1)
    block = QUERY_BLOCK
    if plan.retrieves:
        columns = table.pages.shape[1] * page
        listed = plan.index.capacity if isinstance(plan.index, Graph) else 0
        block = max(1, min(block, SCORES // (heads * max(columns, listed))))

    def one(args: Any, index: Any = index) -> tuple[Array, Counts]:
        row, position, ids, start, covered = args
        held = Held(Pages(*memory.pools, ids, start), index, covered, axes)
        if isinstance(plan.query, Tiles):
            return _attend_tiles(plan.query, row, position, held)
        return over_query_blocks(lambda q, p: _attend_rows(plan, q, p, held), row, position, block)

    each = (rows, positions, table.pages, table.start, asked.covered)
    if isinstance(index, tuple):  # graphs differ in size, so no loop can stack them
        done = [one(_sequence(each, b), graph) for b, graph in enumerate(index)]
        out, counts = jax.tree.map(lambda *x: jnp.stack(x), *done)
    elif batch == 1:
        out, counts = jax.tree.map(lambda x: x[None], one(_sequence(each, 0)))
    else:
        # One sequence at a time, so that each costs its own length and not that of the longest.
        out, counts = lax.map(one, each)
    out = jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(batch, t, heads, dim)
    counts = counts.by_row(lambda x: jnp.transpose(x, (0, 3, 1, 2)).reshape(batch, t, heads))
    return out.astype(q.dtype), counts


def _sequence(arrays: Any, b: int) -> Any:
    return jax.tree.map(lambda x: x[b], arrays)


def _attend_tiles(
    rule: Tiles, q: Float[Array, "K G T D"], positions: Int[Array, " T"], held: Held
) -> tuple[Float[Array, "K G T D"], Counts]:
    """Attention of one sequence over listed blocks of keys, for `Tiles`."""
    t, pages, axis = q.shape[2], held.pages, held.axes.pages
    tiles = select_tiles(q, pages, positions, rule)
    partial, attended, _ = attend_list(q, pages, positions, tiles, rule.beta)
    block = jnp.arange(t) // tiles.q_block
    listed = (tiles.count * tiles.kv_block)[:, None, block]  # [K, 1, T]
    first = jnp.arange(t) % tiles.q_block == 0
    scored, read = (jnp.broadcast_to(x, attended.shape) for x in (listed, listed * first))
    attended, scored, read = (across(lax.psum, x, axis) for x in (attended, scored, read))
    mass = tiles.mass[:, :, block] if rule.recovery is not None else jnp.full(q.shape[:-1], jnp.nan)
    # Each device estimates a share of its own mass; the lowest bounds the share of the whole.
    mass = across(lax.pmin, mass, axis)
    counts = Counts.of(q.shape[:-1], attended, scored, read, mass)
    return merge_across(partial, axis).out, counts


def _attend_rows(
    plan: Plan, q: Float[Array, "K G T D"], positions: Int[Array, " T"], held: Held
) -> tuple[Float[Array, "K G T D"], Counts]:
    """Attention of one sequence. A query at position p sees keys 0..p; at p = -1 it sees none."""
    zero, end = jnp.zeros_like(positions), positions + 1
    query, pages, index, axis = plan.query, held.pages, held.index, held.axes.pages
    counts = functools.partial(Counts.of, q.shape[:-1])

    if isinstance(query, Full):
        partial, _ = attend_range(q, pages.read_by(q), KeyRange(zero, end))
        return merge_across(partial, axis).out, counts(end, end, mass=1.0)

    window = query if isinstance(query, Window) else query.window
    split = Split.of(window, end, index.length if isinstance(index, GraphLayer) else None)
    inside, best = attend_range(q, pages, split.inside)
    inside, best = merge_across(inside, axis), across(lax.pmax, best, axis)
    in_window = split.size
    of_window = met.of_window(pages, split) if met.kept_account(plan, pages) else None
    if isinstance(query, Window):
        return inside.out, counts(in_window, in_window, met=of_window)

    rows = Rows(q, held, split.outside, inside, best)
    if isinstance(index, GraphLayer):
        found = attend_graph(plan, rows)
        attended, scored = found.attended + in_window, found.scored + in_window
        all_met = met.together(of_window, found.met)
        total = counts(attended, scored, found.read, widened=found.widened, met=all_met)
        return merge(inside, found.partial).out, total
    found = retrieve(plan, rows)
    partial, attended, read = attend_kept(q, found.kept, found.floor)
    parts = [inside, merge_across(partial, axis)]
    mass = found.share_read(merge(*parts))
    if plan.tail:
        unread = merge_across(found.tail(rows), axis)
        mass = share_read(merge(*parts).lse, unread.lse + BOUND) if mass is None else mass
        parts.append(unread)
    # A block of tokens shares one read of its keys: count it for the first token.
    read = jnp.where(jnp.arange(q.shape[2]) == 0, read[:, None, None], 0)
    attended, read = (across(lax.psum, x, axis) for x in (attended, read))
    mass = jnp.nan if mass is None else mass
    whole = merge(*parts)
    error = jnp.nan if found.missing is None else relative_error(found.missing, whole)
    all_met = met.together(of_window, found.met)
    total = counts(attended + in_window, end, read, mass, error=error, met=all_met)
    return whole.out, total
