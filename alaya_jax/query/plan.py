"""How a query is answered: through which index, by key or by page, for each head or a group.

A plan is a pytree like the query in it: numbers are data, choices are structure. Wherever attention
is asked for, a query, a plan, or a tuple with one of either a layer is taken.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, Literal

import jax
import numpy as np

from alaya_jax.errors import RequestError
from alaya_jax.index import Block, Flat, Graph, Index, Sketch
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import DIPR, Custom, Query, Tiles, TopK
from alaya_jax.query.auto import Auto

_QUERIES = (
    "use Full(), Window(), DIPR(beta=...), DIPR(recovery=...), DIPR(error=...), TopK(k), "
    "Tiles(...), Custom(select)"
)

SKETCH_FROM = 4096
"""Tokens from which a plan without an index asks the sketch; below, scoring all keys is as fast
(benchmarks/decode_attention.py).
"""

LEARNT_SKETCH = Sketch(2, "learnt")
"""The sketch of such a plan where there is a basis: one bit is enough for ranges and shares of the
mass, but a bound of the output's error reads 1.4 times as many keys with it (docs/decisions.md).
"""

STATIC = {"static": True}

Tier = Literal["device", "host"]
"""Where a stored context's pages are read: in the pool, or where they lie in the store."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to answer a query.

    Attributes:
      query: what is wanted.
      index: what finds it; None chooses by length: `Flat()` for short contexts, else
        `LEARNT_SKETCH`, where something was learnt of the model's keys, else `Sketch()`.
      by: "key", or "page": a page is kept whole, by its best key's score or, with `Block`, by its
        summary's. `TopK(k)` then keeps k / Z pages.
      share: "head": each query head has its own keys. "group": the heads of a kv head share one
        selection, for `DIPR` the union of theirs, for `TopK` the keys best for any of them.
        "layer": all heads of the layer share one, by the mean of their scores (InfLLM); by page
        only.
      tail: adds an estimate of what was not read: each unread key's estimated weight times its
        page's mean value. `Sketch` only, by key. `DIPR(error=...)` counts on it: there it is True.
      implementation: of attention: None takes the fastest that can run. "mosaic_gpu" (kernels for
        Hopper), "xla", or "reference" (the kernels' definition, slow); one that cannot run is
        refused with the reason.
      tier: where stored pages are read: "device": in the pool, into which they are brought before
        it runs; "host": where they lie in the database's files; None: where they are. It changes no
        answer; see `DB.create_session`. Plans that run together name no two.
    """

    query: Query
    index: Index | None = field(default=None, metadata=STATIC)
    by: Literal["key", "page"] = field(default="key", metadata=STATIC)
    share: Literal["head", "group", "layer"] = field(default="head", metadata=STATIC)
    tail: bool = field(default=False, metadata=STATIC)
    implementation: Literal["mosaic_gpu", "xla", "reference"] | None = field(
        default=None, metadata=STATIC
    )
    tier: Tier | None = field(default=None, metadata=STATIC)

    def __post_init__(self):
        if isinstance(self.query, str | type | int | float):
            raise RequestError(f"Plan({self.query!r}): {_QUERIES}")
        if not isinstance(self.query, Query):
            return  # jax puts placeholders into trees
        if self.index is not None and not isinstance(self.index, Index):
            raise RequestError(
                f"Plan(index={self.index!r}): use Flat(), Sketch(bits=...), Block(summary=...) or "
                "Graph()"
            )
        for name, options in (
            ("by", ("key", "page")),
            ("share", ("head", "group", "layer")),
            ("implementation", (None, "mosaic_gpu", "xla", "reference")),
            ("tier", (None, "device", "host")),
        ):
            if getattr(self, name) not in options:
                raise RequestError(f"Plan({name}={getattr(self, name)!r}): use one of {options}")
        if self.share == "layer" and self.by != "page":
            raise RequestError("Plan(share='layer'): heads of one layer share pages; use by='page'")
        if isinstance(self.index, Block) and self.by != "page":
            raise RequestError("Plan(index=Block(...)): it scores whole pages; use by='page'")
        if isinstance(self.index, Block) and isinstance(self.query, DIPR) and self.query.recovery:
            raise RequestError(
                "Plan(DIPR(recovery=...), Block(...)): page summaries do not estimate the mass of "
                "a page; use Sketch() or Flat()"
            )
        if isinstance(self.query, Custom) and (
            not isinstance(self.index, Flat | None) or self.by != "key" or self.tail
        ):
            raise RequestError(
                f"Plan(Custom(...), index={self.index!r}, by={self.by!r}, tail={self.tail}): the "
                "function chooses keys by exact scores; use Flat(), by='key', and no tail"
            )
        if isinstance(self.query, DIPR) and self.query.error is not None:
            self._check_error()
            object.__setattr__(self, "tail", True)
        if isinstance(self.index, Graph):
            self._check_graph()
        if (self.tail and not (self.index is None or isinstance(self.index, Sketch))) or (
            self.tail and self.by != "key"
        ):
            raise RequestError(
                "Plan(tail=True): needs estimates of every score; use Sketch() and by='key'"
            )

    def _check_error(self) -> None:
        if not isinstance(self.index, Sketch | None) or self.by != "key":
            raise RequestError(
                f"Plan(DIPR(error=...), index={self.index!r}, by={self.by!r}): the error is "
                "estimated from every key's score and the means of pages; use Sketch() and by='key'"
            )

    def _check_graph(self) -> None:
        if self.by != "key" or self.share != "head":
            raise RequestError(
                f"Plan(index=Graph(), by={self.by!r}, share={self.share!r}): a graph finds keys, "
                "for each head its own; use by='key' and share='head', or Sketch() or Flat()"
            )
        if isinstance(self.query, DIPR) and self.query.recovery is not None:
            raise RequestError(
                "Plan(DIPR(recovery=...), Graph()): the share of the attention mass is an estimate "
                "over all keys, and a graph looks at few; use DIPR(beta=...), or Sketch() or Flat()"
            )

    @property
    def retrieves(self) -> bool:
        """Whether keys outside the window are looked for."""
        return isinstance(self.query, DIPR | TopK | Custom)

    def __str__(self) -> str:
        if not self.retrieves:
            return repr(self.query)
        words = [f"{self.query!r} through {self.index!r}"]
        if self.by == "page":
            words.append("by page")
        if self.share != "head":
            words.append(f"one selection a {self.share}")
        if self.tail:
            words.append("tail estimated")
        return ", ".join(words)


Plans = Plan | tuple[Plan, ...]
"""What every layer does, or one for each layer."""

Attention = Query | Plan | Auto | Sequence[Query | Plan]
"""What a user may ask for."""


def plan_for(
    attention: Any,
    config: LlamaConfig,
    length: int,
    choose: Callable[[Auto], Plans] | None = None,
    learnt: Callable[[], bool] | None = None,
) -> Plans:
    """The plans that answer what was asked.

    Args:
      attention: a query or plan, or a sequence with one a layer; or `Auto`.
      config: of the model.
      length: tokens there will be; decides where a plan leaves the index open.
      learnt: says whether there is a learnt basis for sketches; without one, a plan that names it
        gets the random one. Asked only where a plan leaves the sketch open or names a learnt one.
        None: what a plan names is taken as it is, and what it leaves open is random.
      choose: makes plans of an `Auto`: what it takes to know the machine (see `optimizer.choose`).

    Raises:
      RequestError: it is none, or does not fit the model's layers or heads.
      PlanError: what `Auto` asks cannot be had.
    """
    if isinstance(attention, Auto):
        if choose is None:
            raise RequestError("Auto(...) is resolved by a session; here, give a query or a Plan")
        return choose(attention)
    layers, heads = config.num_hidden_layers, config.num_attention_heads

    def one(asked: Any) -> Plan:
        if isinstance(asked, Query):
            asked = Plan(asked)
        if not isinstance(asked, Plan):
            raise RequestError(
                f"attention={asked!r}: {_QUERIES}, a Plan of one, or Auto(...) for all layers"
            )
        query = asked.query
        numbers = {DIPR: ("beta", "recovery", "error"), Tiles: ("beta", "recovery")}
        for number in numbers.get(type(query), ()):
            shape = np.shape(getattr(query, number))
            if shape and (shape != (heads,) or (isinstance(query, Tiles) and number == "recovery")):
                raise RequestError(
                    f"{type(query).__name__}({number} of shape {shape}): the model has {heads} "
                    "query heads; give one number, or for a range one a head"
                )
        if not asked.retrieves:
            return Plan(query, implementation=asked.implementation, tier=asked.tier)
        if asked.index is None:
            wants_sketch = asked.tail or length >= SKETCH_FROM
            wants_sketch = wants_sketch and not isinstance(query, Custom)
            found = default_sketch(config, learnt) if wants_sketch else Flat()
            return dataclasses.replace(asked, index=found)
        index = asked.index
        if isinstance(index, Sketch) and index.basis == "learnt" and learnt and not learnt():
            asked = dataclasses.replace(asked, index=index.random())
        return asked

    if isinstance(attention, Query | Plan):
        return one(attention)
    if not isinstance(attention, Sequence) or isinstance(attention, str | bytes):
        one(attention)  # says what it might be
    each = tuple(attention)
    if len(each) != layers:
        raise RequestError(f"attention: {len(each)} queries, and the model has {layers} layers")
    return tuple(map(one, each))


def default_sketch(config: LlamaConfig, learnt: Callable[[], bool] | None) -> Sketch:
    """The sketch of plans that name no index."""
    return LEARNT_SKETCH if LEARNT_SKETCH.fits(config) and learnt and learnt() else Sketch()


def of_layer(plans: Plans, layer: int) -> Plan:
    """The plan of one layer.

    Raises:
      RequestError: they are queries, or something else.
    """
    if not isinstance(plans, Plan | tuple):
        raise RequestError(f"{plans!r} is no plan: write Plan({plans!r}), or a tuple, one a layer")
    return plans[layer] if isinstance(plans, tuple) else plans


def indexes_of(plans: Plans, layers: int) -> tuple[Index, ...]:
    """The index that each layer asks; `Flat()` where none holds anything."""
    return tuple(of_layer(plans, i).index or Flat() for i in range(layers))


def tier_of(*asked: Plans) -> Tier | None:
    """Where plans that run together say that stored pages are read.

    Raises:
      RequestError: they name both.
    """
    each = [plan for plans in asked for plan in (plans if isinstance(plans, tuple) else (plans,))]
    named: set[Tier] = {plan.tier for plan in each if plan.tier is not None}
    if len(named) > 1:
        raise RequestError(
            "Plan(tier=...): some plans name 'device' and others 'host', and a session's pages lie "
            "in one place for all layers, for a prefill and what follows it; name one"
        )
    return named.pop() if named else None


def same_plans(one: Plans, other: Plans) -> bool:
    """Whether they are equal; a beta may be an array."""
    (ours, shape), (theirs, others) = jax.tree.flatten(one), jax.tree.flatten(other)
    return shape == others and all(map(np.array_equal, ours, theirs))


__all__ = [
    "LEARNT_SKETCH",
    "SKETCH_FROM",
    "Attention",
    "Plan",
    "Plans",
    "Tier",
    "default_sketch",
    "indexes_of",
    "of_layer",
    "plan_for",
    "same_plans",
    "tier_of",
]
