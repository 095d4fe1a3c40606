"""From a mask of pages to lists of pages."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """Lists of entries of a page table, in ascending order.

    Attributes:
      index: int32 [B, J, C], numbers of the entries; those past `count` mean nothing.
      count: int32 [B, J], how many each list has.
    """

    index: Int[Array, "B J C"]
    count: Int[Array, "B J"]


def compact(keep: Bool[Array, "B J N"], capacity: int | None = None) -> Entries:
    """Lists the entries that a mask keeps.

    Args:
      keep: which of the N entries each list holds.
      capacity: C, the length of the lists; default N, which always suffices. Entries that do not
        fit are left out, but `count` includes them.
    """
    batch, lists, n = keep.shape
    capacity = n if capacity is None else capacity
    rank = jnp.cumsum(keep, axis=-1, dtype=jnp.int32)
    slot = jnp.where(keep, rank - 1, capacity)  # out of bounds: dropped
    b, j = jnp.arange(batch)[:, None, None], jnp.arange(lists)[:, None]
    index = jnp.zeros((batch, lists, capacity), jnp.int32)
    index = index.at[b, j, slot].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
    return Entries(index, rank[..., -1] if n else jnp.zeros((batch, lists), jnp.int32))


__all__ = ["Entries", "compact"]
