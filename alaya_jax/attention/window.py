"""Which positions are the window of a query: the first tokens and the last, each counted once."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from alaya_jax.cache.views import KeyRange
from alaya_jax.query import Window


@dataclasses.dataclass(frozen=True)
class Split:
    """The keys `0 <= j < end` that a query sees, split into its window and the others.

    Attributes:
      end: int32 [...], keys that each query sees.
      sink_end: int32 [...], the window's first part ends here.
      recent_start: int32 [...], and its second begins here; never before `sink_end`.
    """

    end: Int[Array, "..."]
    sink_end: Int[Array, "..."]
    recent_start: Int[Array, "..."]

    @classmethod
    def of(
        cls, window: Window, end: Int[Array, "..."], known: Int[Array, ""] | None = None
    ) -> "Split":
        """Splits by a window's sizes; keys from `known` on, which no index knows, are in it."""
        sink_end = jnp.minimum(window.sink, end)
        recent_start = jnp.maximum(sink_end, end - window.recent)
        if known is not None:
            recent_start = jnp.maximum(sink_end, jnp.minimum(recent_start, known))
        return cls(end, sink_end, recent_start)

    @property
    def size(self) -> Int[Array, "..."]:
        """Keys in the window."""
        return self.sink_end + self.end - self.recent_start

    @property
    def inside(self) -> KeyRange:
        """The window's keys."""
        return KeyRange(jnp.zeros_like(self.end), self.end, self.sink_end, self.recent_start)

    @property
    def outside(self) -> KeyRange:
        """The other keys."""
        return KeyRange(self.sink_end, self.recent_start)
