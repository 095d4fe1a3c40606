"""AlayaDB's own rules of which plan answers, beside the cost model's choice."""

import dataclasses

from alaya_jax import index
from alaya_jax.index import Block, Flat, Index, Sketch
from alaya_jax.query import DIPR, Full, TopK, Window
from alaya_jax.query.plan import Plan, Plans

SHORT = 4096
"""Tokens below which AlayaDB's rules read every key; the paper gives no number (Figure 8)."""


def alayadb_rules(
    layers: int,
    length: int,
    *,
    reused: int = 0,
    stored: int = 0,
    memory_high: bool = False,
    beta: float = 50.0,
    k: int = 2048,
    window: Window | None = None,
    fine: Index | None = None,
) -> Plans:
    """The rules of AlayaDB's optimizer (arXiv 2504.10326, section 6.2, Figure 8).

      short context        full attention
      else, partly reused  keys below the reused prefix only
      and memory high      top-k, coarse index
      else first layer     DIPR, flat index
      else                 DIPR, fine index

    Keys of the session's own that a filter leaves out stay attended to, as in AlayaDB: the window
    reaches back over them.

    Args:
      layers: L.
      length: tokens there will be.
      reused: of those, from a stored context.
      stored: tokens of that context.
      memory_high: whether the device's memory has room for a coarse index's blocks.
      beta, k: of the queries; the paper's.
      window: default `Window()`.
      fine: index by key; default `Graph()`, or `Sketch()` where the library has no graph.
    """
    if length < SHORT:
        return Plan(Full())
    window, before = window or Window(), None
    if reused < stored:
        before = reused
        window = dataclasses.replace(window, recent=max(window.recent, length - reused))
    if memory_high:
        return Plan(TopK(k, window, before), Block("leaders"), by="page", share="layer")
    query = DIPR(beta=beta, window=window, before=before)
    first, rest = Plan(query, Flat()), Plan(query, fine or getattr(index, "Graph", Sketch)())
    return (first, *(rest,) * (layers - 1))
