"""Retrieval indexes over the keys of a cache.

A spec (`Flat()`, `Sketch(bits=4)`, `Block("bounds")`) says which index is wanted; it is frozen and
hashable. Its `create` makes the index of one layer, a pytree whose arrays begin with the axes
[K, P] of the pages it covers and are sharded like them. What an index holds of a page depends on
that page's keys alone: so whatever is done to pages (shared, copied on write, evicted) is done to
the index by the same page ids. An index covers the full pages of a sequence; the keys behind those
are in the window, or are scored one by one (AlayaDB's late materialization, section 7.2).

Of one layer, an index answers
  build        what it holds of the pages that new tokens filled
  scan         an estimate of every score in a range of positions, and the error it may have
               (`Flat`, `Sketch`), or
  scan_pages   a score for each page (`Block`)

`Flat` holds nothing and estimates without error. `Sketch` reads a few bits a channel, of a random
rotation or in a basis learnt from the model's queries and keys (`basis`, `learnt`).

`Graph` is another kind: of a whole stored context, not of pages; it is built once
(`DB.build_index`) and lives as long as its context. It scores few keys and finds, approximately,
what is asked.
"""

import dataclasses

import jax
from jaxtyping import Array, Int

from alaya_jax.cache.tiers import HostPages
from alaya_jax.index.block import Block, BlockLayer
from alaya_jax.index.flat import Flat
from alaya_jax.index.found import Found
from alaya_jax.index.graph.build import GraphSpec
from alaya_jax.index.graph.layer import GraphLayer
from alaya_jax.index.graph.spec import Graph
from alaya_jax.index.output_error import Look, Summaries, keep_below
from alaya_jax.index.recovery import BOUND, Recovered, Weights, of_pages, recover
from alaya_jax.index.scan import Scan
from alaya_jax.index.sketch import MISS, Sketch, SketchLayer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Indexed:
    """What a batch's attention reads beside the pool.

    Attributes:
      layers: L, what the index of each layer holds; None for `Flat`; for `Graph` a graph of each
        sequence.
      covered: int32 [B], tokens of each sequence that the indexes cover, from the first on.
      host: L, pages in mapped files that the batch's table names; None: there are none.
    """

    layers: "tuple[LayerIndex | Graphs | None, ...]"
    covered: Int[Array, " B"]
    host: tuple[HostPages, ...] | None = None


Index = Flat | Sketch | Block | Graph
LayerIndex = SketchLayer | BlockLayer
"""What an index holds of one layer's pages; `Flat` holds nothing."""

Graphs = tuple[GraphLayer, ...]
"""Of one layer, the graph of each sequence's context."""

__all__ = [
    "BOUND",
    "MISS",
    "Block",
    "BlockLayer",
    "Flat",
    "Found",
    "Graph",
    "GraphLayer",
    "GraphSpec",
    "Graphs",
    "Index",
    "Indexed",
    "LayerIndex",
    "Look",
    "Recovered",
    "Scan",
    "Sketch",
    "SketchLayer",
    "Summaries",
    "Weights",
    "keep_below",
    "of_pages",
    "recover",
]
