"""How many keys attention read, for each query token."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """How many keys attention read, for each new token and query head.

    Attributes:
      attended: int32 [B, T, H], keys whose values the output averages.
      scored: int32 [B, T, H], keys that the index scored (by page: keys of the pages it scored),
        plus those of the window.
      read: int32 [B, T, H], keys outside the window whose K was read. A block of tokens and the
        heads of one kv head share a read, so what was read is the sum over T and over kv heads.
      mass: float32 [B, T, H], estimated share of the attention mass that these keys hold; NaN
        where nothing was estimated.
      widened: int32 [B, T, H], 1 where an approximate search found more than it had room for, so
        that a scan of all keys answered instead.
      error: float32 [B, T, H], estimated |out - full| / |full|; NaN where nothing was estimated.
      met: uint8 [B, K, N], of the pages in the table those that the answer came from: keys (1),
        values (2); see `met`. None: not recorded.
    """

    attended: Int[Array, "B T H"]
    scored: Int[Array, "B T H"]
    read: Int[Array, "B T H"]
    mass: Float[Array, "B T H"]
    widened: Int[Array, "B T H"]
    error: Float[Array, "B T H"]
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
        error: Array | float = jnp.nan,
        met: Array | None = None,
    ) -> "Counts":
        """Counts of this shape, [B, T, H]; each number is broadcast to it, `met` is kept as is."""
        each = (attended, scored, read, mass, widened, error)
        return cls(*(jnp.broadcast_to(x, shape) for x in each), met=met)
