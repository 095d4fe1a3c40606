"""What an approximate index found: keys with their exact scores, in a list of fixed width."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
    """Keys that a search found, of each query row; C is the capacity asked for.

    Attributes:
      positions: int32 [K, G, T, C], in the sequence; what is found comes first.
      scores: float32 [K, G, T, C], exact raw inner products; -inf marks an unused slot.
      visited: int32 [K, G, T], keys that were scored for this row.
      overflow: bool [K, G, T], the list was full and something was left out: the caller has to
        answer this row by an exact plan.
      met: bool [K, N, T], pages whose keys the search read; None: not kept account of.
    """

    positions: Int[Array, "K G T C"]
    scores: Float[Array, "K G T C"]
    visited: Int[Array, "K G T"]
    overflow: Bool[Array, "K G T"]
    met: Bool[Array, "K N T"] | None = None

    @property
    def count(self) -> Int[Array, "K G T"]:
        """Keys found: slots `0 .. count` are in use."""
        return jnp.sum(self.scores > -jnp.inf, axis=-1, dtype=jnp.int32)


def to_front(
    keep: Bool[Array, "N C"], positions: Int[Array, "N C"], scores: Float[Array, "N C"]
) -> tuple[Int[Array, "N C"], Float[Array, "N C"]]:
    """Moves what is kept to the front of each row, in order; the rest becomes unused slots."""
    rows, width = keep.shape
    rank = jnp.cumsum(keep, axis=-1, dtype=jnp.int32) - 1
    slot = jnp.where(keep, rank, width)
    row = jnp.arange(rows)[:, None]
    return (
        jnp.zeros_like(positions).at[row, slot].set(positions, mode="drop"),
        jnp.full_like(scores, -jnp.inf).at[row, slot].set(scores, mode="drop"),
    )


def per_row(beta: float | jax.Array, q: Float[Array, "K G T D"]) -> Float[Array, "K G T"]:
    """beta of each query row, given a number, [H] or [K, G, T]."""
    beta = jnp.asarray(beta, jnp.float32)
    if beta.ndim == 1:
        beta = beta.reshape(q.shape[0], q.shape[1], 1)
    return jnp.broadcast_to(beta, q.shape[:3])
