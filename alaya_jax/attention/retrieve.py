"""Which keys outside the window a plan keeps (AlayaDB, section 6).

Keys are scored through the index and selected; where the index only estimates scores, exact ones
decide among the candidates.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from alaya_jax.attention import met
from alaya_jax.attention.custom import select_custom
from alaya_jax.attention.kept import (
    Kept,
    attend_kept,
    best_kept,
    lse_kept,
    scores_at,
    scores_listed,
)
from alaya_jax.attention.rows import Rows
from alaya_jax.attention.softmax import Partial, merge, merge_across, share_read
from alaya_jax.cache.views import KeyRange, Pages, score_range
from alaya_jax.index import (
    BlockLayer,
    Look,
    Scan,
    SketchLayer,
    Summaries,
    Weights,
    keep_below,
    of_pages,
    recover,
)
from alaya_jax.index.flat import Flat
from alaya_jax.index.select import as_mask, by_row, in_range, largest, largest_of_all
from alaya_jax.query import DIPR, Custom, TopK
from alaya_jax.query.plan import Plan
from alaya_jax.sharding import across

_ROUNDING = 2.0**-18
"""Relative rounding error of a score: what another order of summation may change."""

_ROOM = 2048
"""Candidates for the k best keys that each kv head has room for, at least."""


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """Keys to attend to.

    Attributes:
      kept: by key or by page.
      floor: attend only to kept keys that score at least this; None: to all of them.
      unread: float32 [K, G, T], expected log of the sum of exp(score / sqrt(D)) over the keys in
        range that are not kept, on all devices; None where it was not estimated.
      weights: estimated weights of all keys, for the tail; None for a plan without one.
      missing: float32 [K, G, T], log of what the tail is estimated to miss, as `index.Bounded` has
        it; None where it was not estimated.
      met: pages that the choice was made from, or that are kept; None: not recorded.
    """

    kept: Kept
    floor: Float[Array, "K G T"] | None = None
    unread: Float[Array, "K G T"] | None = None
    weights: Weights | None = None
    missing: Float[Array, "K G T"] | None = None
    met: UInt8[Array, "K N"] | None = None

    def share_read(self, read: Partial) -> Float[Array, "K G T"] | None:
        """A lower bound on the share of the attention mass that was read; None if not estimated."""
        return None if self.unread is None else share_read(read.lse, self.unread)

    def tail(self, rows: Rows) -> Partial:
        """Estimated attention over the keys that are not read, from the page means of values."""
        index = rows.held.index
        assert isinstance(index, SketchLayer)
        assert self.weights is not None
        return Partial(*index.attend_means(rows.q, rows.pages, self.weights, self.kept.mask))


def retrieve(plan: Plan, rows: Rows) -> Retrieved:
    """The keys outside the window that the plan's query (DIPR, TopK or Custom) keeps."""
    query = plan.query
    assert isinstance(query, DIPR | TopK | Custom)
    rows = rows.before(query.before)
    found, looked_at = (_by_page(plan, rows), None) if plan.by == "page" else _by_key(plan, rows)
    if not met.kept_account(plan, rows.pages):
        return found
    kept = met.of_mask(rows.pages, found.kept.mask) | met.behind(rows.pages, rows.held.covered)
    return dataclasses.replace(found, met=met.bits(kept if looked_at is None else kept | looked_at))


def _by_key(plan: Plan, rows: Rows) -> tuple[Retrieved, Bool[Array, "K N"] | None]:
    """And pages, beside those of kept keys, that the choice was made from; None: not recorded."""
    query = plan.query
    assert isinstance(query, DIPR | TopK | Custom)
    pages, keys, axis = rows.pages, rows.keys, rows.axis
    rows = dataclasses.replace(rows, q=rows.q.astype(pages.operand_dtype))
    q, best = rows.q, rows.best
    scan = _scan(rows)
    floor, unread, weights, missing, looked_at = None, None, None, None, None
    account = met.kept_account(plan, pages)
    if isinstance(query, Custom):
        mask = select_custom(query, rows, scan.estimate)
    elif isinstance(query, TopK):
        if scan.exact:
            scores, column = largest(_shared(plan, scan.estimate), min(query.k, pages.columns))
        else:
            may_be = _may_be_top(query.k, rows, scan)
            scores, column = _best_exact(plan, rows, may_be)
            looked_at = met.of_mask(pages, may_be) if account else None
        chosen = largest_of_all(scores, pages.position_of(column), axis)
        mask = as_mask(column, chosen, pages.columns)
    elif query.error is not None:
        error, dim = by_row(query.error, q), q.shape[-1]
        found = keep_below(scan, _summaries(rows), best, error, dim, _look(plan, rows), axis)
        mask, weights, missing = found.kept, found.weights, found.missing
        looked_at = met.of_mask(pages, found.looked_at) if account else None
    elif query.recovery is not None:
        recovery = by_row(query.recovery, q)
        read = _mass_read(plan, rows)
        found = recover(scan, rows.window.lse, best, recovery, q.shape[-1], axis=axis, held=read)
        mask, unread, weights = found.kept, found.unread, found.weights
    else:
        assert query.beta is not None
        upper = scan.estimate + scan.error
        if scan.exact:
            best = jnp.maximum(best, across(lax.pmax, scan.estimate.max(-1), axis))
            least = best
        else:
            sure = across(lax.pmax, pivot(q, pages, scan, axis), axis)
            looked_at = met.of_best(pages, scan.estimate) if account else None
            least = jnp.maximum(best, sure - _rounding(sure))
        mask = in_range(upper, least, query.beta)
        if not scan.exact and not plan.tail:
            # The best of all keys may be in range, so it is among those kept: their best is it.
            exact = across(lax.pmax, best_kept(q, Kept(pages, keys, mask)), axis)
            top = jnp.maximum(best, exact)
            floor = top - _rounding(top) - by_row(query.beta, q)
    if plan.tail:  # keys that the index does not cover have no mean value: read them
        if weights is None:
            # Compute the weights after the selection, so that they can reuse the estimates' memory.
            estimate, mask = lax.optimization_barrier((scan.estimate, mask))
            left = dataclasses.replace(scan, estimate=estimate)
            weights = Weights.of(left, jnp.max(estimate, axis=-1), q.shape[-1])
        mask |= ~_known(rows) & (weights.weight > 0)
    if plan.share == "group":
        mask = jnp.broadcast_to(mask.any(1, keepdims=True), scan.estimate.shape)
        mask, floor = mask & (scan.estimate > -jnp.inf), None
    return Retrieved(Kept(pages, keys, mask), floor, unread, weights, missing), looked_at


def _known(rows: Rows) -> Bool[Array, " S"]:
    """Keys that the index covers."""
    return rows.pages.all_positions() < rows.held.covered


def _summaries(rows: Rows) -> Summaries:
    index = rows.held.index
    assert isinstance(index, SketchLayer)
    return Summaries(index.value_spreads(rows.pages, _by_index(rows)[0]), _known(rows))


def _look(plan: Plan, rows: Rows) -> Callable[[Weights, Array], Look]:
    """A function from a mask to the output with its keys, those that are always read, the window
    and means of the others, for `keep_below`.
    """
    index, always = rows.held.index, ~_known(rows)
    assert isinstance(index, SketchLayer)

    def look(weights: Weights, mask: Bool[Array, "K G T S"]) -> Look:
        eligible = weights.weight > 0
        mask = (mask | always) & eligible
        if plan.share == "group":
            mask = mask.any(1, keepdims=True) & eligible
        near = attend_kept(rows.q, Kept(rows.pages, rows.keys, mask))[0]
        read = merge(rows.window, merge_across(near, rows.axis))
        means = Partial(*index.attend_means(rows.q, rows.pages, weights, mask))
        unread = merge_across(means, rows.axis)
        return Look(jnp.linalg.norm(merge(read, unread).out, axis=-1), read.lse)

    return look


def _mass_read(plan: Plan, rows: Rows) -> Callable[[Array], Array]:
    """A function from a mask to the exact log-sum-exp of its keys and the window, for `recover`."""
    q = rows.q

    def held(mask: Bool[Array, "K G T M"]) -> Float[Array, "K G T"]:
        if plan.share == "group":
            mask = jnp.broadcast_to(mask.any(1, keepdims=True), mask.shape)
        lse = lse_kept(q, Kept(rows.pages, rows.keys, mask, by_page=plan.by == "page"))
        kept = merge_across(Partial(jnp.zeros_like(q), lse), rows.axis)
        return jnp.logaddexp(rows.window.lse, kept.lse)

    return held


def _scan(rows: Rows) -> Scan:
    """Estimated scores of all keys in range; exact ones of keys that the index does not cover."""
    index = rows.held.index
    if not isinstance(index, SketchLayer):
        assert index is None
        return Flat().scan(rows.q, rows.pages, rows.keys)
    known, behind = _by_index(rows)
    scan = index.scan(rows.q, rows.pages, known)
    estimate = score_range(rows.q, rows.pages, behind, scan.estimate)
    return dataclasses.replace(scan, estimate=estimate)


def _by_index(rows: Rows) -> tuple[KeyRange, KeyRange]:
    """The keys in range that the index covers, and those after them."""
    keys, covered = rows.keys, rows.held.covered
    known = KeyRange(keys.low, jnp.minimum(keys.high, covered))
    return known, KeyRange(jnp.maximum(keys.low, covered), keys.high)


def pivot(
    q: Float[Array, "K G T D"], pages: Pages, scan: Scan, axis: str | None = None
) -> Float[Array, "K G T"]:
    """The exact raw score of the key with the best estimate.

    It costs one key read for each query and gives a score that some key really has. The
    alternative, `max(estimate - error)`, is lower, and exceeds the true maximum if any bound fails.

    Returns:
      the score; -inf where no key is in range, and on the devices along `axis` that do not hold
      that key.
    """
    # Find the first largest by page, then by slot: XLA's CPU backend vectorises max and min but not
    # argmax, and a min over all columns would write them to memory first.
    in_pages = scan.estimate.reshape(*q.shape[:-1], -1, pages.size)
    by_page = jnp.max(in_pages, axis=-1)
    best, entry = jnp.max(by_page, axis=-1), jnp.arange(by_page.shape[-1])
    page = jnp.min(jnp.where(by_page == best[..., None], entry, entry[-1]), axis=-1)
    slot = jnp.argmax(jnp.take_along_axis(in_pages, page[..., None, None], axis=-2)[..., 0, :], -1)
    exact = scores_at(q, pages, (page * pages.size + slot)[..., None])[..., 0]
    # Each device's own best key would give a tighter bound, but then the keys that are read would
    # depend on the mesh.
    here = (best > -jnp.inf) & (best == across(lax.pmax, best, axis))
    return jnp.where(here, exact, -jnp.inf)


def _shared(plan: Plan, scores: Float[Array, "K G T M"]) -> Array:
    """The scores to choose by: the best of each group, [K, 1, T, M], if it shares a selection."""
    return jnp.max(scores, axis=1, keepdims=True) if plan.share == "group" else scores


def _best_exact(plan: Plan, rows: Rows, may_be: Bool[Array, "K G T S"]) -> tuple[Array, Array]:
    """The k best exact scores and their columns, chosen among the keys that may be among them.

    These candidates are few and are copied into one dense array; where they exceed its room, all
    columns are used instead.
    """
    query, q, width = plan.query, rows.q, rows.pages.columns
    assert isinstance(query, TopK)
    kept = Kept(rows.pages, rows.keys, may_be)
    k = min(query.k, width)
    room = min(width, max(_ROOM, 4 * k * q.shape[1] * q.shape[2]))

    def among(room: int) -> tuple[Array, Array]:
        scores, columns = scores_listed(q, kept, room)
        best, at = largest(_shared(plan, scores), k)
        return best, jax.vmap(lambda column, at: column[at])(columns, at)

    if room == width:
        return among(width)
    fits = jnp.max(kept.blocks()[1]) <= room
    return lax.cond(fits, lambda: among(room), lambda: among(width))


def _may_be_top(k: int, rows: Rows, scan: Scan) -> Bool[Array, "K G T S"]:
    """Keys that may be among the k best.

    These are the k with the best estimates, and every other key whose estimate plus error reaches
    the lowest exact score among those k.
    """
    q, pages, axis = rows.q, rows.pages, rows.axis
    estimate, column = largest(scan.estimate, min(k, pages.columns))
    exact = jnp.where(estimate > -jnp.inf, scores_at(q, pages, column), -jnp.inf)
    if axis is not None:
        found = -estimate, pages.position_of(column), exact
        found = (lax.all_gather(x, axis, axis=-1, tiled=True) for x in found)
        exact = lax.sort(tuple(found), num_keys=2)[2][..., :k]
    least = jnp.min(exact, axis=-1, keepdims=True)
    may_be = scan.estimate + scan.error >= least - _rounding(least)
    may_be |= as_mask(column, estimate > -jnp.inf, pages.columns)
    return may_be & (scan.estimate > -jnp.inf)


def _rounding(score: Array) -> Array:
    """How much a score may differ from the same score summed in another order.

    A key that is scored exactly has no error bar to cover that.
    """
    return jnp.where(jnp.isfinite(score), _ROUNDING * jnp.abs(score), 0.0)


def _by_page(plan: Plan, rows: Rows) -> Retrieved:
    query, index, pages, axis = plan.query, rows.held.index, rows.pages, rows.axis
    assert isinstance(query, DIPR | TopK)
    by_page = (*rows.q.shape[:-1], pages.ids.shape[0], pages.size)
    if isinstance(index, BlockLayer):
        known, behind = _by_index(rows)
        uncovered = score_range(rows.q, pages, behind).reshape(by_page).max(-1)
        upper = scores = jnp.maximum(index.scan_pages(rows.q, pages, known), uncovered)
        attained = uncovered
    else:
        rows = dataclasses.replace(rows, q=rows.q.astype(pages.operand_dtype))
        scan = _scan(rows)
        if isinstance(query, DIPR) and query.recovery is not None:
            return _by_page_recovered(plan, rows, scan)
        scores = scan.estimate.reshape(by_page).max(-1)
        upper = scores if scan.exact else (scan.estimate + scan.error).reshape(by_page).max(-1)
        attained = scores if scan.exact else scan.estimate - scan.error
    eligible = scores > -jnp.inf
    if plan.share == "layer":
        mean = jnp.mean(jnp.where(eligible, scores, 0.0), axis=(0, 1), keepdims=True)
        scores = jnp.where(eligible, across(lax.pmean, mean, rows.held.axes.heads), -jnp.inf)
    if isinstance(query, TopK):
        scores = _shared(plan, scores)
        count = min(max(1, query.k // pages.size), scores.shape[-1])
        scores, page = largest(scores, count)
        chosen = largest_of_all(scores, jnp.take(pages.starts(), page), axis)
        mask = as_mask(page, chosen, eligible.shape[-1]) & eligible
    else:
        assert query.beta is not None
        # The best score is at least the largest lower bound of any key.
        sure = across(lax.pmax, attained.max(-1), axis)
        mask = in_range(upper, jnp.maximum(rows.best, sure), query.beta)
    if plan.share == "group":
        mask = jnp.broadcast_to(mask.any(1, keepdims=True), eligible.shape) & eligible
    return Retrieved(Kept(pages, rows.keys, mask, by_page=True))


def _by_page_recovered(plan: Plan, rows: Rows, scan: Scan) -> Retrieved:
    """Pages that hold the wanted share of the mass, found for each head, then joined by `share`."""
    query, q, pages, dim = plan.query, rows.q, rows.pages, rows.q.shape[-1]
    assert isinstance(query, DIPR)
    assert query.recovery is not None
    in_pages = scan.by_page(of_pages(scan.estimate, pages.size, dim), pages.size)
    recovery = by_row(query.recovery, q)
    read = _mass_read(plan, rows)
    lse, best = rows.window.lse, rows.best
    found = recover(in_pages, lse, best, recovery, dim, axis=rows.axis, held=read)
    mask, eligible = found.kept, in_pages.estimate > -jnp.inf
    if plan.share != "head":
        over = 1 if plan.share == "group" else (0, 1)
        mask = mask.any(over, keepdims=True)
        if plan.share == "layer":
            mask = across(lax.pmax, mask, rows.held.axes.heads)
        mask = mask & eligible
    return Retrieved(Kept(pages, rows.keys, mask, by_page=True), unread=found.unread)
