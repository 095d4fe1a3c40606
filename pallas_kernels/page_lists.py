"""Turns a mask of wanted pages into lists of them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """Entries of a page table that lists hold, in order.

    Attributes:
      index: int32 [B, J, C], their numbers; what is past the count means nothing.
      count: int32 [B, J], how many there are.
    """

    index: Int[Array, "B J C"]
    count: Int[Array, "B J"]


def compact(keep: Bool[Array, "B J N"], capacity: int | None = None) -> Entries:
    """The entries that are kept.

    Args:
      keep: which of N entries each list holds.
      capacity: C; default N, which always suffices. Entries past it are left out; the count says
        how many there are all the same.
    """
    batch, lists, n = keep.shape
    capacity = n if capacity is None else capacity
    rank = jnp.cumsum(keep, axis=-1, dtype=jnp.int32)
    slot = jnp.where(keep, rank - 1, capacity)  # past the end: dropped
    b, j = jnp.arange(batch)[:, None, None], jnp.arange(lists)[:, None]
    index = jnp.zeros((batch, lists, capacity), jnp.int32)
    index = index.at[b, j, slot].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
    return Entries(index, rank[..., -1] if n else jnp.zeros((batch, lists), jnp.int32))


__all__ = ["Entries", "compact"]
