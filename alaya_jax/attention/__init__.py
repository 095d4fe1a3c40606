"""The engine that answers attention as a query over paged keys: select, attend, merge."""

from alaya_jax.attention.engine import attend
from alaya_jax.attention.partial import Partial, merge

__all__ = ["Partial", "attend", "merge"]
