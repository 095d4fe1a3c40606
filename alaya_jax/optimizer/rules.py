"""AlayaDB's own rules of which plan answers, beside the cost model's choice."""

import dataclasses

from alaya_jax.index import Block, Flat, Graph, Index
from alaya_jax.query import DIPR, Full, TopK
from alaya_jax.query.plan import Plan, Plans

SHORT = 4096
"""Tokens below which AlayaDB's rules read every key; the paper gives no number (Figure 8)."""


AS_PUBLISHED = DIPR(beta=50.0)
"""The paper's range."""

GRAPH = Graph()
"""The paper's index by key, with this library's settings."""


def alayadb_rules(
    layers: int,
    length: int,
    *,
    reused: int = 0,
    stored: int = 0,
    memory_high: bool = False,
    query: DIPR = AS_PUBLISHED,
    k: int = 2048,
    fine: Index = GRAPH,
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
      query: range and window.
      k: of the top-k query; the paper's.
      fine: index by key.
    """
    if length < SHORT:
        return Plan(Full())
    window, before = query.window, None
    if reused < stored:
        before = reused
        window = dataclasses.replace(window, recent=max(window.recent, length - reused))
    if memory_high:
        return Plan(TopK(k, window, before), Block("leaders"), by="page", share="layer")
    query = dataclasses.replace(query, window=window, before=before)
    first, rest = Plan(query, Flat()), Plan(query, fine)
    return (first, *(rest,) * (layers - 1))
