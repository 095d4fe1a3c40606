"""What attention reads: keys and values in pages, the table of a batch, and its indexes."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.cache.tiers import HostPages, Pool, joined
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
      host: pages that the table names behind the P of the pool; None: there are none.
    """

    k: Float[Array, "K P Z D"]
    v: Float[Array, "K P Z D"]
    table: PageTable
    index: LayerIndex | Graphs | None = None
    covered: Int[Array, " B"] | None = None
    host: HostPages | None = None

    @property
    def pools(self) -> tuple[Pool, Pool]:
        """Keys and values that the table names pages of."""
        host = self.host
        return joined(self.k, host and host.k), joined(self.v, host and host.v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What a batch's attention reads, in all layers.

    Attributes:
      kv: the pool.
      table: pages of each sequence, and the lengths before the new tokens.
      indexed: what the plans' indexes hold, and pages in mapped files; None: nothing, and every key
        is scored.
    """

    kv: PagedKV
    table: PageTable
    indexed: Indexed | None = None

    def layer(self, layer: int) -> LayerMemory:
        """Of one layer."""
        index, covered, host = None, None, None
        if self.indexed is not None:
            index, covered = self.indexed.layers[layer], self.indexed.covered
            host = self.indexed.host[layer] if self.indexed.host is not None else None
        return LayerMemory(self.kv.k[layer], self.kv.v[layer], self.table, index, covered, host)
