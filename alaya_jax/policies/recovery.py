"""This library's own: per query and head as many keys as hold a share of the attention mass, by the
estimates of the sketch.
"""

from alaya_jax.index import Sketch
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import DIPR
from alaya_jax.query.plan import Plan


def attention(
    config: LlamaConfig, *, recovery: float = 0.95, bits: int = 4, tail: bool = False
) -> Plan:
    """Args: the architecture; the share of the mass; bits a channel of the sketch; whether unread
    keys are counted with their page's mean value.
    """
    del config
    return Plan(DIPR(recovery=recovery), index=Sketch(bits), tail=tail)
