"""A stored context, as the database and its sessions see it."""

from typing import Any

import numpy as np

from alaya_jax import graphs
from alaya_jax.index import Graph, GraphLayer
from alaya_jax.model import Model
from alaya_jax.pool import Sequence
from alaya_jax.storage import ContextRecord, DirectoryStore


class Context:
    """A prompt whose keys and values are stored. Handles compare by identity.

    Attributes:
      id: name in the database.
      title: for people.
      num_tokens: length.
      problem: why it cannot be used, and the way out; None when it can.
    """

    def __init__(self, record: ContextRecord, store: DirectoryStore):
        """Made by the database."""
        self.id = record.id
        self.title = record.header.title if record.header else ""
        self.num_tokens = record.num_tokens
        self.nbytes = record.nbytes
        self.created = record.created
        self.problem = record.problem
        self.header = record.header
        self._store = store
        self._tokens: np.ndarray | None = None
        self._resident: Sequence | None = None
        self._used = 0
        self._graph: tuple[dict[str, Any], dict[int, GraphLayer]] | None = None

    @property
    def tokens(self) -> np.ndarray:
        """Token ids, int32 [n].

        Raises:
          ContextError: the stored context is damaged.
        """
        if self._tokens is None:
            self._tokens = self._store.tokens(self.id)
        return self._tokens

    @property
    def indexes(self) -> tuple[Graph, ...]:
        """The indexes that are stored with it (`DB.build_index`) and look well."""
        records = self._store.indexes(self.id).values()
        return tuple(
            Graph(**record.settings)
            for record in records
            if record.kind == graphs.KIND and record.problem is None
        )

    @property
    def has_graph(self) -> bool:
        """Whether a graph is stored with it or in memory, of any settings, damaged or not."""
        return self._graph is not None or graphs.KIND in self._store.indexes(self.id)

    def graph(self, wanted: Graph, model: Model, layer: int) -> GraphLayer:
        """Its graph of one layer, on the device; read when first asked for.

        Raises:
          ContextError: there is none, or it is damaged.
          RequestError: it was built with other settings.
        """
        if self._graph is None or self._graph[0] != wanted.built:
            self._graph = wanted.built, {}
        layers = self._graph[1]
        if layer not in layers:
            layers[layer] = graphs.load(self._store, self.id, wanted, model, layer)
        return layers[layer]

    def __repr__(self) -> str:
        place = "in memory" if self._resident else "on disk"
        name = f"{self.title!r}, " if self.title else ""
        return f"Context({name}{self.num_tokens:,} tokens, {place}, {self.problem or self.id})"
