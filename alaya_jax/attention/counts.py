"""What attention read, query token by query token."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What attention read, for each new token and query head.

    Attributes:
      attended: int32 [B, T, H], keys that the output is a mean of.
      scored: int32 [B, T, H], keys (by page: of pages) that an index scored, and the window's.
      read: int32 [B, T, H], keys outside the window whose K was read, once for a block of tokens
        and the heads of a kv head: the sum over T and over the kv heads is what was read.
      mass: float32 [B, T, H], estimated share of the attention mass attended to; NaN where it was
        not estimated.
      widened: int32 [B, T, H], 1 where an approximate search had no room for what it met, and the
        scan of all keys answered instead.
      met: uint8 [B, K, N], of the pages in the table those that the answer came from, keys (1) and
        values (2); see `met`. None: not kept account of.
    """

    attended: Int[Array, "B T H"]
    scored: Int[Array, "B T H"]
    read: Int[Array, "B T H"]
    mass: Float[Array, "B T H"]
    widened: Int[Array, "B T H"]
    met: UInt8[Array, "B K N"] | None = None

    def by_row(self, function: Callable[[Array], Array]) -> "Counts":
        """With the numbers of query rows changed; pages that were met stay."""
        rows = dataclasses.replace(self, met=None)
        return dataclasses.replace(jax.tree.map(function, rows), met=self.met)

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        attended: Array,
        scored: Array,
        read: Array | int = 0,
        mass: Array | float = jnp.nan,
        widened: Array | int = 0,
        met: Array | None = None,
    ) -> "Counts":
        """The counts, each broadcast to the shape of the rows; `met` as it is."""
        each = (attended, scored, read, mass, widened)
        return cls(*(jnp.broadcast_to(x, shape) for x in each), met=met)
