"""What attention of one layer takes, of all sequences of a batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alaya_jax.cache import PageTable
from alaya_jax.index import LayerIndex
from alaya_jax.pallas_kernels.dispatch import Choice


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One layer's queries and pages, of all sequences.

    Attributes:
      q: [B, T, H, D], rotated, unscaled.
      k, v: [K, P, Z, D], the pool.
      table: pages, and the lengths before the new tokens.
      count: int32 [B], new tokens of each sequence.
      index: what the plan's index holds.
      covered: int32 [B], keys that it knows.
      axis, head_axis: mesh axes that pages and heads are split over, inside shard_map.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "K P Z D"]
    v: Float[Array, "K P Z D"]
    table: PageTable
    count: Int[Array, " B"]
    index: LayerIndex | None
    covered: Int[Array, " B"]
    axis: str | None = dataclasses.field(default=None, metadata={"static": True})
    head_axis: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def starts(self) -> Int[Array, "B N"]:
        """Position of the first token of each page."""
        if self.table.start is not None:
            return self.table.start
        b, n = self.table.pages.shape
        return jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32) * self.k.shape[2], (b, n))


def abstract(*shape: int, dtype: Any = jnp.int32) -> Any:
    """The shape and type of an array that is not there."""
    return jax.ShapeDtypeStruct(shape, dtype)


def passed_over(choice: Choice, implementation: str) -> str | None:
    """Why an operation would not run by this implementation."""
    if implementation in (choice.implementation, "reference"):
        return None
    reasons = dict(choice.passed_over)
    return f"{choice.op}: {reasons.get(implementation, 'it has no such implementation')}"
