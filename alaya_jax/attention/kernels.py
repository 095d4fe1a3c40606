"""Attention by the operations of `pallas_kernels`, for all sequences of a batch at once.

One new token of each sequence
  Full                   paged_decode over the sequence's pages
  Window                 paged_decode over the window's pages
  DIPR(beta) @ Sketch()  sketch_select finds the pages that may hold the best key, paged_decode its
                         score; then the pages that may hold a key in range, attended to with the
                         exact threshold
  another DIPR or TopK   the scan and the selection are the engine's own (`retrieve`); paged_decode
                         over the pages that hold a kept key, with a mask of keys

A chunk of new tokens
  Full                   block_sparse_prefill
  Tiles                  block_sparse_prefill with the lists of `select_tiles`

What is selected and counted is what `engine` selects and counts without kernels, except `read`:
here pages are read whole.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.attention.counts import Counts
from alaya_jax.attention.paged import KeyRange, Pages
from alaya_jax.attention.partial import Partial, across, merge, merge_across
from alaya_jax.attention.retrieve import retrieve
from alaya_jax.attention.selection import select_tiles
from alaya_jax.cache import PageTable
from alaya_jax.errors import KernelError
from alaya_jax.index import MISS, Graph, LayerIndex, Sketch, SketchLayer
from alaya_jax.index.codes import round_query
from alaya_jax.pallas_kernels.block_sparse_prefill import QUERY_BLOCK, block_sparse_prefill
from alaya_jax.pallas_kernels.block_sparse_prefill import choose as choose_prefill
from alaya_jax.pallas_kernels.dispatch import Choice, Target, current_target
from alaya_jax.pallas_kernels.page_lists import compact
from alaya_jax.pallas_kernels.paged_decode import PagedDecode, paged_decode
from alaya_jax.pallas_kernels.paged_decode import choose as choose_decode
from alaya_jax.pallas_kernels.sketch_select import Codes, bounds, wanted
from alaya_jax.pallas_kernels.sketch_select import Query as SketchQuery
from alaya_jax.pallas_kernels.sketch_select import choose as choose_select
from alaya_jax.query import DIPR, Full, Tiles, Window
from alaya_jax.query.plan import Plan

BLOCK = 128
"""Keys of a tile of a dense prefill."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One layer's queries and pages, of all sequences.

    Attributes:
      q: [B, T, H, D], rotated, unscaled.
      k, v: [K, P, Z, D], the pool.
      table: pages, and the lengths before the new tokens.
      count: int32 [B], new tokens of each sequence.
      index: what the plan's index holds.
      covered: int32 [B], keys that it knows.
      axis, head_axis: mesh axes that pages and heads are split over, inside shard_map.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "K P Z D"]
    v: Float[Array, "K P Z D"]
    table: PageTable
    count: Int[Array, " B"]
    index: LayerIndex | None
    covered: Int[Array, " B"]
    axis: str | None = dataclasses.field(default=None, metadata={"static": True})
    head_axis: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def starts(self) -> Int[Array, "B N"]:
        """Position of the first token of each page."""
        if self.table.start is not None:
            return self.table.start
        b, n = self.table.pages.shape
        return jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32) * self.k.shape[2], (b, n))


def unfit(plan: Plan, batch: Batch, implementation: str, target: Target) -> str | None:
    """Why kernels of this implementation cannot answer a plan; None if they can.

    Looks at shapes and types only; arrays may be `jax.ShapeDtypeStruct`s.
    """
    t = batch.q.shape[1]
    if isinstance(plan.index, Graph) and plan.retrieves:
        return "a graph is walked key by key"
    if t == 1 and isinstance(plan.query, Tiles):
        return "Tiles are of a chunk of tokens, and this is one token"
    found = (_decode_choice if t == 1 else _prefill_choice)(plan, batch, target)
    return found if isinstance(found, str) else _passed_over(found, implementation)


def attend(
    plan: Plan, batch: Batch, implementation: str, target: Target
) -> tuple[Float[Array, "B T H D"], Counts]:
    """As `engine.attend`; for plans and shapes that are not `unfit`."""
    run = _decode if batch.q.shape[1] == 1 else _prefill
    out, counts = run(plan, batch, {"implementation": implementation, "target": target})
    return out.astype(batch.q.dtype), counts


def _passed_over(choice: Choice, implementation: str) -> str | None:
    """Why an operation would not run by this implementation."""
    if implementation in (choice.implementation, "reference"):
        return None
    reasons = dict(choice.passed_over)
    return f"{choice.op}: {reasons.get(implementation, 'it has no such implementation')}"


def _array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _decode_choice(plan: Plan, batch: Batch, target: Target) -> Choice | str:
    del plan
    (b, _, h, d), n = batch.q.shape, batch.table.pages.shape[1]
    listed = (_array(b, 1, n), _array(b, 1), _array(b))
    q = _array(b, h, d, dtype=batch.q.dtype)
    return choose_decode(q, batch.k, batch.v, *listed, target=target)


def _prefill_choice(plan: Plan, batch: Batch, target: Target) -> Choice | str:
    block = BLOCK
    if isinstance(plan.query, Tiles):
        if plan.query.kv_block is None or plan.query.q_block != QUERY_BLOCK:
            return (
                f"Tiles(q_block={plan.query.q_block}, kv_block={plan.query.kv_block}): blocks are "
                f"of {QUERY_BLOCK} queries, and of 64 or 128 keys"
            )
        block = plan.query.kv_block
    elif not isinstance(plan.query, Full):
        return f"a chunk of tokens is answered for Full and Tiles, not {type(plan.query).__name__}"
    if batch.table.start is not None:
        return "pages of a chunk's sequences are spread over devices"
    if block % batch.k.shape[2]:
        return f"pages of {batch.k.shape[2]} tokens do not fill a block of {block}"
    table = batch.table
    args = (batch.q, batch.k, batch.v, table.pages, table.length, batch.count)
    return choose_prefill(*args, block_kv=block, target=target)


def _by_sketch(plan: Plan, batch: Batch, implementation: str, target: Target) -> bool:
    """Whether `sketch_select` finds the pages."""
    if not (
        isinstance(plan.query, DIPR)
        and plan.query.recovery is None
        and plan.index == Sketch(4)
        and isinstance(batch.index, SketchLayer)
        and (plan.by, plan.share, plan.tail) == ("key", "head", False)
        and batch.table.start is None
    ):
        return False
    (b, _, h, d), n = batch.q.shape, batch.table.pages.shape[1]
    numbers = (_array(b, h, dtype=jnp.float32),) * 3
    query = SketchQuery(
        _array(b, h, d, dtype=batch.q.dtype), _array(b, h, d, dtype=jnp.int8), *numbers
    )
    pages = (_array(b, n), _array(b), _array(b))
    chosen = choose_select(query, _codes(batch.index), *pages, target=target)
    return _passed_over(chosen, implementation) is None


# One new token ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Listed:
    """Pages to read, in the order of the sequence.

    Attributes:
      index: int32 [B, J, N], which entries of the table; J is K, or 1 for all kv heads.
      count: int32 [B, J].
    """

    index: Int[Array, "B J N"]
    count: Int[Array, "B J"]


def _list(keep: Bool[Array, "B J N"]) -> _Listed:
    return _Listed(*compact(keep))


class _Reader:
    """`paged_decode` of a batch's queries, over some of the pages."""

    def __init__(self, batch: Batch, end: Int[Array, " B"], options: dict[str, Any]):
        self.batch, self.end, self.options = batch, end, options

    def __call__(
        self, listed: _Listed, high: Int[Array, " B"] | None = None, **keys: Any
    ) -> PagedDecode:
        """`high` and `keys`: what is seen of those pages; see `paged_decode`."""
        batch = self.batch

        def of_list(x: Int[Array, "B N"]) -> Int[Array, "B J N"]:
            return jnp.take_along_axis(x[:, None], listed.index, axis=2)

        return paged_decode(
            batch.q[:, 0],
            batch.k,
            batch.v,
            of_list(batch.table.pages),
            listed.count,
            self.end if high is None else high,
            starts=of_list(batch.starts),
            want_kept=True,
            **keys,
            **self.options,
        )


def _partial(part: PagedDecode, axis: str | None) -> Partial:
    return merge_across(Partial(part.out, part.lse), axis)


def _decode(plan: Plan, batch: Batch, options: dict[str, Any]) -> tuple[Array, Counts]:
    query, axis = plan.query, batch.axis
    b, _, heads, _ = batch.q.shape
    z = batch.k.shape[2]
    end = jnp.where(batch.count > 0, batch.table.length + 1, 0)
    read = _Reader(batch, end, options)
    starts = batch.starts

    def counts(attended: Array, scored: Array, **more: Any) -> Counts:
        return Counts.of((b, 1, heads), attended, scored, **more)

    if isinstance(query, Full):
        # Entries ascend, so those before the end come first: no list is made.
        held = jnp.sum(starts < end[:, None], axis=1, dtype=jnp.int32)[:, None]
        part = paged_decode(
            batch.q[:, 0],
            batch.k,
            batch.v,
            batch.table.pages[:, None],
            held,
            end,
            starts=None if batch.table.start is None else starts[:, None],
            **options,
        )
        total = end[:, None, None]
        return _partial(part, axis).out[:, None], counts(total, total, mass=1.0)

    window = query if isinstance(query, Window) else query.window  # pyright: ignore
    sink_end = jnp.minimum(window.sink, end)
    recent = jnp.maximum(sink_end, end - window.recent)
    inside = (starts < sink_end[:, None]) | (starts + z > recent[:, None])
    inside &= starts < end[:, None]
    near = read(_list(inside[:, None]), gap_low=sink_end, gap_high=recent)
    best = across(lax.pmax, near.best, axis)
    near = _partial(near, axis)
    in_window = (sink_end + end - recent)[:, None]
    if isinstance(query, Window):
        total = in_window[:, None]
        return near.out[:, None], counts(total, total)

    high = recent if query.before is None else jnp.minimum(recent, query.before)
    answer = _through_sketch if _by_sketch(plan, batch, **options) else _through_mask
    far, mass, extra, pages = answer(plan, read, sink_end, recent, high, near, best)
    parts = [near, _partial(far, axis)]
    attended = across(lax.psum, far.kept, axis) + in_window
    keys_read = across(lax.psum, pages * z, axis)
    if extra is not None:
        mass = 1 / (1 + jnp.exp(extra.lse - merge(*parts).lse))
        parts.append(extra)
    group = heads // batch.k.shape[0]
    return merge(*parts).out[:, None], counts(
        attended[:, None],
        end[:, None, None],
        read=jnp.repeat(keys_read, group, axis=1)[:, None],
        mass=jnp.nan if mass is None else mass[:, None],
    )


_Found = tuple[PagedDecode, Array | None, Partial | None, Array]
"""The attention over the keys found, the estimated mass, that of the tail, pages read [B, K]."""


def _codes(index: SketchLayer) -> Codes:
    return Codes(index.codes, index.scale, index.spread, index.centre, index.centre_scale)


def _through_sketch(
    plan: Plan,
    read: _Reader,
    low: Int[Array, " B"],
    recent: Int[Array, " B"],
    high: Int[Array, " B"],
    near: Partial,
    best: Float[Array, "B H"],
) -> _Found:
    """DIPR exactly. The best key is in a page whose upper bound reaches the best lower bound."""
    del near, recent
    batch, query = read.batch, plan.query
    assert isinstance(batch.index, SketchLayer)
    assert isinstance(query, DIPR)
    assert query.beta is not None
    b, _, heads, dim = batch.q.shape
    q, z = batch.q[:, 0], batch.k.shape[2]
    kv_heads = batch.k.shape[0]
    rows = jnp.moveaxis(q.reshape(b, kv_heads, -1, dim), 1, 0).reshape(kv_heads, -1, dim)
    asked = round_query(rows, batch.index.bits, MISS)

    def by_head(x: Array) -> Array:  # [K, B * G, ...] -> [B, H, ...]
        x = x.reshape(kv_heads, b, -1, *x.shape[2:])
        return jnp.moveaxis(x, 0, 1).reshape(b, heads, *x.shape[3:])

    known = jnp.minimum(high, batch.covered)
    found = bounds(
        SketchQuery(
            q, *map(by_head, (asked.integers, asked.step, asked.of_spread, asked.of_scale))
        ),
        _codes(batch.index),
        batch.table.pages,
        low,
        known,
        **read.options,
    )
    starts = batch.starts[:, None]
    behind = jnp.maximum(low, batch.covered)  # keys that the index does not cover: always read
    uncovered = (starts + z > behind[:, None, None]) & (starts < high[:, None, None])

    def reaching(threshold: Float[Array, "B H"]) -> _Listed:
        return _list(wanted(found, threshold, low, known, z) | uncovered)

    surely = jnp.maximum(best, found.best.reshape(b, -1))
    top = read(reaching(surely), low=low, high=high).best
    threshold = jnp.maximum(best, top) - jnp.asarray(query.beta, jnp.float32)
    listed = reaching(threshold)
    far = read(listed, low=low, high=high, threshold=threshold)
    return far, None, None, listed.count


def _through_mask(
    plan: Plan,
    read: _Reader,
    low: Int[Array, " B"],
    recent: Int[Array, " B"],
    high: Int[Array, " B"],
    near: Partial,
    best: Float[Array, "B H"],
) -> _Found:
    """What `retrieve` keeps, of each sequence."""
    batch = read.batch
    b, _, heads, dim = batch.q.shape
    kv_heads, _, z, _ = batch.k.shape
    group = heads // kv_heads
    by_group = (kv_heads, group, 1)

    def of_sequence(args: Any) -> tuple[Any, ...]:
        q, ids, start, low, recent, covered, out, lse, best = args
        pages = Pages(batch.k, batch.v, ids, start)
        found = retrieve(
            plan,
            q.reshape(*by_group, dim),
            pages,
            KeyRange(low[None], recent[None]),
            batch.index,
            covered,
            Partial(out.reshape(*by_group, dim), lse.reshape(by_group)),
            best.reshape(by_group),
            batch.axis,
            batch.head_axis,
        )
        extra = None
        if plan.tail:
            assert isinstance(batch.index, SketchLayer)
            assert found.scan is not None
            unread = jnp.where(found.kept.mask, -jnp.inf, found.scan.estimate)
            extra = batch.index.attend_means(q.reshape(*by_group, dim), pages, unread)
        return found.kept.mask[:, :, 0], found.floor, found.mass, extra

    each = (
        batch.q[:, 0], batch.table.pages, batch.table.start, low, recent, batch.covered,
        near.out, near.lse, best,
    )  # fmt: skip
    if b == 1:
        done = of_sequence(jax.tree.map(lambda x: x[0], each))
        done = jax.tree.map(lambda x: x[None], done)
    else:
        done = lax.map(of_sequence, each)
    mask, floor, mass, extra = done
    if plan.by == "key":
        mask = mask.reshape(*mask.shape[:3], -1, z)  # [B, K, G, N, Z]
        listed = _list(mask.any((2, 4)))
    else:
        listed = _list(mask.any(2))
    keys: dict[str, Any] = {}
    if floor is not None:
        keys["threshold"] = floor.reshape(b, heads)
    elif plan.by == "key" or plan.share == "head":
        if plan.by == "page":
            mask = jnp.broadcast_to(mask[..., None], (*mask.shape, z))
        at = listed.index[:, :, None, :, None]
        keys["key_mask"] = jnp.take_along_axis(mask, at, axis=3).reshape(b, heads, -1, z)
    far = read(listed, low=low, high=high, **keys)
    if extra is not None:
        extra = Partial(extra.out.reshape(b, heads, dim), extra.lse.reshape(b, heads))
        extra = merge_across(extra, batch.axis)
    return far, None if mass is None else mass.reshape(b, heads), extra, listed.count


# A chunk of tokens ------------------------------------------------------------------------------


def _prefill(plan: Plan, batch: Batch, options: dict[str, Any]) -> tuple[Array, Counts]:
    b, t, heads, _ = batch.q.shape
    table, count = batch.table, batch.count
    args = (batch.q, batch.k, batch.v, table.pages, table.length, count)
    offset = jnp.arange(t)
    end = jnp.where(offset < count[:, None], table.length[:, None] + offset + 1, 0)  # [B, T]
    rows = (b, t, heads)
    if isinstance(plan.query, Full):
        out = block_sparse_prefill(*args, block_kv=BLOCK, **options).out
        return out, Counts.of(rows, end[..., None], end[..., None], mass=1.0)

    rule = plan.query
    assert isinstance(rule, Tiles)
    assert rule.kv_block is not None
    kv_heads = batch.k.shape[0]

    def select(args: Any) -> Any:
        q, ids, positions = args
        q = jnp.moveaxis(q.reshape(t, kv_heads, -1, q.shape[-1]), 0, 2)
        return select_tiles(q, Pages(batch.k, batch.v, ids), positions, rule)

    tiles = lax.map(select, (batch.q, table.pages, end - 1))
    done = block_sparse_prefill(
        *args,
        blocks=tiles.blocks,
        block_counts=tiles.count,
        block_kept=tiles.kept,
        beta=rule.beta,
        block_kv=rule.kv_block,
        **options,
    )
    # Listed keys up to the query's own; a tile that is skipped has no other.
    block = offset // QUERY_BLOCK
    first = tiles.blocks[:, :, block] * rule.kv_block  # [B, K, T, M]
    seen = jnp.clip(end[:, None, :, None] - first, 0, rule.kv_block)
    real = jnp.arange(first.shape[-1]) < tiles.count[:, :, block, None]
    listed = jnp.sum(jnp.where(real, seen, 0), axis=-1)  # [B, K, T]
    tile = offset // (QUERY_BLOCK // 2)
    skipped = done.skipped[:, :, tile] * rule.kv_block * (offset < count[:, None])[:, None]

    def by_head(x: Array) -> Array:  # [B, K, T] -> [B, T, H]
        return jnp.moveaxis(jnp.repeat(x, heads // kv_heads, axis=1), 1, 2)

    attended = by_head(listed) - jnp.moveaxis(skipped, 1, 2)
    scored = by_head((tiles.count * rule.kv_block)[:, :, block])
    mass = jnp.nan
    if rule.recovery is not None:
        mass = jnp.moveaxis(tiles.mass.reshape(b, heads, -1)[:, :, block], 1, 2)
    read = scored * (offset % QUERY_BLOCK == 0)[:, None]
    return done.out, Counts.of(rows, attended, scored, read=read, mass=mass)


def choose(plan: Plan, batch: Batch, target: Target | None = None) -> Choice:
    """What answers a plan, and why not what is faster.

    Raises:
      KernelError: the plan names an implementation that cannot.
    """
    target = target or current_target()
    named = plan.implementation
    if named == "xla":
        return Choice("attention", "xla", target)
    wanted = named or "mosaic_gpu"
    reason = unfit(plan, batch, wanted, target)
    if reason is None:
        return Choice("attention", wanted, target)
    if named is not None:
        raise KernelError(
            f"Plan({plan}, implementation={named!r}) cannot run on {target}: {reason}; leave "
            "implementation out, or use 'xla'"
        )
    return Choice("attention", "xla", target, (("mosaic_gpu", reason),))
