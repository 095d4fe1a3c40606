"""What attention may ask of the keys. A query is a small pytree: its class is structure, its
numbers are data, so another beta does not compile another program.

All but `Full` include the window (the first and the last tokens), counted once. How a query is
answered is a plan (`plan.py`).
"""

import dataclasses
from typing import Any

import jax

from alaya_jax.errors import RequestError


def _is_number(value: Any) -> bool:
    """Tracers and other placeholders are none: jax rebuilds queries from their leaves."""
    return isinstance(value, int | float)


def _check(query: Any, field: str, low: float, high: float = float("inf")) -> None:
    value = getattr(query, field)
    if _is_number(value) and not low <= value <= high:
        limits = f"from {low} to {high}" if high < float("inf") else f"at least {low}"
        raise RequestError(f"{type(query).__name__}({field}={value}): must be {limits}")


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

    Give one of the two: `DIPR(beta=50.0)`, or `DIPR(recovery=0.95)`, which takes, for each query
    and head, the smallest beta whose keys hold that share of the attention mass, by the estimated
    scores of the scan (see `index.recover`).

    Attributes:
      beta: range, at least 0. A number, or an array [H] (one a query head).
      window: tokens that are always attended.
      recovery: share of the attention mass to keep, above 0 and at most 1; a number or [H].
      before: only keys at positions below this are retrieved; None: all.
    """

    beta: float | jax.Array | None = None
    window: Window = Window()
    recovery: float | jax.Array | None = None
    before: int | jax.Array | None = None

    def __post_init__(self):
        if self.beta is None and self.recovery is None:
            raise RequestError("DIPR(): give beta=..., or recovery=...")
        if _is_number(self.beta) and self.recovery is not None:
            raise RequestError("DIPR(beta=..., recovery=...): give one of the two")
        _check(self, "beta", 0.0)
        _check(self, "recovery", 0.0, 1.0)
        _check(self, "before", 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """Of the keys outside the window, the `k` of largest inner product, for each query head; of
    equal ones the earlier. `k` is structure: another k compiles another program.

    Attributes:
      k: how many, at least 1.
      window: tokens that are always attended.
      before: only keys at positions below this are retrieved; None: all.
    """

    k: int = dataclasses.field(metadata={"static": True})
    window: Window = Window()
    before: int | jax.Array | None = None

    def __post_init__(self):
        _check(self, "k", 1)
        _check(self, "before", 0)


Query = Full | Window | DIPR | TopK
