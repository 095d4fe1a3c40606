"""Quest (arXiv 2406.10774): pages by an upper bound of their scores, from each channel's smallest
and largest key. Each query head chooses; the first two layers attend to everything.
"""

from alaya_jax.index import Block
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import Full, TopK, Window
from alaya_jax.query.plan import Plan

DENSE_LAYERS = 2


def attention(
    config: LlamaConfig, keys: int = 1024, *, window: Window | None = None
) -> tuple[Plan, ...]:
    """A plan for each layer.

    Args:
      config: architecture.
      keys: token budget of a head.
      window: always attended; default `Window()`. The original has none, and loses by that.
    """
    query = TopK(keys, window or Window())
    sparse = Plan(query, index=Block("bounds"), by="page")
    dense = min(DENSE_LAYERS, config.num_hidden_layers)
    return (Plan(Full()),) * dense + (sparse,) * (config.num_hidden_layers - dense)
