"""The arguments of a retrieval: query rows of one sequence, and what they may read."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alaya_jax.attention.softmax import Partial
from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.index import GraphLayer, LayerIndex


@dataclasses.dataclass(frozen=True)
class Axes:
    """The mesh axes that attention is split over, for use inside `shard_map`; None: not split.

    Attributes:
      pages: the axis that the pages of a sequence are spread over.
      heads: the axis that the heads are split over.
    """

    pages: str | None = None
    heads: str | None = None


@dataclasses.dataclass(frozen=True)
class Held:
    """What a device holds of one sequence, in one layer.

    Attributes:
      pages: keys and values.
      index: the index's data for this layer; None: every key is scored.
      covered: int32 scalar, the index knows the keys at positions below it. Not used with a graph,
        which knows what it covers.
      axes: the mesh axes that pages and heads are split over.
    """

    pages: Pages
    index: LayerIndex | GraphLayer | None = None
    covered: Int[Array, ""] = dataclasses.field(default_factory=lambda: jnp.int32(0))
    axes: Axes = Axes()


@dataclasses.dataclass(frozen=True)
class Rows:
    """Query rows whose attention over the window is known.

    Attributes:
      q: queries, rotated and unscaled.
      held: the memory to search.
      keys: the positions outside the window.
      window: attention over the window, of all devices together.
      best: the best raw score in the window; -inf if it is empty.
    """

    q: Float[Array, "K G T D"]
    held: Held
    keys: KeyRange
    window: Partial
    best: Float[Array, "K G T"]

    @property
    def pages(self) -> Pages:
        """Keys and values."""
        return self.held.pages

    @property
    def axis(self) -> str | None:
        """Mesh axis of the sequence's pages."""
        return self.held.axes.pages

    def before(self, position: int | jax.Array | None) -> "Rows":
        """The same rows, limited to keys at positions below `limit`; None: no limit."""
        if position is None:
            return self
        high = jnp.minimum(self.keys.high, position)
        return dataclasses.replace(self, keys=dataclasses.replace(self.keys, high=high))
