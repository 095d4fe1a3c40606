"""From which pages are wanted to lists of them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def compact(
    keep: Bool[Array, "B K N"], capacity: int | None = None
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """Numbers of the entries that are kept, in order, and how many there are.

    Args:
      keep: which of N entries each list holds.
      capacity: C; default N, which always suffices. Entries past it are left out; the count says
        how many there are all the same.
    """
    batch, lists, n = keep.shape
    capacity = n if capacity is None else capacity
    rank = jnp.cumsum(keep, axis=-1, dtype=jnp.int32)
    slot = jnp.where(keep, rank - 1, capacity)  # past the end: dropped
    b, k = jnp.arange(batch)[:, None, None], jnp.arange(lists)[:, None]
    index = jnp.zeros((batch, lists, capacity), jnp.int32)
    index = index.at[b, k, slot].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
    return index, rank[..., -1] if n else jnp.zeros((batch, lists), jnp.int32)


__all__ = ["compact"]
