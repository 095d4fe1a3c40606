"""The arguments of one layer's attention, for all sequences of a batch."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alaya_jax.attention.rows import Axes
from alaya_jax.index.memory import LayerMemory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerQueries:
    """The queries of one layer, and what they may read.

    Attributes:
      q: [B, T, H, D], rotated and unscaled.
      memory: pages of all sequences, with the new tokens already written.
      count: int32 [B], new tokens of each sequence, at most T.
      axes: inside `shard_map`, the mesh axes that pages and heads are split over; static.
    """

    q: Float[Array, "B T H D"]
    memory: LayerMemory
    count: Int[Array, " B"]
    axes: Axes = dataclasses.field(default=Axes(), metadata={"static": True})

    @property
    def covered(self) -> Int[Array, " B"]:
        """How many keys of each sequence the index knows."""
        length = self.memory.table.length
        return jnp.zeros_like(length) if self.memory.covered is None else self.memory.covered

    @property
    def starts(self) -> Int[Array, "B N"]:
        """Position of each page's first token."""
        table = self.memory.table
        if table.start is not None:
            return table.start
        b, n = table.pages.shape
        return jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32) * self.memory.k.shape[2], (b, n))
