"""Bytes that a key takes: with its value in the cache, and in what indexes know of it."""

import dataclasses
from typing import Any

import numpy as np

from alaya_jax import units
from alaya_jax.index import Block, Sketch
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query.plan import Plans, indexes_of


@dataclasses.dataclass(frozen=True)
class KeyBytes:
    """Of one token in one layer, all kv heads together, as the cache holds it.

    Attributes:
      kv: of its key and value.
      indexes: what each index of pages keeps beside them, means over a page; by `repr`. A graph is
        of a context, and `Flat` keeps nothing: neither is here.
    """

    kv: int
    indexes: dict[str, float]

    @classmethod
    def of(cls, plans: Plans, config: LlamaConfig, page_size: int, dtype: Any) -> "KeyBytes":
        """Of what plans ask."""
        dtype = np.dtype(dtype)
        kv = config.layer_kv_width * dtype.itemsize
        asked = indexes_of(plans, config.num_hidden_layers)
        found = {
            repr(index): index.page_bytes(config, page_size, dtype) / page_size
            for index in asked
            if isinstance(index, Block | Sketch)
        }
        return cls(kv, found)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        beside = (
            f"{name} {units.nbytes(size)} beside it ({units.share(size / self.kv)})"
            for name, size in self.indexes.items()
        )
        return ", ".join([f"a key and its value take {units.nbytes(self.kv)} a layer", *beside])
