"""What attention reads: keys and values in pages, the table of a batch, and its indexes."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.index import Graphs, Indexed, LayerIndex


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerMemory:
    """`Memory`, of one layer.

    Attributes:
      k, v: pool of the layer, [K, P, Z, D].
      table: pages of each sequence, and the lengths before the new tokens.
      index: what the plan's index holds of the layer; None: it scores all keys.
      covered: keys of each sequence that the index knows, from the first on; None: none.
    """

    k: Float[Array, "K P Z D"]
    v: Float[Array, "K P Z D"]
    table: PageTable
    index: LayerIndex | Graphs | None = None
    covered: Int[Array, " B"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What a batch's attention reads, in all layers.

    Attributes:
      kv: the pool.
      table: pages of each sequence, and the lengths before the new tokens.
      indexed: what the plans' indexes hold; None: nothing, and every key is scored.
    """

    kv: PagedKV
    table: PageTable
    indexed: Indexed | None = None

    def layer(self, layer: int) -> LayerMemory:
        """Of one layer."""
        index, covered = None, None
        if self.indexed is not None:
            index, covered = self.indexed.layers[layer], self.indexed.covered
        return LayerMemory(self.kv.k[layer], self.kv.v[layer], self.table, index, covered)
