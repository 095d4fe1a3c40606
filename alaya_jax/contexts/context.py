"""A stored context, as the database and its sessions see it."""

from typing import Any

import numpy as np

from alaya_jax.at_rest import StoreDtype
from alaya_jax.cache.pool import PagedSequence, PagePool
from alaya_jax.contexts import graphs
from alaya_jax.errors import ContextError, RequestError
from alaya_jax.index import Graph, GraphLayer
from alaya_jax.index.room import Part
from alaya_jax.prefix import common_prefix
from alaya_jax.query.origin import Origin
from alaya_jax.storage import ContextRecord, ContextStore


class Context:
    """A prompt whose keys and values are stored. Handles compare by identity.

    `store`, `resident` (its pages, where it is in memory) and `used` are the catalogue's.

    Attributes:
      id: name in the database.
      title: for people.
      num_tokens: length.
      origin: how its keys and values were computed.
      pinned: kept in the store until it is unpinned, and in memory once it is there.
      problem: why it cannot be used, and the way out; None when it can.
    """

    def __init__(self, record: ContextRecord, store: ContextStore):
        """Made by the catalogue."""
        self.id = record.id
        self.title = record.header.title if record.header else ""
        self.num_tokens = record.num_tokens
        self.nbytes = record.nbytes
        self.created = record.created
        self.pinned = record.pinned
        self.problem = record.problem
        self.header = record.header
        self.origin = Origin(record.header.origin if record.header else ())
        self.store = store
        self._tokens: np.ndarray | None = None
        self.resident: PagedSequence | None = None
        self.used = 0
        self._graph: tuple[dict[str, Any], dict[Any, GraphLayer]] | None = None

    @property
    def tokens(self) -> np.ndarray:
        """Token ids, int32 [n].

        Raises:
          ContextError: the stored context is damaged.
        """
        if self._tokens is None:
            self._tokens = self.store.tokens(self.id)
        return self._tokens

    @property
    def indexes(self) -> tuple[Graph, ...]:
        """The indexes that are stored with it (`DB.build_index`) and look undamaged."""
        records = self.store.indexes(self.id).values()
        return tuple(
            Graph(**record.settings)
            for record in records
            if record.kind == graphs.KIND and record.problem is None
        )

    @property
    def has_graph(self) -> bool:
        """Whether a graph is stored with it or in memory, of any settings, damaged or not."""
        return self._graph is not None or graphs.KIND in self.store.indexes(self.id)

    def graph(self, wanted: Graph, pool: PagePool, layer: int) -> GraphLayer:
        """Its graph of one layer, where a pool of pages is; read when first asked for.

        Raises:
          ContextError: there is none, or it is damaged.
          RequestError: it was built with other settings.
        """
        if self._graph is None or self._graph[0] != wanted.built:
            self._graph = wanted.built, {}
        layers, key = self._graph[1], (layer, pool.device)
        if key not in layers:
            layers[key] = graphs.load(self.store, self.id, wanted, pool, layer)
        return layers[key]

    def graph_part(self, wanted: Graph, pool: PagePool, layer: int) -> dict[Part, int]:
        """What that takes of memory there; raises as `graph`."""
        if self._graph is None or self._graph[0] != wanted.built:
            graphs.check(self.store, self.id, wanted)
        return graphs.part(self.id, self.num_tokens, wanted, pool, layer)

    def forget_graph(self) -> None:
        """Lets go of what is in memory of its graph."""
        self._graph = None

    def pin(self) -> None:
        """Keeps it: `remove` refuses it, and its pages stay in memory once they are there.

        Raises:
          ContextError: it is no longer there.
          DatabaseError: the database is open for reading only.
        """
        self.store.pin(self.id)
        self.pinned = True

    def unpin(self) -> None:
        """Lets it be removed, and leave memory, again. Raises as `pin` does."""
        self.store.pin(self.id, False)
        self.pinned = False

    @property
    def store_dtype(self) -> StoreDtype | None:
        """What its keys and values are stored in; None: as they were computed."""
        found: Any = self.header.store_dtype if self.header else ""
        return found or None

    @property
    def exact_tokens(self) -> int:
        """How many of its tokens, from the first on, have exact keys and values."""
        return self.origin.exact(self.num_tokens)

    def shared(self, tokens: np.ndarray, *, exact: bool = True) -> int:
        """How many tokens it has in common with a prompt, from the first on; 0 if it is damaged.

        Args:
          tokens: of the prompt.
          exact: of those that have exact keys and values.
        """
        n = min(self.exact_tokens if exact else self.num_tokens, len(tokens))
        try:
            return common_prefix(self.tokens[:n], tokens)
        except ContextError as error:  # not known to be a prefix: the others serve
            self.problem = str(error)
            return 0

    def __reduce__(self) -> Any:
        raise RequestError(
            f"a context belongs to an open database and cannot be copied or pickled; pass its id, "
            f"{self.id!r}"
        )

    def __repr__(self) -> str:
        place = "in memory" if self.resident else "on disk"
        name = f"{self.title!r}, " if self.title else ""
        exact = f"the first {self.exact_tokens:,} exact, " if self.origin.runs else ""
        return (
            f"Context({name}{self.num_tokens:,} tokens, {exact}{place}, {self.problem or self.id})"
        )
