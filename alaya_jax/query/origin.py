"""How keys and values were computed: by attention to every key, or by a plan that left some out.

What a plan leaves out changes the hidden states, and with them the keys and values of every layer
above and of every later token. So a sequence is exact up to a token, and no token behind that is.
"""

import dataclasses
import math
import textwrap
from typing import Any

import jax
import numpy as np

from alaya_jax.index import Graph
from alaya_jax.query import DIPR, Full, Tiles, Window
from alaya_jax.query.plan import Plan, Plans


@dataclasses.dataclass(frozen=True)
class Way:
    """How attention is answered, as far as the numbers depend on it.

    Attributes:
      name: of the plans; others have another.
      exact_until: tokens of a sequence up to which every key is attended to, whatever is asked.
    """

    name: str
    exact_until: float

    @classmethod
    def of(cls, plans: Plans) -> "Way":
        """What these plans do."""
        each = plans if isinstance(plans, tuple) else (plans,)
        names = list(dict.fromkeys(map(_name, each)))
        if len(names) > 1:
            names = [f"{i}: {_name(plan)}" for i, plan in enumerate(each)]
        return cls("; ".join(names), min(map(_exact_until, each)))


@dataclasses.dataclass(frozen=True)
class Origin:
    """Of one sequence's keys and values.

    Attributes:
      runs: (first token, plans) of each stretch of tokens, from the first one that is not exact
        on; none: all are.
    """

    runs: tuple[tuple[int, str], ...] = ()

    def exact(self, length: int) -> int:
        """How many of the first `length` tokens are exact."""
        return min(length, self.runs[0][0]) if self.runs else length

    def upto(self, length: int) -> "Origin":
        """The origin of the first `length` tokens."""
        return Origin(tuple(run for run in self.runs if run[0] < length))

    def alike(self, other: "Origin", length: int) -> int:
        """How many of the first `length` tokens were computed the same way in both."""
        starts = {at for at, _ in (*self.runs, *other.runs) if at < length}
        ends = sorted({0, length, *starts}, reverse=True)
        return next(end for end in ends if self.upto(end) == other.upto(end))

    def then(self, start: int, end: int, way: Way) -> "Origin":
        """The same, with the tokens from `start` to `end` added behind it."""
        if not self.runs:
            if end <= way.exact_until:
                return self
            start = max(start, int(way.exact_until))
        elif self.runs[-1][1] == way.name or end <= start:
            return self
        return Origin((*self.runs, (start, way.name)))

    def at_rest(self, store_dtype: str) -> "Origin":
        """The same, read back from where it was stored in 8 bits: none of it is exact any more."""
        rest = (0, f"storage in {store_dtype}")
        return self if rest in self.runs else Origin((rest, *self.runs))

    def __str__(self) -> str:
        if not self.runs:
            return "exact"
        runs = (f"from token {at:,} on by {textwrap.shorten(name, 100)}" for at, name in self.runs)
        exact = f"exact up to token {self.runs[0][0]:,}" if self.runs[0][0] else "not exact"
        return f"{exact}, {', '.join(runs)}"


def _name(plan: Plan) -> str:
    leaves, tree = jax.tree.flatten(plan)
    numbers = [x if isinstance(x, int | float) else np.asarray(x) for x in leaves]
    plain = [x.item() if isinstance(x, np.ndarray) and x.ndim == 0 else x for x in numbers]
    # A range with a number for each head is shown by its least and largest.
    arrays = [x.tolist() for x in plain if isinstance(x, np.ndarray)]
    return str(jax.tree.unflatten(tree, plain)) + "".join(f" {numbers}" for numbers in arrays)


def _exact_until(plan: Plan) -> float:
    query = plan.query
    if isinstance(query, Full):
        return math.inf
    if isinstance(query, Tiles):  # obeys both rules
        unbounded = _least(query.beta) == math.inf and _least(query.recovery, 1.0) >= 1
    elif isinstance(query, DIPR) and not isinstance(plan.index, Graph):  # has one of three
        unbounded = _least(query.beta, 0.0) == math.inf or _least(query.recovery, 0.0) >= 1
        unbounded |= query.error is not None and not np.any(np.asarray(query.error))
        unbounded = unbounded and query.before is None
    else:
        unbounded = False
    if unbounded:
        return math.inf
    window = query if isinstance(query, Window) else query.window
    return int(_least(window.sink)) + int(_least(window.recent))


def _least(number: Any, otherwise: float = 0.0) -> float:
    """Of one number, or of one a head."""
    return otherwise if number is None else float(np.min(np.asarray(number)))
