"""A model that is only asked for attention, and what a session of it takes on the device."""

import dataclasses

import jax.numpy as jnp

import alaya_jax as aj
from alaya_jax.models.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a layer's attention: H query heads, K kv heads, D."""

    heads: int
    kv_heads: int
    dim: int

    @property
    def group(self) -> int:
        """G."""
        return self.heads // self.kv_heads

    def model(self, layers: int, tokens: int, name: str) -> aj.Model:
        """Its layers have no weights; in bfloat16, for contexts of `tokens` and some more."""
        width = self.heads * self.dim
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.dim,
            max_position_embeddings=2 * tokens,
        )
        embedding = jnp.zeros((64, width), jnp.bfloat16)
        return aj.Model(config, {"embed": {"embedding": embedding}}, fingerprint=name, name=name)


LLAMA_3_8B = Shape(32, 8, 128)
LLAMA_3_2_1B = Shape(32, 8, 64)


def on_device(db: aj.DB, session: aj.Session) -> dict[str, int]:
    """Bytes on the device by account: pages of the pool that are in use, what indexes keep of these
    and of others in this process's memory, and graphs. What lies in mapped files is not there.
    """
    indexes = session.batch.indexes
    lent = getattr(session.batch.graphs, "_layers", {}).values()
    graphs = (x for each in lent for x in (each.graph.neighbours, each.graph.starts))
    counted = sum(indexes.room.graphs.values())  # where they are in memory; in files nothing
    return {
        "pages": db.stats().bytes_pool_used,
        "indexes": sum(indexes.nbytes().values()) - counted,
        "graphs": sum(x.nbytes for x in graphs),
    }
