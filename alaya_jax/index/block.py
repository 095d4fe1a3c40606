"""Indexes that score whole pages by a summary of their keys.

bounds   smallest and largest value of each channel: an upper bound of every score in the page
         (Quest, arXiv 2406.10774). Exact for range queries, and loose: on SmolLM2-135M it lets
         nearly all pages pass (docs/decisions.md); as an order for TopK it is approximate.
mean     the score of the mean key. Approximate.
leaders  the best score of a few keys that stand for the page, those that lie farthest out from
         its mean. Approximate. InfLLM (arXiv 2402.04617) takes the keys that received most
         attention locally; a page's keys alone do not say which those are.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alaya_jax import cache
from alaya_jax.cache import page_zeros
from alaya_jax.cache.tiers import Tiers
from alaya_jax.cache.views import KeyRange, Pages, over_tiles
from alaya_jax.errors import ConfigError
from alaya_jax.models.config import LlamaConfig
from alaya_jax.sharding import ShardingRules

VERSION = 1
"""Of how summaries are made, to be raised when they come out otherwise."""

Summary = Literal["bounds", "mean", "leaders"]
SUMMARIES: dict[Summary, int] = {"bounds": 2, "mean": 1, "leaders": 4}
"""Kind -> vectors a page."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLayer:
    """Summaries of one layer's pages.

    Attributes:
      vectors: [K, P, M, D] in the cache's dtype: low and high, or the mean, or the leaders.
      summary: which kind.
    """

    vectors: Float[Array, "K P M D"]
    summary: Summary = dataclasses.field(metadata={"static": True})

    basis = None
    """It is made by none: see `SketchLayer`."""

    def seen_by(self, basis: Any) -> "BlockLayer":
        """Itself: there is none to be seen by."""
        assert basis is None
        return self

    def build(
        self,
        k_pages: Float[Array, "K P Z D"],
        v_pages: Float[Array, "K P Z D"],
        ids: Int[Array, " N"],
        filled: Int[Array, " N"],
    ) -> "BlockLayer":
        """Summarizes the first `filled[i]` keys of pages `ids[i]`; as `SketchLayer.build`."""
        del v_pages
        k = k_pages[:, ids].astype(jnp.float32)
        valid = (jnp.arange(k.shape[2]) < filled[:, None])[None, :, :, None]
        k_or_0 = jnp.where(valid, k, 0.0)
        mean = jnp.sum(k_or_0, axis=2) / jnp.maximum(filled, 1)[None, :, None]
        if self.summary == "bounds":
            low = jnp.min(jnp.where(valid, k, jnp.inf), axis=2)
            high = jnp.max(jnp.where(valid, k, -jnp.inf), axis=2)
            vectors = jnp.stack([low, high], axis=2)
        elif self.summary == "mean":
            vectors = mean[:, :, None]
        else:
            away = jnp.sum((k_or_0 - mean[:, :, None]) ** 2, axis=-1)
            away = jnp.where(valid[..., 0], away, -jnp.inf)
            _, first = lax.top_k(away, self.vectors.shape[2])
            vectors = jnp.take_along_axis(k_or_0, first[..., None], axis=2)
        return dataclasses.replace(self, vectors=cache.write_pages(self.vectors, ids, vectors))

    def scan_pages(
        self, q: Float[Array, "K G T D"], pages: Pages, keys: KeyRange
    ) -> Float[Array, "K G T N"]:
        """A score for each page that holds a key in range, -inf for others; raw, as `q.k`."""
        heads, group, t, dim = q.shape
        rows = q.astype(jnp.float32).reshape(heads, group * t, dim)
        dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

        def visit(tile: Array, scores: Array) -> Array:
            ids, pool = pages.tile_ids(tile), self.vectors
            x = pool.pages(ids) if isinstance(pool, Tiers) else pool[:, ids]
            x = x.astype(jnp.float32)
            if self.summary == "bounds":
                new = dot("krd,knd->krn", jnp.maximum(rows, 0), x[:, :, 1])
                new += dot("krd,knd->krn", jnp.minimum(rows, 0), x[:, :, 0])
            else:
                new = jnp.max(dot("krd,knmd->krnm", rows, x), axis=-1)
            seen = keys.mask(pages.positions(tile)).reshape(t, -1, pages.size).any(-1)
            new = jnp.where(seen, new.reshape(heads, group, t, -1), -jnp.inf)
            return lax.dynamic_update_slice_in_dim(scores, new, pages.first_page(tile), -1)

        start = jnp.full((heads, group, t, pages.ids.shape[0]), -jnp.inf)
        return over_tiles(pages, keys, visit, start)


@dataclasses.dataclass(frozen=True)
class Block:
    """The index of page summaries.

    Attributes:
      summary: "bounds", "mean" or "leaders"; see the module.
    """

    summary: Summary = "bounds"

    def __post_init__(self):
        if self.summary not in tuple(SUMMARIES):
            raise ConfigError(f"Block(summary={self.summary!r}): use one of {list(SUMMARIES)}")

    def create(
        self,
        config: LlamaConfig,
        num_pages: int,
        page_size: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
        rules: ShardingRules | None = None,
    ) -> BlockLayer:
        """The index of one layer's empty cache; sharded like `PagedKV.create`'s arrays."""
        shape = (self._vectors(page_size), config.head_dim)
        zeros = page_zeros(config, num_pages, mesh, rules, shape, dtype)
        return BlockLayer(zeros, self.summary)

    def formula(self, config: LlamaConfig) -> dict[str, Any]:
        """All that summaries depend on beside the page: see `Sketch.formula`."""
        del config
        return {"block": VERSION, **dataclasses.asdict(self)}

    def page_bytes(self, config: LlamaConfig, page_size: int, dtype: jax.typing.DTypeLike) -> int:
        """Bytes of one page, one layer."""
        row = config.num_key_value_heads * config.head_dim * jnp.dtype(dtype).itemsize
        return self._vectors(page_size) * row

    def _vectors(self, page_size: int) -> int:
        n = SUMMARIES[self.summary]
        return min(n, page_size) if self.summary == "leaders" else n
