"""What plans read, phase by phase and layer by layer: accounts for `Explanation`."""

import dataclasses
from typing import Any

import numpy as np

from alaya_jax.attention.counts import Counts
from alaya_jax.cache.pool import PagePool
from alaya_jax.cache.residency import PagesMet
from alaya_jax.explain.implementation import implementation_of
from alaya_jax.index import Flat, Graph
from alaya_jax.model import Model
from alaya_jax.optimizer.choice import PlanChoice
from alaya_jax.pallas_kernels.dispatch import Choice as Implementation
from alaya_jax.query.plan import Plan, Plans, of_layer, same_plans


class Reads:
    """What one kind of plan read in one phase, by layer and query head.

    Attributes:
      plans: how attention was answered.
      queries: query tokens so far, over the batch.
      visible: keys that those could see, summed over them; the same for each layer and head.
      attended, scored, read: int64 [L, H], summed over them; see `Counts`.
      mass: float64 [L, H], sum of estimated shares of the mass; NaN where there are none.
      error: float64 [L, H], sum of estimated errors of the output; NaN where there are none.
      widened: int64 [L, H], query tokens whose search overflowed; all keys were scanned for them.
      met: pages, where some are mapped.
    """

    def __init__(self, plans: Plans, model: Model | PagePool, page_size: int, tokens: int = 1):
        """Starts at nothing; `tokens`: new tokens of each sequence in one program call."""
        c = model.config
        self._tokens = tokens
        self.plans = plans
        self.queries = 0
        self.visible = 0
        self.attended, self.scored, self.read, self.widened = (
            np.zeros((c.num_hidden_layers, c.num_attention_heads), np.int64) for _ in range(4)
        )
        self.mass, self.error = np.zeros(self.read.shape), np.zeros(self.read.shape)
        self.met = PagesMet.nothing(c.num_hidden_layers)
        self._model, self._page_size = model, page_size
        self._pending: list[Counts] = []

    def add(self, counts: Counts, visible: int, queries: int) -> None:
        """Adds [L, B, H] sums of one program call; does not wait for it."""
        self._pending.append(dataclasses.replace(counts, met=None))
        self.visible += visible
        self.queries += queries
        if len(self._pending) > 64:
            self._settle()

    def _settle(self) -> None:
        for counts in self._pending:
            attended, scored, read, mass, error = (
                np.asarray(x).sum(1)
                for x in (counts.attended, counts.scored, counts.read, counts.mass, counts.error)
            )
            self.attended += attended
            self.scored += scored
            self.read += read
            self.mass += mass
            self.error += error
            self.widened += np.asarray(counts.widened).sum(1)
        self._pending = []

    def is_of(self, plans: Plans) -> bool:
        """Whether this is the account of equal plans; a beta may be an array."""
        return same_plans(self.plans, plans)

    def layer(self, layer: int) -> dict[str, Any]:
        """What one layer read, per query token; lists have one number a query head."""
        self._settle()
        n, c = max(self.queries, 1), self._model.config
        plan = of_layer(self.plans, layer)
        group = c.num_attention_heads // c.num_key_value_heads
        mass, error = self.mass[layer] / n, self.error[layer] / n
        # Each head of a group has the count of the kv head.
        read = float(self.read[layer].sum() / group / n)
        return {
            "layer": layer,
            **plan_fields(plan),
            **self._placed(layer),
            "keys_scanned": (self.scored[layer] / n).tolist(),
            "keys_attended": (self.attended[layer] / n).tolist(),
            "keys_read": read,
            "keys_read_by_group": (self.read[layer].reshape(-1, group)[:, 0] / n).tolist(),
            "mass_estimated": known(mass),
            "error_estimated": known(error),
            "widened": self.widened[layer].tolist(),
            "bytes": self._bytes(plan, layer, read),
            "pages": self._pages(layer),
        }

    def _placed(self, layer: int) -> dict[str, Any]:
        plan = of_layer(self.plans, layer)
        runs = implementation_of(plan, self._model, self._page_size, self._tokens)
        return _placed(runs, self.tier)

    @property
    def tier(self) -> str:
        """Where stored pages were: "host", where any were in mapped files, else "device"."""
        return "host" if (self.met.memory + self.met.disk).any() else "device"

    def _pages(self, layer: int | slice = slice(None)) -> dict[str, Any] | None:
        """Pages of a kv head that were met, in a layer or in all, each time they were: of the pool,
        of mapped files in memory, and those that were not; None where none are mapped.
        """
        if self.tier == "device":
            return None
        met = dataclasses.asdict(self.met)
        counts = {name: int(np.sum(numbers[layer])) for name, numbers in met.items()}
        pool, memory, disk = counts["pool"], counts["memory"], counts["disk"]
        return {"met": pool + memory + disk, **counts, "hit_rate": PagesMet.hit_rate(memory, disk)}

    def mean(self, what: str) -> np.ndarray:
        """float64 [L, H], "attended", "mass_estimated" or "error_estimated" a query token."""
        self._settle()
        totals = {"mass_estimated": self.mass, "error_estimated": self.error}
        return totals.get(what, self.attended) / max(self.queries, 1)

    def _bytes(self, plan: Plan, layer: int, read: float) -> float:
        """Bytes of keys, values and index that a query token reads, from the counts; of keys and
        values as they are computed with, also where they lie in 8 bits.
        """
        n, c = max(self.queries, 1), self._model.config
        key = c.head_dim * np.dtype(self._model.dtype).itemsize
        heads = c.num_key_value_heads
        seen = self.visible / n
        if not plan.retrieves:
            return 2 * key * heads * float(self.attended[layer].mean() / n)
        window = min(_window_size(plan), seen)
        if isinstance(plan.index, Graph):
            # At most: K of what was met, each with its row of the graph; K and V of what is kept.
            kept = float(self.attended[layer].mean() / n)
            return read * (key + 4 * plan.index.degree) + 2 * key * heads * kept
        if plan.index is None or isinstance(plan.index, Flat):
            index = key * heads * (seen - window)
        else:
            page = plan.index.page_bytes(c, self._page_size, self._model.dtype)
            index = (seen - window) * page / self._page_size
        return index + 2 * key * (read + heads * window)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; per-step figures are means over query tokens (and layers and heads)."""
        self._settle()
        n = max(self.queries, 1)
        by_layer = self.attended.mean(1) / n
        layers = range(len(by_layer))
        rows = [self.layer(i) for i in layers]
        indexes = [row["index"] for row in rows if row["index"]]
        masses = [row["mass_estimated"] for row in rows if row["mass_estimated"]]
        errors = [row["error_estimated"] for row in rows if row["error_estimated"]]
        return {
            "query": _describe(self.plans),
            "index": ", ".join(dict.fromkeys(indexes)) or None,
            "implementation": ", ".join(dict.fromkeys(row["implementation"] for row in rows)),
            "tier": self.tier,
            "steps": self.queries,
            "keys_visible_per_step": self.visible / n,
            "keys_scanned_per_step": float(self.scored.mean() / n),
            "keys_read_per_step": float(np.mean([row["keys_read"] for row in rows])),
            "keys_attended_per_step": float(by_layer.mean()),
            "bytes_per_step": float(sum(row["bytes"] for row in rows)),
            "mass_estimated": float(np.mean(masses)) if masses else None,
            "error_estimated": float(np.mean(errors)) if errors else None,
            "searches_widened": int(self.widened.sum()),
            "pages": self._pages(),
            "layers": by_layer.tolist(),
            "by_layer": rows,
        }


def planned_rows(
    plans: Plans,
    model: Model | PagePool,
    page_size: int,
    choice: PlanChoice | None,
    tier: str = "device",
) -> list[dict[str, Any]]:
    """What would run, one row a layer; with predictions where `Auto` chose. `tier`: where stored
    pages are read.
    """
    rows = []
    for layer in range(model.config.num_hidden_layers):
        plan = of_layer(plans, layer)
        runs = implementation_of(plan, model, page_size)
        row = {"layer": layer, **plan_fields(plan), **_placed(runs, tier)}
        if choice is not None:
            row |= choice.layers[layer].to_dict()
        rows.append(row)
    return rows


def plan_fields(plan: Plan) -> dict[str, Any]:
    """A plan as columns of a table, and for JSON."""
    beta = getattr(plan.query, "beta", None)
    return {
        "query": repr(plan.query),
        "index": _index_name(plan),
        "by": plan.by if plan.retrieves else None,
        "share": plan.share if plan.retrieves else None,
        "beta": None if beta is None else np.asarray(beta, np.float64).tolist(),
    }


def _placed(runs: Implementation, tier: str) -> dict[str, Any]:
    """Where it runs and by what; `passed_over`: what is faster, and why it cannot."""
    return {
        "tier": tier,
        "implementation": runs.implementation,
        "passed_over": dict(runs.passed_over),
        "platform": runs.target.platform,
    }


def known(numbers: np.ndarray) -> list[float] | None:
    """For JSON; None where a number is not known."""
    return None if np.isnan(numbers).any() else numbers.tolist()


def _index_name(plan: Plan) -> str | None:
    return repr(plan.index or Flat()) if plan.retrieves else None


def _window_size(plan: Plan) -> float:
    window = getattr(plan.query, "window", None)
    return float(window.sink) + float(window.recent) if window else 0.0


def _describe(plans: Plans) -> str:
    each = plans if isinstance(plans, tuple) else (plans,)
    words = list(dict.fromkeys(repr(plan.query) for plan in each))
    return words[0] if len(words) == 1 else "by layer: " + ", ".join(words)
