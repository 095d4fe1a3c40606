"""What `Auto` chose, why, and what that is predicted to cost."""

import dataclasses
from typing import Any

import numpy as np

from alaya_jax import show, units
from alaya_jax.index import Graph
from alaya_jax.optimizer.cost import Cost, KeysKept, Machine, Workload, step_seconds
from alaya_jax.optimizer.key_bytes import KeyBytes
from alaya_jax.query import DIPR
from alaya_jax.query.auto import Auto
from alaya_jax.query.plan import Plan, Plans, same_plans

_BUSY = 0.25  # of the CPUs


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """What one layer does, and why.

    Attributes:
      plan: the one chosen.
      cost: predicted.
      kept: keys outside the window that a retrieving plan would keep.
      others: seconds of the plans that were not chosen, by name.
      reason: in words.
    """

    plan: Plan
    cost: Cost
    kept: KeysKept
    others: dict[str, float]
    reason: str

    @property
    def seconds(self) -> float:
        """Predicted time of the layer's attention in a decode step."""
        return self.cost.seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "predicted_seconds": self.cost.seconds,
            "predicted_bytes": self.cost.read,
            "predicted_keys_attended": self.kept.attended if self.plan.retrieves else None,
            "index_bytes": self.cost.memory,
            "others": self.others,
            "reason": self.reason,
        }


@dataclasses.dataclass(frozen=True)
class PlanChoice:
    """What `Auto` chose, for one workload.

    Attributes:
      auto: what was asked.
      work: for what.
      machine: where.
      layers: one a layer.
      basis: where the numbers of keys come from.
      full_below: length below which every layer reads all keys; None: at all lengths that the
        model takes.
      graph: what a graph of the context does here, or would do, and what it does not promise;
        empty where there is nothing to say.
    """

    auto: Auto
    work: Workload
    machine: Machine
    layers: tuple[LayerChoice, ...]
    basis: str
    full_below: int | None
    graph: str = ""

    @property
    def plans(self) -> Plans:
        """One for all layers where they are the same."""
        plans = tuple(layer.plan for layer in self.layers)
        return plans[0] if all(same_plans(plan, plans[0]) for plan in plans) else plans

    @property
    def attention_seconds(self) -> float:
        """Of a decode step, all layers."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def seconds(self) -> float:
        """Of a decode step, weights included."""
        return self.attention_seconds + step_seconds(self.work, self.machine)

    @property
    def memory(self) -> int:
        """Bytes of keys, values and indexes."""
        return self.work.kv_bytes + sum(layer.cost.memory for layer in self.layers)

    @property
    def bytes_a_key(self) -> KeyBytes:
        """Of keys, values and the indexes that were chosen."""
        work = self.work
        return KeyBytes.of(self.plans, work.config, work.page_size, work.dtype)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        auto = dataclasses.asdict(self.auto)
        return {
            "asked": auto,
            "length": self.work.length,
            "batch": self.work.batch,
            "seconds": self.seconds,
            "attention_seconds": self.attention_seconds,
            "bytes": {
                "weights": self.work.weight_bytes + self.work.idle_bytes,
                "kv": self.work.kv_bytes,
                "indexes": self.memory - self.work.kv_bytes,
                "read_by_attention": sum(layer.cost.read for layer in self.layers),
            },
            "bytes_a_key": self.bytes_a_key.to_dict(),
            "full_below": self.full_below,
            "basis": self.basis,
            "graph": self.graph,
            "machine": self.machine.to_dict(),
            "layers": [
                {"layer": i, "plan": str(layer.plan), **layer.to_dict()}
                for i, layer in enumerate(self.layers)
            ],
        }

    def table(self) -> show.Table:
        """For people."""
        rows = [
            (
                describe(layer.plan),
                units.count(layer.kept.attended) if layer.plan.retrieves else "all",
                units.nbytes(layer.cost.read),
                units.nbytes(layer.cost.memory),
                units.seconds(layer.seconds),
                layer.reason,
            )
            for layer in self.layers
        ]
        rows = show.alike(rows)
        columns = ("layer", "<plan", "keys a head", "read", "index", "time", "<why")
        below = (
            "all layers read every key at all lengths"
            if self.full_below is None
            else f"every key is read below {self.full_below:,} tokens"
        )
        notes = (
            f"predicted for a token: {units.seconds(self.seconds)}, of which attention "
            f"{units.seconds(self.attention_seconds)}",
            "device memory: weights "
            f"{units.nbytes(self.work.weight_bytes + self.work.idle_bytes)}, keys and values "
            f"{units.nbytes(self.work.kv_bytes)}, indexes "
            f"{units.nbytes(self.memory - self.work.kv_bytes)}",
            str(self.bytes_a_key),
            f"{below}; {self.basis}",
            *([self.graph] if self.graph else []),
            *([was_busy(self.machine)] if was_busy(self.machine) else []),
        )
        title = f"plan for {self.work.length:,} tokens, recovery {self.auto.recovery:g}"
        return show.Table(f"{title}, on {self.machine.device}", columns, rows, notes)


def was_busy(machine: Machine) -> str:
    """A warning where other programs disturbed the measuring; else nothing."""
    if machine.busy < _BUSY:
        return ""
    return (
        f"other programs took {machine.busy:.0%} of the CPUs when this machine was measured: times "
        "may be too long; measure it again with alaya calibrate --machine when it is quiet"
    )


def describe(plan: Plan) -> str:
    """A plan in short: without its window."""
    query = plan.query
    if not isinstance(query, DIPR):
        return repr(query)
    asked = f"recovery={query.recovery:g}" if query.recovery is not None else _range(query.beta)
    index = "Graph()" if isinstance(plan.index, Graph) else repr(plan.index)
    by = " by page" if plan.by == "page" else ""
    return f"DIPR({asked}) @ {index}{by}"


def _range(beta: Any) -> str:
    low, high = float(np.min(beta)), float(np.max(beta))
    return f"beta={low:.0f}" if low == high else f"beta={low:.0f} to {high:.0f}"
