"""How many keys attention read, for each query token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
    """

    attended: Int[Array, "B T H"]
    scored: Int[Array, "B T H"]
    read: Int[Array, "B T H"]
    mass: Float[Array, "B T H"]
    widened: Int[Array, "B T H"]

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        attended: Array,
        scored: Array,
        read: Array | int = 0,
        mass: Array | float = jnp.nan,
        widened: Array | int = 0,
    ) -> "Counts":
        """Counts of this shape, [B, T, H]; each argument is broadcast to it."""
        each = (attended, scored, read, mass, widened)
        return cls(*(jnp.broadcast_to(x, shape) for x in each))
