"""The index without state: every key is scored. The definition that the others are held to."""

import dataclasses

from jaxtyping import Array, Float

from alaya_jax.cache.views import FEW_ROWS, KeyRange, Pages, score_range
from alaya_jax.index.scan import Scan


@dataclasses.dataclass(frozen=True)
class Flat:
    """Scores every key."""

    def scan(self, q: Float[Array, "K G T D"], pages: Pages, keys: KeyRange) -> Scan:
        """Raw scores of all keys in range."""
        if q.shape[1] * q.shape[2] <= FEW_ROWS:
            pages = pages.in_tiles(pages.tile)
        return Scan(score_range(q, pages, keys))
