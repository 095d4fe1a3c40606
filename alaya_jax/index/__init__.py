"""Retrieval indexes over the keys of a cache.

An index is a pytree built from pages: its arrays begin with the axes [K, P] of the pages it covers,
are sharded like them, and what it holds of a page depends on that page's keys alone. So whatever is
done to pages (shared, copied on write, stored, evicted) is done to the index by the same page ids:
`cache.copy_pages` and `cache.write_pages` take its arrays as they take a pool's. And an index that
grew token by token equals one built at once, up to the rounding of float32 sums.

Of one layer, an index answers (`LayerIndex`)
  extend         what it holds of the pages that new tokens were written to
  scan           an estimate of every score in a range of positions, and the error it may have
  range_scores   the exact score of every key that may be within `beta` of the best, -inf elsewhere:
                 `query.select` gives DIPR's answer from it, as from all scores

`Flat` holds nothing and estimates without error. `Sketch` reads a few bits a channel.
"""

from typing import Protocol

import jax
from jaxtyping import Array, Float, Int

from alaya_jax.attention.paged import KeyRange, Pages
from alaya_jax.cache import PageTable
from alaya_jax.index.cluster import ClusterLayer
from alaya_jax.index.exact import rescore
from alaya_jax.index.flat import Flat
from alaya_jax.index.found import Found
from alaya_jax.index.graph import GraphLayer
from alaya_jax.index.graph_build import GraphSpec
from alaya_jax.index.recovery import Recovered, recover
from alaya_jax.index.sketch import MISS, Sketch, SketchLayer


class LayerIndex(Protocol):
    """An index over the keys of one layer; methods are pure."""

    def extend(
        self,
        k_pages: Float[Array, "K P Z D"],
        table: PageTable,
        count: Int[Array, " B"],
        new_tokens: int,
    ) -> "LayerIndex":
        """The index after `count[b]` (at most `new_tokens`) keys were appended to each sequence."""
        ...

    def scan(
        self, q: Float[Array, "K G T D"], pages: Pages, keys: KeyRange
    ) -> tuple[Float[Array, "K G T S"], Float[Array, "K G T S"]]:
        """Estimated raw scores (-inf out of range) and their errors."""
        ...

    def range_scores(
        self,
        q: Float[Array, "K G T D"],
        pages: Pages,
        keys: KeyRange,
        beta: float | jax.Array,
        seed: Float[Array, "K G T"],
    ) -> Float[Array, "K G T S"]:
        """Exact scores of the keys that may score `max(best in range, seed) - beta` or more."""
        ...


__all__ = [
    "MISS",
    "ClusterLayer",
    "Flat",
    "Found",
    "GraphLayer",
    "GraphSpec",
    "LayerIndex",
    "Recovered",
    "Sketch",
    "SketchLayer",
    "recover",
    "rescore",
]
