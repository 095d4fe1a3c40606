"""Which pages of mapped files an answer came from, so that those are verified and no others.

Kept account of where a plan reads few pages: `tells`. What is said may be more than was read, never
less: a page that had any part in the choice of keys, or in their attention, is among them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt8

from alaya_jax.attention.window import Split
from alaya_jax.cache.tiers import Tiers
from alaya_jax.cache.views import Pages
from alaya_jax.index import Block, Found, Graph, Sketch
from alaya_jax.query import Custom, Window
from alaya_jax.query.plan import Plan

KEYS, VALUES = 1, 2
"""Bits of what was met."""

BOTH = KEYS | VALUES

Met = UInt8[Array, "K N"]


def tells(plan: Plan) -> bool:
    """Whether attention by this plan says which pages it met; else it may have been any."""
    if isinstance(plan.query, Window):
        return True
    if not plan.retrieves or isinstance(plan.query, Custom):
        return False
    return isinstance(plan.index, Sketch | Block | Graph)


def kept_account(plan: Plan, pages: Pages) -> bool:
    """Whether it is said: some pages are in mapped files."""
    return isinstance(pages.k, Tiers) and tells(plan)


def of_window(pages: Pages, split: Split) -> Met:
    """Pages of the windows of some query tokens; of one that sees nothing, none."""
    sees, first = split.end > 0, pages.starts()
    sink_end = jnp.max(jnp.where(sees, split.sink_end, 0))
    recent = jnp.min(jnp.where(sees, split.recent_start, jnp.iinfo(jnp.int32).max))
    end = jnp.max(split.end)
    met = (first < sink_end) | ((first + pages.size > recent) & (first < end))
    return bits(jnp.broadcast_to(met, (pages.k.shape[0], *met.shape)))


def of_mask(pages: Pages, mask: Bool[Array, "K G T M"]) -> Bool[Array, "K N"]:
    """Pages that have a key of the mask, [..., S] by key or [..., N] by page."""
    wanted = jnp.any(mask, axis=(1, 2))
    if wanted.shape[-1] != pages.ids.shape[0]:
        wanted = jnp.any(wanted.reshape(len(wanted), -1, pages.size), axis=-1)
    return wanted


def of_best(pages: Pages, estimate: Array) -> Bool[Array, "K N"]:
    """The page of the best estimate [K, G, T, S] of each row."""
    in_pages = jnp.max(estimate.reshape(*estimate.shape[:-1], -1, pages.size), axis=-1)
    page = jnp.argmax(in_pages, axis=-1).reshape(len(estimate), -1)
    return jnp.zeros((len(estimate), in_pages.shape[-1]), bool).at[_heads(page), page].set(True)


def behind(pages: Pages, covered: Int[Array, ""]) -> Bool[Array, " N"]:
    """Pages of the keys that an index does not know, which are all scored."""
    return pages.starts() + pages.size > covered


def of_search(pages: Pages, found: Found) -> Met:
    """Pages that the search of a graph came to; where it overflowed, all: a scan answers."""
    assert found.met is not None
    at = found.positions.reshape(len(found.positions), -1)
    here = (found.scores > -jnp.inf).reshape(at.shape)
    values = jnp.zeros(found.met.shape[:2], bool).at[_heads(at), at // pages.size].max(here)
    met = bits(jnp.any(found.met, axis=-1), KEYS) | bits(values)
    return jnp.where(jnp.any(found.overflow), jnp.uint8(BOTH), met)


def together(window: Met | None, found: Met | None) -> Met | None:
    """What either met; None where no account is kept."""
    return None if window is None or found is None else window | found


def bits(met: Bool[Array, "K N"], which: int = BOTH) -> Met:
    """These bits of these pages."""
    return jnp.where(met, jnp.uint8(which), jnp.uint8(0))


def _heads(x: Array) -> Int[Array, "K 1"]:
    return jnp.arange(len(x))[:, None]
