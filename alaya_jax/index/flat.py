"""The index without state: every key is scored. The definition that the others are held to."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alaya_jax.attention.paged import KeyRange, Pages, score_range
from alaya_jax.cache import PageTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flat:
    """Scores every key; the same for every layer."""

    def extend(
        self,
        k_pages: Float[Array, "K P Z D"],
        table: PageTable,
        count: Int[Array, " B"],
        new_tokens: int,
    ) -> "Flat":
        """Nothing to write."""
        del k_pages, table, count, new_tokens
        return self

    def scan(
        self, q: Float[Array, "K G T D"], pages: Pages, keys: KeyRange
    ) -> tuple[Float[Array, "K G T S"], Float[Array, "K G T S"]]:
        """Raw scores, -inf out of range, and no error."""
        scores = score_range(q, pages, keys)
        return scores, jnp.zeros_like(scores)

    def range_scores(
        self,
        q: Float[Array, "K G T D"],
        pages: Pages,
        keys: KeyRange,
        beta: float | jax.Array,
        seed: Float[Array, "K G T"],
    ) -> Float[Array, "K G T S"]:
        """Raw scores of all keys in range."""
        del beta, seed
        return score_range(q, pages, keys)
