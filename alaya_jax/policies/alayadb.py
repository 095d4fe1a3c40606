"""AlayaDB (arXiv 2504.10326, section 6.2): DIPR in a graph, in the first layer over all keys.

`beta` is the paper's 50, for heads of 128 channels (Table 5); it says nothing of how many keys that
is, so `keys` is not an argument. Other models want another: see `aj.calibrate`.
"""

from alaya_jax.index import Flat, Graph, Index
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import DIPR
from alaya_jax.query.plan import Plan


def attention(
    config: LlamaConfig, *, beta: float = 50.0, index: Index | None = None
) -> tuple[Plan, ...]:
    """Args: the architecture; the range; the index of all layers but the first, by default
    `Graph()`.
    """
    query = DIPR(beta)
    rest = Plan(query, index=index or Graph())
    return (Plan(query, index=Flat()), *(rest,) * (config.num_hidden_layers - 1))
