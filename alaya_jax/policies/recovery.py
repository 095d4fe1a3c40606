"""This library's own: per query and head as many keys as hold a share of the attention mass, by the
estimates of the sketch; the others with their page's mean value, which halves the error where a
share of 0.95 or more is kept and does not help below 0.9 (benchmarks/policies.py).
"""

from alaya_jax.index import Sketch
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import DIPR
from alaya_jax.query.plan import Plan


def attention(
    config: LlamaConfig, *, recovery: float = 0.95, bits: int = 4, tail: bool = True
) -> Plan:
    """Args: the architecture; the share of the mass; bits a channel of the sketch; whether unread
    keys are counted with their page's mean value.
    """
    del config
    return Plan(DIPR(recovery=recovery), index=Sketch(bits), tail=tail)
