"""RetrievalAttention (arXiv 2409.10516): the best k keys of each query head, found in a graph.

In the original each query head has its own graph; here the heads of a group share one, as AlayaDB
found to cost little (section 7.2).
"""

from alaya_jax.index import Graph, Index
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import TopK
from alaya_jax.query.plan import Plan


def attention(config: LlamaConfig, keys: int = 100, *, index: Index | None = None) -> Plan:
    """The best `keys` (the paper's 100, or 2000), with the window [128 + 512].

    Args:
      config: not used.
      keys: k.
      index: default `Graph()`; `Flat()` finds the same keys exactly.
    """
    del config
    return Plan(TopK(keys), index=index or Graph())
