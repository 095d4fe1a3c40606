"""Query rows of one sequence, and what they may read: the arguments of a retrieval."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alaya_jax.attention.softmax import Partial
from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.index import GraphLayer, LayerIndex


@dataclasses.dataclass(frozen=True)
class Axes:
    """Mesh axes, inside `shard_map`; None: not split.

    Attributes:
      pages: what a sequence's pages are split over.
      heads: what the heads are split over.
    """

    pages: str | None = None
    heads: str | None = None


@dataclasses.dataclass(frozen=True)
class Held:
    """What a device holds of one sequence, in one layer.

    Attributes:
      pages: keys and values.
      index: what the plan's index holds; None: every key is scored.
      covered: the index knows the keys at positions below this; a graph says that itself.
      axes: what is split over which devices.
    """

    pages: Pages
    index: LayerIndex | GraphLayer | None = None
    covered: Int[Array, ""] = dataclasses.field(default_factory=lambda: jnp.int32(0))
    axes: Axes = Axes()


@dataclasses.dataclass(frozen=True)
class Rows:
    """Query rows that have their window, and look for more.

    Attributes:
      q: rotated, unscaled.
      held: where they look.
      keys: positions outside the window.
      window: attention over the window, of all devices.
      best: best raw score there; -inf if it is empty.
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
        """The same rows, looking only at keys before a position; None: at all."""
        if position is None:
            return self
        high = jnp.minimum(self.keys.high, position)
        return dataclasses.replace(self, keys=dataclasses.replace(self.keys, high=high))
