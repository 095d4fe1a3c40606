"""Which positions belong to a query's window: the first and the last tokens, each counted once."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from alaya_jax.cache.views import KeyRange
from alaya_jax.query import Window


@dataclasses.dataclass(frozen=True)
class Split:
    """The keys `0 <= j < end` that a query sees, split into the window and the rest.

    Attributes:
      end: int32 [...], how many keys each query sees.
      sink_end: int32 [...], where the first part of the window ends.
      recent_start: int32 [...], where its second part begins; never below `sink_end`.
    """

    end: Int[Array, "..."]
    sink_end: Int[Array, "..."]
    recent_start: Int[Array, "..."]

    @classmethod
    def of(
        cls, window: Window, end: Int[Array, "..."], known: Int[Array, ""] | None = None
    ) -> "Split":
        """Splits by the sizes of a window. Keys from `known` on, in no index, belong to it too."""
        sink_end = jnp.minimum(window.sink, end)
        recent_start = jnp.maximum(sink_end, end - window.recent)
        if known is not None:
            recent_start = jnp.maximum(sink_end, jnp.minimum(recent_start, known))
        return cls(end, sink_end, recent_start)

    @property
    def size(self) -> Int[Array, "..."]:
        """How many keys the window holds."""
        return self.sink_end + self.end - self.recent_start

    @property
    def inside(self) -> KeyRange:
        """The window's keys."""
        return KeyRange(jnp.zeros_like(self.end), self.end, self.sink_end, self.recent_start)

    @property
    def outside(self) -> KeyRange:
        """The other keys."""
        return KeyRange(self.sink_end, self.recent_start)
