"""This library's own: for each query and head as many keys as hold a share of the attention mass.

How many that are is found from the sketch's estimates. The other keys count with their page's mean
value: that halves the error where a share of 0.95 or more is kept, and does not help below 0.9
(benchmarks/policies.py).
"""

from alaya_jax.index import Sketch
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import DIPR
from alaya_jax.query.plan import Plan


def attention(
    config: LlamaConfig, *, recovery: float = 0.95, bits: int = 4, tail: bool = True
) -> Plan:
    """One plan for all layers.

    Args:
      config: not used.
      recovery: share of the attention mass to keep.
      bits: of the sketch, a channel: 2, 4 or 8.
      tail: count the keys that are not read with their page's mean value.
    """
    del config
    return Plan(DIPR(recovery=recovery), index=Sketch(bits), tail=tail)
