"""StreamingLLM (arXiv 2309.17453): the first and the last keys, nothing is retrieved.

The sizes are those that AlayaDB compares with ([128] + 8K, Table 5). Positions stay as they are:
the original numbers them anew inside its cache.
"""

from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import Window


def attention(config: LlamaConfig, keys: int = 8192, *, sink: int = 128) -> Window:
    """One window for all layers, `keys` longer than that of the methods that retrieve.

    Args:
      config: not used.
      keys: how much longer.
      sink: first tokens, always attended.
    """
    del config
    return Window(sink=sink, recent=Window().recent + keys)
