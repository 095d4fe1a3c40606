"""The model: a pure-functional Llama in Flax Linen. It knows nothing of the database.

Importing this package is cheap; `alaya_jax.models.llama` pulls in jax and flax.
"""

from alaya_jax.models.config import LlamaConfig, RopeConfig

__all__ = ["LlamaConfig", "RopeConfig"]
