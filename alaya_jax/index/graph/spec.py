"""The graph as an index of a plan: how it is built, once for a stored context, and searched."""

import dataclasses
from typing import Any

from alaya_jax.errors import ConfigError
from alaya_jax.index.graph.build import GraphSpec


@dataclasses.dataclass(frozen=True)
class Graph:
    """The graph index of a stored context (`DB.build_index`), for `DIPR(beta)` and `TopK`, by key.

    Its answer is approximate, unlike that of the other indexes: see `index.graph`.

    Attributes:
      degree: R, neighbours of a key. Building.
      listed: best keys of a query that are linked. Building.
      queries: how many queries of the context itself it is built from, a share of its tokens, of
        each kv head (AlayaDB takes 0.4). Building.
      sink: the first tokens, which are not linked: a query's window should hold them. Building.
      l0: a search goes on everywhere until it has met so many keys; more finds more, and reads
        more. Searching.
      capacity: the most keys that a search for `DIPR` may list (for `TopK` it is 32 times what the
        walk keeps in view). One that would list more is answered by `Flat` instead, and counted
        (`Counts.widened`). Searching.

    Raises:
      ConfigError: a number out of range.
    """

    degree: int = 32
    listed: int = 512
    queries: float = 0.4
    sink: int = 128
    l0: int = 32
    capacity: int = 4096

    def __post_init__(self):
        if not isinstance(self.queries, int | float) or not self.queries > 0:
            raise ConfigError(f"Graph(queries={self.queries!r}): a share of the tokens, above 0")
        least = {"degree": 2, "listed": 2, "sink": 0, "l0": 1, "capacity": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ConfigError(
                    f"Graph({name}={value!r}): must be a whole number, at least {low}"
                )
        _ = self.spec  # checks the degree

    @property
    def spec(self) -> GraphSpec:
        """How the graph of each layer is built."""
        return GraphSpec(degree=self.degree, listed=self.listed)

    @property
    def built(self) -> dict[str, Any]:
        """The settings that are part of a graph on disk; the others may differ in each plan."""
        return {name: getattr(self, name) for name in ("degree", "listed", "queries", "sink")}

    def fits(self, other: "Graph") -> bool:
        """Whether a graph built by `other` serves a plan that asks for this one."""
        return self.built == other.built
