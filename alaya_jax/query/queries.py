"""What attention may ask of the keys. A query is a small pytree: its class is structure, its
numbers are data, so another beta does not compile another program.

All but `Full` include the window (the first and the last tokens), counted once. How a query is
answered is a plan (`plan.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from alaya_jax.errors import RequestError
from alaya_jax.query.functions import function_name, optional_arguments


def _is_number(value: Any) -> bool:
    """Tracers and other placeholders are none: jax rebuilds queries from their leaves."""
    return isinstance(value, int | float)


def _words(value: Any) -> str:
    """In a repr: of an array, one number a head, its range."""
    arrays = isinstance(value, np.ndarray | jax.Array) and not isinstance(value, Tracer)
    if not arrays or value.ndim == 0:
        return repr(value)
    return f"[{np.min(value):.4g} to {np.max(value):.4g}]"


def _refuse_text(query: Any, field: str, words: str) -> None:
    """Text is never a number, nor what jax puts in its place."""
    value = getattr(query, field)
    if isinstance(value, str | bytes):
        raise RequestError(f"{type(query).__name__}({field}={value!r}): must be {words}, not text")


def _check(query: Any, field: str, low: float, *, whole: bool = False) -> None:
    kind = "a whole number" if whole else "a number"
    _refuse_text(query, field, kind)
    value = getattr(query, field)
    if _is_number(value) and not (value >= low and not (whole and value != value // 1)):
        raise RequestError(
            f"{type(query).__name__}({field}={value}): must be {kind}, at least {low}"
        )


def _check_static(query: Any, field: str, low: int) -> None:
    """Of what is structure: jax puts nothing in its place."""
    value = getattr(query, field)
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
        raise RequestError(
            f"{type(query).__name__}({field}={value!r}): must be a whole number, at least {low}"
        )


def _check_window(query: Any) -> None:
    if isinstance(query.window, str | bytes | int | float):
        raise RequestError(
            f"{type(query).__name__}(window={query.window!r}): must be a Window(sink, recent)"
        )


def _check_error(query: Any) -> None:
    _refuse_text(query, "error", "a number")
    if _is_number(query.error) and not 0 <= query.error < 1:
        raise RequestError(
            f"DIPR(error={query.error}): |out - full| / |full|, at least 0 and below 1"
        )


def _check_share(query: Any, field: str) -> None:
    _refuse_text(query, field, "a number")
    value = getattr(query, field)
    if _is_number(value) and not 0 < value <= 1:
        raise RequestError(
            f"{type(query).__name__}({field}={value}): a share of the attention mass, above 0 and "
            "at most 1"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Full:
    """Every key: exact attention."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """The first `sink` and the last `recent` tokens, the query's own among them (StreamingLLM,
    arXiv 2309.17453; the sizes are AlayaDB's, Table 5). Both are data: changing them compiles
    nothing.
    """

    sink: int = 128
    recent: int = 512

    def __post_init__(self):
        _check(self, "sink", 0, whole=True)
        _check(self, "recent", 1, whole=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DIPR:
    """Dynamic inner-product range query (AlayaDB, arXiv 2504.10326, Definition 3): of the keys
    outside the window, those with `q.k >= max_s q.k_s - beta`. The maximum is over all keys that q
    may see, the window's among them, except those that `before` rules out.

    The products are raw, not scaled by 1/sqrt(D): `beta = -sqrt(D) * ln(alpha)` keeps the keys
    whose attention weight is at least alpha times the largest.

    Give one of three: `DIPR(beta=50.0)`; or `DIPR(recovery=0.95)`, which takes, for each query and
    head, the smallest beta whose keys hold that share of the attention mass, by the estimated
    scores of the scan (see `index.recover`); or `DIPR(error=0.02)`, which takes the smallest beta
    whose output is estimated to err by at most that, |out - full| / |full|, with the keys that it
    leaves out answered by their pages' mean values (`Plan(tail=True)`, which it implies; see
    `index.output_error` for the estimate and what it is worth).

    Attributes:
      beta: range, at least 0. A number, or an array [H] (one a query head).
      window: tokens that are always attended.
      recovery: share of the attention mass to keep, above 0 and at most 1; a number or [H].
      before: of the keys outside the window, only those at positions below this are eligible: the
        others are not retrieved, and count neither for the maximum nor for the mass; None: all.
      error: of the output, relative to its length, at least 0 (which keeps every key) and below 1;
        a number or [H]. Needs `Sketch`, by key.
    """

    beta: float | jax.Array | None = None
    window: Window = Window()
    recovery: float | jax.Array | None = None
    before: int | jax.Array | None = None
    error: float | jax.Array | None = None

    def __post_init__(self):
        given = [x for x in ("beta", "recovery", "error") if getattr(self, x) is not None]
        if not given:
            raise RequestError("DIPR(): give beta=..., recovery=... or error=...")
        if len(given) > 1 and any(_is_number(getattr(self, x)) for x in given):
            names = ", ".join(f"{x}=..." for x in given)
            raise RequestError(f"DIPR({names}): give one of them")
        _check(self, "beta", 0.0)
        _check_share(self, "recovery")
        _check_error(self)
        _check(self, "before", 0, whole=True)
        _check_window(self)

    def __repr__(self) -> str:
        fields = (f.name for f in dataclasses.fields(self))
        return f"DIPR({', '.join(f'{name}={_words(getattr(self, name))}' for name in fields)})"


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
        _check_static(self, "k", 1)
        _check(self, "before", 0, whole=True)
        _check_window(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Custom:
    """Of the keys outside the window, those that a function of yours keeps.

        def near_the_best(scores, positions):
            return scores >= jnp.max(scores, axis=-1, keepdims=True) - 20.0

        aj.generate(session, rest, attention=aj.Custom(near_the_best))

    The function is traced, so it is written in `jax.numpy`. It is called with

    - scores: float32 [K, G, T, S], raw products q.k with every key outside the window, exact; -inf
      for keys that the query token does not see, or sees in the window;
    - positions: int32 [S], where these keys stand in the sequence, ascending;

    and gives a bool mask of the shape of `scores`. Keys of score -inf are never kept, whatever it
    says. T is one token or a part of a chunk, as it comes: a token's mask must not depend on the
    others'. Where it has parameters of these names, it gets, too,

    - window_best: float32 [K, G, T], the best raw score in the window, -inf if that is empty;
    - window_lse: float32 [K, G, T], log of the sum of exp(score / sqrt(D)) there.

    Every key is scored, so it costs what `Plan(TopK(k), Flat())` does. On a mesh each device calls
    it with the scores of all heads; a context axis is refused. The function is structure: another
    one, also an equal lambda written anew, compiles another program.

    Attributes:
      select: the function.
      window: tokens that are always attended.
      before: only keys at positions below this are offered; None: all.
      name: says which function it is, in reports and beside stored contexts; None: its name and a
        digest of its code and of what that refers to.
    """

    select: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    window: Window = Window()
    before: int | jax.Array | None = None
    name: str | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self):
        if not callable(self.select):
            raise RequestError(
                f"Custom({self.select!r}): give a function of scores and positions that returns a "
                "mask"
            )
        optional_arguments(self.select)
        if not isinstance(self.name, str | None):
            raise RequestError(f"Custom(name={self.name!r}): must be text")
        _check(self, "before", 0, whole=True)
        _check_window(self)

    def __repr__(self) -> str:
        name = self.name or function_name(self.select)
        return f"Custom({name}, window={self.window!r}, before={_words(self.before)})"


NEAR = Window(sink=16, recent=256)
"""The window of a block of queries. On real keys, that much of the recent ones improves the worst
queries more than as many blocks chosen elsewhere would; a longer sink does not
(benchmarks/sparse_prefill.py)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block-sparse attention of many queries: two rules, alone or together.

    `beta` skips what is not worth its softmax. Keys are scored tile by tile; a tile in which every
    query's best score is below that query's best so far minus beta is left there: no softmax, no V
    (BSFA, arXiv 2512.07011, with DIPR's range in place of a calibrated threshold). This is exact:
    of the keys that are scored, none within beta of its query's best is ever lost. With an infinite
    beta no tile is skipped.

    `recovery` chooses the blocks that are scored at all, from the attention of a few queries of the
    block (`samples`, spread evenly): in order of the share of mass that these give them, as many as
    it takes for each of these to hold `recovery` of its mass. That is an estimate for the others:
    on keys of SmolLM2-135M 93% to 97% of all queries hold it (benchmarks/sparse_prefill.py). 1
    leaves nothing out, and only sets the order; with None there is no estimate, and keys come in
    order of position.

    The window's keys are always attended, but by blocks: those of the sink and those within
    `recent` of a query of the block.

    Attributes:
      beta: range in raw products, at least 0; a number, or an array [H].
      recovery: in (0, 1], or None.
      window: the first and last keys; `recent` counts back from the first query of a block.
      q_block: queries that share one list of key blocks. Static.
      kv_block: keys chosen together, a multiple of the page size; None: a page. Static.
      samples: queries of a block that are asked. Static.
    """

    beta: float | jax.Array = float("inf")
    recovery: float | jax.Array | None = None
    window: Window = NEAR
    q_block: int = dataclasses.field(default=128, metadata={"static": True})
    kv_block: int | None = dataclasses.field(default=None, metadata={"static": True})
    samples: int = dataclasses.field(default=8, metadata={"static": True})

    def __post_init__(self):
        _check(self, "beta", 0.0)
        _check_share(self, "recovery")
        _check_window(self)
        for name in ("q_block", "kv_block", "samples"):
            if name != "kv_block" or self.kv_block is not None:
                _check_static(self, name, 1)


Query = Full | Window | DIPR | TopK | Tiles | Custom
