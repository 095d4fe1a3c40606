"""AlayaDB (arXiv 2504.10326, section 6.2): DIPR through a graph, in the first layer over all keys.

`beta` is the paper's 50, for heads of 128 channels (Table 5). It does not say how many keys that
is, so there is no argument `keys`. Other models need another beta: see `aj.calibrate`.
"""

from alaya_jax.index import Flat, Graph, Index
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import DIPR
from alaya_jax.query.plan import Plan


def attention(
    config: LlamaConfig, *, beta: float = 50.0, index: Index | None = None
) -> tuple[Plan, ...]:
    """A plan for each layer.

    Args:
      config: architecture.
      beta: range below the best score.
      index: of all layers but the first; default `Graph()`.
    """
    query = DIPR(beta)
    rest = Plan(query, index=index or Graph())
    return (Plan(query, index=Flat()), *(rest,) * (config.num_hidden_layers - 1))
