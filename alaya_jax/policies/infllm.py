"""InfLLM (arXiv 2402.04617): blocks by a few representative keys, one choice for all heads.

Differences: the original's representatives are the keys that received most attention locally, here
they are the keys farthest from the block's mean. Its blocks have 128 tokens, here a block is a
page: `DB(page_size=128)` gives the original's. Retrieved keys keep their positions, where the
original puts all of them at the same far one.
"""

from alaya_jax.index import Block
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import TopK, Window
from alaya_jax.query.plan import Plan


def attention(config: LlamaConfig, keys: int = 4096, *, recent: int = 4096) -> Plan:
    """One plan for all layers; by default the setting of AlayaDB's Table 5, [128 + 4K] + 4K.

    Args:
      config: not used.
      keys: to retrieve, in whole pages.
      recent: last tokens, always attended.
    """
    del config
    query = TopK(keys, Window(sink=128, recent=recent))
    return Plan(query, index=Block("leaders"), by="page", share="layer")
