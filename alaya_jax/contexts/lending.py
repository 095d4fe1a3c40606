"""Whose graph a session's sequences ask: that of their context, or of another that has as much."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from alaya_jax.cache.pool import PagePool
from alaya_jax.contexts import graphs
from alaya_jax.contexts.context import Context
from alaya_jax.errors import RequestError
from alaya_jax.index import Graph, GraphLayer
from alaya_jax.index.room import Part, Room

Lend = Callable[[np.ndarray, Graph | None], tuple[Context | None, int]]
"""Finds a context that has such a graph, or any, and shares most of these tokens; how many."""


class _Lent(NamedTuple):
    """A layer's graph: by account, of the context, and as far as a sequence's keys are its own."""

    part: dict[Part, int]
    whole: GraphLayer
    graph: GraphLayer


class Lending:
    """The graphs of a batch's contexts (`runtime.batch.GraphSource`).

    Graphs that were asked for stay as long as the batch, whatever becomes of their contexts.
    """

    def __init__(
        self,
        pool: PagePool,
        contexts: list[Context | None],
        reused: list[np.ndarray],
        lend: Lend,
        room: Room,
    ):
        """Args:
        pool: where graphs are put; contexts are looked at under its lock.
        contexts: of each sequence, or None.
        reused: ids of the tokens of each that come from it.
        lend: finds another context's graph.
        room: where graphs that are in memory are counted.
        """
        self._pool, self._lend, self._room = pool, lend, room
        self._contexts, self._reused = contexts, reused
        # Exact keys of equal tokens are equal: a graph of a shorter prefix is as good, so far.
        self._exact = [
            tokens[: context.origin.exact(len(tokens)) if context else 0]
            for context, tokens in zip(contexts, reused, strict=True)
        ]
        self._layers: dict[tuple[int, Any, int], _Lent] = {}
        """By sequence, building settings and layer."""

    def layer(self, b: int, index: Graph, layer: int) -> GraphLayer:
        """See `GraphSource`."""
        key = b, tuple(index.built.items()), layer
        with self._pool.here(), self._pool.lock:
            if key not in self._layers:
                context, known = self._asked(b, index)
                part = context.graph_part(index, self._pool, layer)
                ((name, size),) = part.items()
                whole = self._room.graph(name) or context.graph(index, self._pool, layer)
                self._room.hold(name, whole, size)
                self._layers[key] = _Lent(part, whole, graphs.of_prefix(whole, known))
            return self._layers[key].graph

    def part(self, b: int, index: Graph, layer: int) -> dict[Part, int]:
        """See `GraphSource`."""
        with self._pool.here(), self._pool.lock:
            lent = self._layers.get((b, tuple(index.built.items()), layer))
            if lent is not None:
                return lent.part
            return self._asked(b, index)[0].graph_part(index, self._pool, layer)

    def let_go(self) -> None:
        """See `GraphSource`."""
        self._layers = {}

    def known(self) -> tuple[Graph | None, int]:
        """See `GraphSource`."""
        least, same = min(map(len, self._reused)), None
        for b in range(len(self._contexts)):
            context, known = self._owner(b, None)
            found = context.indexes if context else ()
            if not found or (same and not same.fits(found[0])):
                return None, least
            same, least = found[0], min(least, known)
        return same, least

    def fork(self) -> "Lending":
        """See `GraphSource`."""
        other = Lending(self._pool, self._contexts, self._reused, self._lend, self._room)
        other._layers = dict(self._layers)
        return other

    def _asked(self, b: int, index: Graph) -> tuple[Context, int]:
        """`_owner`, of which there is one."""
        graphs.require_no_context_axis(self._pool, index)
        context, known = self._owner(b, index)
        if context is None:
            raise RequestError(
                f"sequence {b} was opened on no stored context, and a graph index belongs to one; "
                "use aj.Sketch(), or db.import_context(...) and db.build_index(context, "
                "aj.Graph()) before create_session"
            )
        return context, known

    def _owner(self, b: int, wanted: Graph | None) -> tuple[Context | None, int]:
        """Whose graph a sequence asks, such a one or any, and how many of its keys it knows."""
        context, known = self._contexts[b], len(self._reused[b])
        if context is None or not context.has_graph:
            lent, shared = self._lend(self._exact[b], wanted)
            context, known = (lent, shared) if lent is not None else (context, known)
        return context, known
