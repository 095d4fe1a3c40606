"""One new token of each sequence: list pages, and let `paged_decode` read them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.attention.counts import Counts
from alaya_jax.attention.kernels.asking import abstract, passed_over
from alaya_jax.attention.layer import LayerQueries
from alaya_jax.attention.retrieve import retrieve
from alaya_jax.attention.rows import Held, Rows
from alaya_jax.attention.softmax import Partial, merge, merge_across, relative_error, share_read
from alaya_jax.attention.window import Split
from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.index import BOUND, MISS, Scan, Sketch, SketchLayer, recover
from alaya_jax.index.codes import RoundedQuery, deviations
from alaya_jax.index.scan import FAR
from alaya_jax.pallas_kernels.dispatch import Choice, Target
from alaya_jax.pallas_kernels.page_lists import Entries, compact
from alaya_jax.pallas_kernels.paged_decode import PagedDecode, paged_decode
from alaya_jax.pallas_kernels.paged_decode import choose as choose_decode
from alaya_jax.pallas_kernels.sketch_select import (
    Bounds,
    Codes,
    Signs,
    bounds,
    in_range,
    wanted,
)
from alaya_jax.pallas_kernels.sketch_select import Query as SketchQuery
from alaya_jax.pallas_kernels.sketch_select import choose as choose_select
from alaya_jax.query import DIPR, Custom, Full, TopK, Window
from alaya_jax.query.plan import Plan
from alaya_jax.sharding import across


def choose(plan: Plan, batch: LayerQueries, target: Target) -> Choice | str:
    """The implementation that `paged_decode` would run."""
    del plan
    (b, _, h, d), n = batch.q.shape, batch.memory.table.pages.shape[1]
    listed = (abstract(b, 1, n), abstract(b, 1), abstract(b))
    q = abstract(b, h, d, dtype=batch.q.dtype)
    return choose_decode(q, batch.memory.k, batch.memory.v, *listed, target=target)


def _by_sketch(plan: Plan, batch: LayerQueries, implementation: str, target: Target) -> bool:
    """Whether `sketch_select` can find the pages."""
    if not (
        isinstance(plan.query, DIPR)
        and isinstance(batch.memory.index, SketchLayer)
        and (plan.index == Sketch(4) or batch.memory.index.basis is not None)
        and batch.memory.table.start is None
    ):
        return False
    exact = (plan.by, plan.share, plan.tail) == ("key", "head", False)
    if not (exact and plan.query.recovery is None) and (plan.by, plan.share) != ("page", "group"):
        return False
    (b, _, h, d), n = batch.q.shape, batch.memory.table.pages.shape[1]
    numbers = (abstract(b, h, dtype=jnp.float32),) * 3
    basis = batch.memory.index.basis
    levels = d if basis is None else basis.channel.shape[-1]
    query = SketchQuery(
        abstract(b, h, d, dtype=batch.q.dtype), abstract(b, h, levels, dtype=jnp.int8), *numbers
    )
    pages = (abstract(b, n), abstract(b), abstract(b))
    chosen = choose_select(query, _codes(batch.memory.index), *pages, target=target)
    return passed_over(chosen, implementation) is None


class _Reader:
    """`paged_decode` for the queries of a batch, over a selection of pages."""

    def __init__(self, batch: LayerQueries, end: Int[Array, " B"], options: dict[str, Any]):
        self.batch, self.end, self.options = batch, end, options

    def __call__(
        self, listed: Entries, high: Int[Array, " B"] | None = None, **keys: Any
    ) -> PagedDecode:
        """Attention over the listed pages; `high` and `keys` limit what is seen of them."""
        batch = self.batch

        def of_list(x: Int[Array, "B N"]) -> Int[Array, "B J N"]:
            return jnp.take_along_axis(x[:, None], listed.index, axis=2)

        return paged_decode(
            batch.q[:, 0],
            batch.memory.k,
            batch.memory.v,
            of_list(batch.memory.table.pages),
            listed.count,
            self.end if high is None else high,
            starts=of_list(batch.starts),
            want_kept=True,
            **keys,
            **self.options,
        )


def _partial(part: PagedDecode, axis: str | None) -> Partial:
    return merge_across(Partial(part.out, part.lse), axis)


def attend(plan: Plan, batch: LayerQueries, options: dict[str, Any]) -> tuple[Array, Counts]:
    """As `kernels.attend`; `options` are the implementation and target of the operations."""
    query, axis = plan.query, batch.axes.pages
    b, _, heads, _ = batch.q.shape
    z = batch.memory.k.shape[2]
    end = jnp.where(batch.count > 0, batch.memory.table.length + 1, 0)
    read = _Reader(batch, end, options)
    starts = batch.starts

    def counts(attended: Array, scored: Array, **more: Any) -> Counts:
        return Counts.of((b, 1, heads), attended, scored, **more)

    if isinstance(query, Full):
        # Pages are in ascending order, so those before the end come first: no list is needed.
        held = jnp.sum(starts < end[:, None], axis=1, dtype=jnp.int32)[:, None]
        part = paged_decode(
            batch.q[:, 0],
            batch.memory.k,
            batch.memory.v,
            batch.memory.table.pages[:, None],
            held,
            end,
            starts=None if batch.memory.table.start is None else starts[:, None],
            **options,
        )
        total = end[:, None, None]
        return _partial(part, axis).out[:, None], counts(total, total, mass=1.0)

    assert isinstance(query, Window | DIPR | TopK | Custom)
    window = query if isinstance(query, Window) else query.window
    split = Split.of(window, end)
    sink_end, recent = split.sink_end, split.recent_start
    inside = (starts < sink_end[:, None]) | (starts + z > recent[:, None])
    inside &= starts < end[:, None]
    near = read(compact(inside[:, None]), gap_low=sink_end, gap_high=recent)
    best = across(lax.pmax, near.best, axis)
    near = _partial(near, axis)
    in_window = split.size[:, None]
    if isinstance(query, Window):
        total = in_window[:, None]
        return near.out[:, None], counts(total, total)

    high = recent if query.before is None else jnp.minimum(recent, query.before)
    answer = _through_sketch if _by_sketch(plan, batch, **options) else _through_mask
    far, unread, extra, missing, pages = answer(plan, read, sink_end, high, near, best)
    parts = [near, _partial(far, axis)]
    mass = None if unread is None else share_read(merge(*parts).lse, unread)
    assert far.kept is not None
    attended = across(lax.psum, far.kept, axis) + in_window
    keys_read = across(lax.psum, pages * z, axis)
    if extra is not None:
        mass = share_read(merge(*parts).lse, extra.lse + BOUND) if mass is None else mass
        parts.append(extra)
    group = heads // batch.memory.k.shape[0]
    whole = merge(*parts)
    return whole.out[:, None], counts(
        attended[:, None],
        end[:, None, None],
        read=jnp.repeat(keys_read, group, axis=1)[:, None],
        mass=jnp.nan if mass is None else mass[:, None],
        error=jnp.nan if missing is None else relative_error(missing, whole)[:, None],
    )


_Found = tuple[PagedDecode, Array | None, Partial | None, Array | None, Array]
"""The attention over the keys found; the expected log-sum-exp of the others; the attention of the
tail, and what that misses; pages read [B, K]."""


def _codes(index: SketchLayer) -> Codes | Signs:
    layout = Codes if index.basis is None else Signs
    return layout(index.codes, index.scale, index.spread, index.centre, index.centre_scale)


def _scan(
    read: _Reader, low: Int[Array, " B"], high: Int[Array, " B"], scale: float | None = None
) -> tuple[Bounds, Int[Array, " B"], Bool[Array, "B 1 N"]]:
    """The sketch's bounds for each page, and what they do not cover.

    Returns:
      the bounds; the position up to which they hold; the pages with keys in range beyond it, which
      are always read.
    """
    batch = read.batch
    assert isinstance(batch.memory.index, SketchLayer)
    b, _, heads, _ = batch.q.shape
    index, kv_heads = batch.memory.index, batch.memory.k.shape[0]
    asked = _asked(batch)

    def by_head(x: Array) -> Array:  # [K, B * G, ...] -> [B, H, ...]
        x = x.reshape(kv_heads, b, -1, *x.shape[2:])
        return jnp.moveaxis(x, 0, 1).reshape(b, heads, *x.shape[3:])

    numbers = map(by_head, (asked.integers, asked.step, asked.of_spread, asked.of_scale))
    q, offset = batch.q[:, 0], None
    if index.basis is not None:
        of_centre, of_all = index.ask_centre(_rows(batch))
        offset = by_head(jnp.squeeze(of_all, -1))
        # In bfloat16 too the product with a power of two is exact; not in float16, whose range is
        # small.
        whole = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32
        q = by_head(of_centre).astype(whole)
    known = jnp.minimum(high, batch.covered)
    found = bounds(
        SketchQuery(q, *numbers, offset=offset),
        _codes(index),
        batch.memory.table.pages,
        low,
        known,
        scale=scale,
        **read.options,
    )
    n, z = batch.memory.table.pages.shape[1], batch.memory.k.shape[2]
    uncovered = in_range(n, z, jnp.maximum(low, batch.covered), high)
    return found, known, uncovered[:, None]


def _asked(batch: LayerQueries) -> RoundedQuery:
    """The queries in the form that a scan takes, [K, B * G]."""
    assert isinstance(batch.memory.index, SketchLayer)
    return batch.memory.index.ask(_rows(batch), MISS)


def _rows(batch: LayerQueries) -> Float[Array, "K BG D"]:
    b, _, _, dim = batch.q.shape
    kv_heads = batch.memory.k.shape[0]
    rows = batch.q[:, 0].reshape(b, kv_heads, -1, dim)
    return jnp.moveaxis(rows, 1, 0).reshape(kv_heads, -1, dim).astype(jnp.float32)


def _errors(
    batch: LayerQueries, low: Int[Array, " B"], high: Int[Array, " B"]
) -> tuple[tuple[Float[Array, "BK G 1"], ...], tuple[Float[Array, "BK N"], ...]]:
    """The largest error of any key in range of each page, in the two factors that `Scan` takes."""
    assert isinstance(batch.memory.index, SketchLayer)
    b, n = batch.memory.table.pages.shape
    kv_heads, _, z, _ = batch.memory.k.shape
    position = jnp.arange(n * z).reshape(n, z)
    seen = (position >= low[:, None, None]) & (position < high[:, None, None])

    def of_page(pool: Float[Array, "K P Z"]) -> Float[Array, "BK N"]:
        x = jnp.where(seen, pool[:, batch.memory.table.pages], 0).max(-1)  # [K, B, N]
        x = jnp.minimum(x.astype(jnp.float32), FAR)
        return jnp.moveaxis(x, 0, 1).reshape(b * kv_heads, n)

    def of_head(x: Float[Array, "K BG"]) -> Float[Array, "BK G 1"]:
        x = jnp.moveaxis(x.reshape(kv_heads, b, -1), 0, 1)
        return x.reshape(b * kv_heads, -1, 1)

    asked, index = _asked(batch), batch.memory.index
    of_row = of_head(asked.of_spread), of_head(asked.of_scale)
    return of_row, (of_page(index.spread), of_page(index.scale))


def _through_sketch(
    plan: Plan,
    read: _Reader,
    low: Int[Array, " B"],
    high: Int[Array, " B"],
    near: Partial,
    best: Float[Array, "B H"],
) -> _Found:
    """DIPR through the bounds of `sketch_select`: exact by key, or by whole pages."""
    query = plan.query
    assert isinstance(query, DIPR)
    b, heads = best.shape
    z, kv_heads = read.batch.memory.k.shape[2], read.batch.memory.k.shape[0]
    if query.recovery is not None:
        scale = read.batch.q.shape[-1] ** -0.5
        found, known, uncovered = _scan(read, low, high, scale)
        assert found.lse is not None
        n = found.lse.shape[2]
        # A page weighs as much as its keys together, and its error is that of its worst key.
        some = in_range(n, z, low, known)[:, None, :, None]
        scores = jnp.where(some, found.lse, -jnp.inf) / scale
        by_row = (b * kv_heads, heads // kv_heads, 1)
        in_pages = Scan(
            jnp.moveaxis(scores, 3, 2).reshape(*by_row, n),
            *_errors(read.batch, low, known),
            deviations(MISS / 2, read.batch.q.shape[-1]),
        )

        def of_group(kept: Bool[Array, "BK G 1 N"]) -> Entries:
            return compact(kept.any((1, 2)).reshape(b, kv_heads, n) | uncovered)

        def held(kept: Bool[Array, "BK G 1 N"]) -> Float[Array, "BK G 1"]:
            lse = read(of_group(kept), low=low, high=high).lse
            return jnp.logaddexp(lse, near.lse).reshape(by_row)

        recovered = recover(
            in_pages,
            near.lse.reshape(by_row),
            best.reshape(by_row),
            jnp.broadcast_to(query.recovery, best.shape).reshape(by_row),
            read.batch.q.shape[-1],
            held=held,
        )
        chosen = of_group(recovered.kept)
        far = read(chosen, low=low, high=high)
        return far, recovered.unread.reshape(b, heads), None, None, chosen.count

    found, known, uncovered = _scan(read, low, high)

    def reaching(threshold: Float[Array, "B H"]) -> Entries:
        return compact(wanted(found, threshold, low, known, z) | uncovered)

    assert query.beta is not None
    beta = jnp.asarray(query.beta, jnp.float32)
    # The best score is at least the largest lower bound, so its key is in a page that may reach it.
    surely = jnp.maximum(best, found.best.reshape(b, -1))
    if plan.by == "page":
        listed = reaching(surely - beta)
        return read(listed, low=low, high=high), None, None, None, listed.count
    top = read(reaching(surely), low=low, high=high).best
    threshold = jnp.maximum(best, top) - beta
    listed = reaching(threshold)
    far = read(listed, low=low, high=high, threshold=threshold)
    return far, None, None, None, listed.count


def _through_mask(
    plan: Plan,
    read: _Reader,
    low: Int[Array, " B"],
    high: Int[Array, " B"],
    near: Partial,
    best: Float[Array, "B H"],
) -> _Found:
    """Any plan, through the keys that `retrieve` keeps for each sequence."""
    batch = read.batch
    b, _, heads, dim = batch.q.shape
    kv_heads, _, z, _ = batch.memory.k.shape
    group = heads // kv_heads
    by_group = (kv_heads, group, 1)

    def of_sequence(args: Any) -> tuple[Any, ...]:
        q, ids, start, low, high, covered, out, lse, best = args
        memory = batch.memory
        assert not isinstance(memory.index, tuple)
        pages = Pages(memory.k, memory.v, ids, start)
        rows = Rows(
            q.reshape(*by_group, dim),
            Held(pages, memory.index, covered, batch.axes),
            KeyRange(low[None], high[None]),
            Partial(out.reshape(*by_group, dim), lse.reshape(by_group)),
            best.reshape(by_group),
        )
        found = retrieve(plan, rows)
        extra = found.tail(rows) if plan.tail else None
        return found.kept.mask[:, :, 0], found.floor, found.unread, extra, found.missing

    table, covered = batch.memory.table, batch.covered
    each = (
        batch.q[:, 0], table.pages, table.start, low, high, covered, near.out, near.lse, best,
    )  # fmt: skip
    if b == 1:
        done = of_sequence(jax.tree.map(lambda x: x[0], each))
        done = jax.tree.map(lambda x: x[None], done)
    else:
        done = lax.map(of_sequence, each)
    mask, floor, unread, extra, missing = done
    if plan.by == "key":
        mask = mask.reshape(*mask.shape[:3], -1, z)  # [B, K, G, N, Z]
        listed = compact(mask.any((2, 4)))
    else:
        listed = compact(mask.any(2))
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
        extra = merge_across(extra, batch.axes.pages)
    unread, missing = (x if x is None else x.reshape(b, heads) for x in (unread, missing))
    return far, unread, extra, missing, listed.count
