"""What attention may ask of the keys. A query is a small pytree: its class is structure, its
numbers are data, so another beta does not compile another program.

All but `Full` include the window (the first and the last tokens), counted once. A query may differ
by
layer: wherever one is taken, a tuple with one query a layer is taken too.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from alaya_jax.errors import RequestError
from alaya_jax.models.config import LlamaConfig


def _check(query: Any, field: str, low: float) -> None:
    value = getattr(query, field)
    # Tracers and other placeholders pass: jax rebuilds queries from their leaves.
    if isinstance(value, int | float) and not value >= low:
        raise RequestError(f"{type(query).__name__}({field}={value}): must be at least {low}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Full:
    """Every key: exact attention."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """The first `sink` and the last `recent` tokens, the query's own among them (StreamingLLM,
    arXiv 2309.17453; the sizes are AlayaDB's, Table 5). Data, not structure.
    """

    sink: int = 128
    recent: int = 512

    def __post_init__(self):
        _check(self, "sink", 0)
        _check(self, "recent", 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DIPR:
    """Dynamic inner-product range query (AlayaDB, arXiv 2504.10326, Definition 3): of the keys
    outside the window, those with `q.k >= max_s q.k_s - beta`, the maximum over all keys that q
    may see.

    The products are raw, not scaled by 1/sqrt(D): `beta = -sqrt(D) * ln(alpha)` keeps the keys
    whose attention weight is at least alpha times the largest.

    Attributes:
      beta: range, at least 0. A number, or an array [H] (one a query head).
      window: tokens that are always attended.
    """

    beta: float | jax.Array
    window: Window = Window()

    def __post_init__(self):
        _check(self, "beta", 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """Of the keys outside the window, the `k` of largest inner product, for each query head; of
    equal ones the earlier. `k` is structure: another k compiles another program.
    """

    k: int = dataclasses.field(metadata={"static": True})
    window: Window = Window()

    def __post_init__(self):
        _check(self, "k", 1)


Query = Full | Window | DIPR | TopK


def check_queries(query: Any, config: LlamaConfig) -> Any:
    """The query, or the tuple of one a layer, as it is given.

    Raises:
      RequestError: it is none, or does not fit the model's layers or heads.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    each = query if isinstance(query, tuple) else (query,) * layers
    if len(each) != layers:
        raise RequestError(f"attention: {len(each)} queries, and the model has {layers} layers")
    for one in each:
        if not isinstance(one, Query):
            raise RequestError(
                f"attention={one!r}: use Full(), Window(), DIPR(beta=...) or TopK(k)"
            )
        shape = np.shape(one.beta) if isinstance(one, DIPR) else ()
        if shape not in ((), (heads,)):
            raise RequestError(f"DIPR(beta of shape {shape}): the model has {heads} query heads")
    return query


def of_layer(query: Query | tuple[Query, ...], layer: int) -> Query:
    """The query of one layer, of a query for all or a tuple with one a layer."""
    return query[layer] if isinstance(query, tuple) else query
