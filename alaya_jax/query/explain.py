"""What was asked of the keys and what was really read: the account behind `Session.explain`."""

import dataclasses
from typing import Any

import jax
import numpy as np

from alaya_jax.attention.engine import Counts
from alaya_jax.index import Flat, Graph
from alaya_jax.model import Model
from alaya_jax.query.plan import Plan, Plans, of_layer


class Reads:
    """What one kind of plan read in one phase, by layer and query head.

    Attributes:
      plans: how attention was answered.
      queries: query tokens so far, over the batch.
      visible: keys that those could see, summed over them; the same for each layer and head.
      attended, scored, read: int64 [L, H], summed over them; see `engine.Counts`.
      mass: float64 [L, H], sum of estimated shares of the mass; NaN where there are none.
      widened: int64 [L, H], query tokens whose search overflowed; all keys were scanned for them.
    """

    def __init__(self, plans: Plans, model: Model, page_size: int):
        """Starts at nothing."""
        c = model.config
        self.plans = plans
        self.queries = 0
        self.visible = 0
        self.attended, self.scored, self.read, self.widened = (
            np.zeros((c.num_hidden_layers, c.num_attention_heads), np.int64) for _ in range(4)
        )
        self.mass = np.zeros(self.read.shape)
        self._model, self._page_size = model, page_size
        self._pending: list[Counts] = []

    def add(self, counts: Counts, visible: int, queries: int) -> None:
        """Adds [L, B, H] sums of one program call; does not wait for it."""
        self._pending.append(counts)
        self.visible += visible
        self.queries += queries
        if len(self._pending) > 64:
            self._settle()

    def _settle(self) -> None:
        for counts in self._pending:
            attended, scored, read, mass = (
                np.asarray(x).sum(1)
                for x in (counts.attended, counts.scored, counts.read, counts.mass)
            )
            self.attended += attended
            self.scored += scored
            self.read += read
            self.mass += mass
            self.widened += np.asarray(counts.widened).sum(1)
        self._pending = []

    def is_of(self, plans: Plans) -> bool:
        """Whether this is the account of equal plans; a beta may be an array."""
        (ours, shape), (theirs, other) = jax.tree.flatten(self.plans), jax.tree.flatten(plans)
        return shape == other and all(map(np.array_equal, ours, theirs))

    def layer(self, layer: int) -> dict[str, Any]:
        """What one layer read, per query token; lists have one number a query head."""
        self._settle()
        n, c = max(self.queries, 1), self._model.config
        plan = of_layer(self.plans, layer)
        group = c.num_attention_heads // c.num_key_value_heads
        mass = self.mass[layer] / n
        # Each head of a group has the count of the kv head.
        read = float(self.read[layer].sum() / group / n)
        return {
            "layer": layer,
            "query": repr(plan.query),
            "index": _index_name(plan),
            "by": plan.by if plan.retrieves else None,
            "share": plan.share if plan.retrieves else None,
            "keys_scanned": (self.scored[layer] / n).tolist(),
            "keys_attended": (self.attended[layer] / n).tolist(),
            "keys_read": read,
            "mass_estimated": None if np.isnan(mass).any() else mass.tolist(),
            "widened": self.widened[layer].tolist(),
            "bytes": self._bytes(plan, layer, read),
        }

    def _bytes(self, plan: Plan, layer: int, read: float) -> float:
        """Bytes of keys, values and index that a query token reads, from the counts."""
        n, c = max(self.queries, 1), self._model.config
        key = c.head_dim * self._model.dtype.itemsize
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
        return {
            "query": _describe(self.plans),
            "index": ", ".join(dict.fromkeys(indexes)) or None,
            "implementation": "xla",
            "tier": "device",
            "steps": self.queries,
            "keys_visible_per_step": self.visible / n,
            "keys_scanned_per_step": float(self.scored.mean() / n),
            "keys_read_per_step": float(np.mean([row["keys_read"] for row in rows])),
            "keys_attended_per_step": float(by_layer.mean()),
            "bytes_per_step": float(sum(row["bytes"] for row in rows)),
            "mass_estimated": float(np.mean(masses)) if masses else None,
            "searches_widened": int(self.widened.sum()),
            "layers": by_layer.tolist(),
            "by_layer": rows,
        }


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What a session did. `str()` is a table, `to_dict()` plain data.

    Attributes:
      tokens, reused: of each sequence, in the cache and from a stored context.
      contexts: ids of those contexts, or None.
      phases: "prefill", "decode" (and "attention" for a model of your own) -> `Reads`.
    """

    tokens: list[int]
    reused: list[int]
    contexts: list[str | None]
    phases: dict[str, Reads]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens": self.tokens,
            "reused": self.reused,
            "contexts": self.contexts,
            "phases": {name: reads.to_dict() for name, reads in self.phases.items()},
        }

    def __str__(self) -> str:
        lines = [f"tokens {self.tokens}, of which from stored contexts {self.reused}"]
        for name, reads in self.phases.items():
            d = reads.to_dict()
            index = f"index {d['index']}" if d["index"] else "no index"
            share = d["keys_attended_per_step"] / max(d["keys_visible_per_step"], 1)
            lines.append(
                f"{name}: {d['query']}, {index}, {d['implementation']}, pages on {d['tier']}, "
                f"{d['steps']} query tokens"
            )
            lines.append(
                f"  keys a query token and head: {d['keys_visible_per_step']:,.1f} visible, "
                f"{d['keys_scanned_per_step']:,.1f} scored, {d['keys_attended_per_step']:,.1f} "
                f"attended ({share:.1%})"
            )
            if d["mass_estimated"] is not None and d["index"]:
                lines.append(f"  attention mass kept, by estimate: {d['mass_estimated']:.3f}")
            if d["searches_widened"]:
                lines.append(
                    f"  {d['searches_widened']:,} searches (of a token, head and layer) met more "
                    "than they could list: all keys were scanned; raise Graph(capacity=...)"
                )
            low, high = int(np.argmin(d["layers"])), int(np.argmax(d["layers"]))
            if d["layers"][low] != d["layers"][high]:
                lines.append(
                    f"  fewest in layer {low} ({d['layers'][low]:,.1f}), "
                    f"most in layer {high} ({d['layers'][high]:,.1f})"
                )
        return "\n".join(lines)

    __repr__ = __str__


def _index_name(plan: Plan) -> str | None:
    return repr(plan.index or Flat()) if plan.retrieves else None


def _window_size(plan: Plan) -> float:
    window = getattr(plan.query, "window", None)
    return float(window.sink) + float(window.recent) if window else 0.0


def _describe(plans: Plans) -> str:
    each = plans if isinstance(plans, tuple) else (plans,)
    words = list(dict.fromkeys(repr(plan.query) for plan in each))
    return words[0] if len(words) == 1 else "by layer: " + ", ".join(words)
