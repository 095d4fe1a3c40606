"""What was asked of the keys and what was really read: the account behind `Session.explain`."""

import dataclasses
from typing import Any

import jax
import numpy as np

from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import DIPR, TopK


class Reads:
    """Keys attended to by one kind of query in one phase, by layer and query head.

    Attributes:
      query: what was asked.
      queries: query tokens so far, over the batch.
      visible: keys that those could see, summed over them; the same for each layer and head.
      attended: int64 [L, H], keys attended to, summed over them.
    """

    def __init__(self, query: Any, config: LlamaConfig):
        """Starts at nothing."""
        self.query = query
        self.queries = 0
        self.visible = 0
        self.attended = np.zeros((config.num_hidden_layers, config.num_attention_heads), np.int64)

    def add(self, attended: np.ndarray, visible: int, queries: int) -> None:
        """Adds int [L, B, H] sums of one program call."""
        self.attended += attended.astype(np.int64).sum(1)
        self.visible += visible
        self.queries += queries

    def is_of(self, query: Any) -> bool:
        """Whether this is the account of an equal query; a beta may be an array."""
        (ours, shape), (theirs, other) = jax.tree.flatten(self.query), jax.tree.flatten(query)
        return shape == other and all(map(np.array_equal, ours, theirs))

    @property
    def index(self) -> str | None:
        """The index that scored the keys; None where none is asked."""
        queries = self.query if isinstance(self.query, tuple) else (self.query,)
        return "flat" if any(isinstance(q, DIPR | TopK) for q in queries) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; per-step figures are means over query tokens (and layers and heads)."""
        n = max(self.queries, 1)
        seen, by_layer = self.visible / n, self.attended.mean(1) / n
        return {
            "query": _describe(self.query),
            "index": self.index,
            "implementation": "xla",
            "tier": "device",
            "steps": self.queries,
            "keys_visible_per_step": seen,
            # The flat index scores every key that is not in the window, and the window is scored
            # too.
            "keys_scanned_per_step": seen if self.index else float(by_layer.mean()),
            "keys_attended_per_step": float(by_layer.mean()),
            "layers": by_layer.tolist(),
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
            low, high = int(np.argmin(d["layers"])), int(np.argmax(d["layers"]))
            if d["layers"][low] != d["layers"][high]:
                lines.append(
                    f"  fewest in layer {low} ({d['layers'][low]:,.1f}), "
                    f"most in layer {high} ({d['layers'][high]:,.1f})"
                )
        return "\n".join(lines)

    __repr__ = __str__


def _describe(query: Any) -> str:
    if isinstance(query, tuple):
        return "by layer: " + ", ".join(dict.fromkeys(_describe(q) for q in query))
    return repr(query)
