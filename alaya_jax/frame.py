"""What stays fixed while a model's programs run: `Frame`."""

import dataclasses

from jax.sharding import Mesh

from alaya_jax.models.config import LlamaConfig
from alaya_jax.sharding import ShardingRules


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a program is compiled for, beside the shapes of its arrays; hashable, static under jit.

    Attributes:
      config: architecture.
      rope_length: see `models.rope.inverse_frequencies`.
      mesh, rules: where the parameters and the cache lie; no mesh is the default device.
    """

    config: LlamaConfig
    rope_length: int | None = None
    mesh: Mesh | None = None
    rules: ShardingRules = dataclasses.field(default_factory=ShardingRules)
