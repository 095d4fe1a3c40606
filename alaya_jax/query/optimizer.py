"""Which plan answers in which layer: by AlayaDB's rules, or by predicted cost.

`choose` is pure: the same workload, machine and calibration give the same plans. Of the plans that
keep the recovery asked for, each layer takes the fastest; where the indexes do not fit into memory,
the layers that gain least by one do without.
"""

import dataclasses
from typing import Any

import numpy as np

from alaya_jax import index
from alaya_jax.errors import PlanError
from alaya_jax.index import Block, Flat, Index, Sketch
from alaya_jax.query import DIPR, Full, TopK, Window, show
from alaya_jax.query.auto import Auto
from alaya_jax.query.calibration import Calibration, assumed
from alaya_jax.query.cost import Cost, Kept, Machine, Workload, cost, step_seconds
from alaya_jax.query.plan import Plan, Plans

SHORT = 4096
"""Tokens below which AlayaDB's rules read every key; the paper gives no number (Figure 8)."""

_RECOVERIES = (0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Tried when a goal is refused, to name the largest that fits."""


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
    kept: Kept
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
class Choice:
    """What `Auto` chose, for one workload.

    Attributes:
      auto: what was asked.
      work: for what.
      machine: where.
      layers: one a layer.
      basis: where the numbers of keys come from.
      full_below: length below which every layer reads all keys; None: at all lengths that the
        model takes.
    """

    auto: Auto
    work: Workload
    machine: Machine
    layers: tuple[LayerChoice, ...]
    basis: str
    full_below: int | None

    @property
    def plans(self) -> Plans:
        """One for all layers where they are the same."""
        plans = tuple(layer.plan for layer in self.layers)
        return plans[0] if all(plan == plans[0] for plan in plans) else plans

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
                "weights": self.work.weight_bytes,
                "kv": self.work.kv_bytes,
                "indexes": self.memory - self.work.kv_bytes,
                "read_by_attention": sum(layer.cost.read for layer in self.layers),
            },
            "full_below": self.full_below,
            "basis": self.basis,
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
                _describe(layer.plan),
                show.count(layer.kept.attended) if layer.plan.retrieves else "all",
                show.nbytes(layer.cost.read),
                show.nbytes(layer.cost.memory),
                show.seconds(layer.seconds),
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
            f"predicted for a token: {show.seconds(self.seconds)}, of which attention "
            f"{show.seconds(self.attention_seconds)}",
            f"device memory: weights {show.nbytes(self.work.weight_bytes)}, keys and values "
            f"{show.nbytes(self.work.kv_bytes)}, indexes "
            f"{show.nbytes(self.memory - self.work.kv_bytes)}",
            f"{below}; {self.basis}",
        )
        title = f"plan for {self.work.length:,} tokens, recovery {self.auto.recovery:g}"
        return show.Table(f"{title}, on {self.machine.device}", columns, rows, notes)


def alayadb_rules(
    layers: int,
    length: int,
    *,
    reused: int = 0,
    stored: int = 0,
    memory_high: bool = False,
    beta: float = 50.0,
    k: int = 2048,
    window: Window | None = None,
    fine: Index | None = None,
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
      beta, k: of the queries; the paper's.
      window: default `Window()`.
      fine: index by key; default `Graph()`, or `Sketch()` where the library has no graph.
    """
    if length < SHORT:
        return Plan(Full())
    window, before = window or Window(), None
    if reused < stored:
        before = reused
        window = dataclasses.replace(window, recent=max(window.recent, length - reused))
    if memory_high:
        return Plan(TopK(k, window, before), Block("leaders"), by="page", share="layer")
    query = DIPR(beta=beta, window=window, before=before)
    first, rest = Plan(query, Flat()), Plan(query, fine or getattr(index, "Graph", Sketch)())
    return (first, *(rest,) * (layers - 1))


def choose(
    auto: Auto,
    work: Workload,
    machine: Machine,
    calibration: Calibration | None = None,
    memory: int | None = None,
) -> Choice:
    """The fastest plans that keep `auto.recovery`, within its memory and time.

    Args:
      auto: what is asked.
      work: what is to be served.
      machine: where.
      calibration: of the model; None: keys are predicted from another model's.
      memory: bytes for keys, values and indexes where `auto` names none; None: no limit.

    Raises:
      PlanError: nothing fits; the message has the nearest goals that do.
    """
    limit = auto.memory if auto.memory is not None else memory
    if limit is not None and work.kv_bytes > limit:
        raise PlanError(
            f"{_asked(auto)}: the keys and values of {work.held:,} tokens alone take "
            f"{show.nbytes(work.kv_bytes)}, and {show.nbytes(limit)} are allowed; raise "
            "device_memory, or have fewer tokens"
        )
    layers = _cheapest(auto, work, machine, calibration, limit)
    choice = Choice(
        auto,
        work,
        machine,
        layers,
        _basis(calibration),
        _full_below(auto, work, machine, calibration),
    )
    if auto.tpot is not None and choice.seconds > auto.tpot:
        raise PlanError(_refusal(choice, calibration, limit))
    return choice


def options(
    auto: Auto, work: Workload, machine: Machine, calibration: Calibration | None, layer: int
) -> tuple[Kept, dict[str, tuple[Plan, Cost]]]:
    """The plans of a layer that keep the recovery, with their costs, by name."""
    group = work.config.group_size
    if calibration is None:
        kept = assumed(auto.recovery, work.length, group)
    else:
        kept = calibration.kept(layer, auto.recovery, work.length)
    plans = [Plan(Full())]
    window = int(auto.window.sink) + int(auto.window.recent)
    if auto.recovery < 1 and work.length > window:
        query = DIPR(recovery=auto.recovery, window=auto.window)
        plans += [Plan(query, Flat()), Plan(query, Sketch())]
    return kept, {_name(plan): (plan, cost(plan, work, machine, kept)) for plan in plans}


def _cheapest(
    auto: Auto,
    work: Workload,
    machine: Machine,
    calibration: Calibration | None,
    limit: int | None,
) -> tuple[LayerChoice, ...]:
    found = [
        options(auto, work, machine, calibration, layer)
        for layer in range(work.config.num_hidden_layers)
    ]

    def least(costs: dict[str, tuple[Plan, Cost]], room: bool = True) -> str:
        fits = (name for name, (_, c) in costs.items() if room or c.memory == 0)
        return min(fits, key=lambda name: costs[name][1].seconds)

    names = [least(costs) for _, costs in found]
    squeezed: set[int] = set()
    if limit is not None:
        # Every index takes the same memory in each layer, so the least loss of time goes first.
        without = [least(costs, room=False) for _, costs in found]
        loss = [
            costs[without[i]][1].seconds - costs[names[i]][1].seconds
            for i, (_, costs) in enumerate(found)
        ]
        over = work.kv_bytes - limit
        over += sum(costs[name][1].memory for name, (_, costs) in zip(names, found, strict=True))
        for i in np.argsort(loss, kind="stable"):
            saved = found[i][1][names[i]][1].memory
            if over > 0 and saved:
                over -= saved
                names[i] = without[i]
                squeezed.add(int(i))
    return tuple(
        _layer_choice(name, kept, costs, i in squeezed)
        for i, (name, (kept, costs)) in enumerate(zip(names, found, strict=True))
    )


def _layer_choice(
    name: str, kept: Kept, costs: dict[str, tuple[Plan, Cost]], squeezed: bool
) -> LayerChoice:
    plan, price = costs[name]
    others = {other: c.seconds for other, (_, c) in costs.items() if other != name}
    beside = ", ".join(f"{other} {show.seconds(t)}" for other, t in others.items())
    reason = f"against {beside}" if others else "all keys are in the window, or asked for"
    if squeezed:
        reason += "; no memory left for an index"
    return LayerChoice(plan, price, kept, others, reason)


def _full_below(
    auto: Auto, work: Workload, machine: Machine, calibration: Calibration | None
) -> int | None:
    """The shortest length from which on some layer does better than to read every key."""
    longest = max(work.config.max_length, work.length)
    lengths = np.unique(np.geomspace(256, max(longest, 257), 160).astype(int))[::-1]
    shortest = None
    for n in lengths:
        at = dataclasses.replace(work, length=int(n))
        layers = range(work.config.num_hidden_layers) if calibration else [0]
        found = (options(auto, at, machine, calibration, i)[1] for i in layers)
        if all(min(c, key=lambda k: c[k][1].seconds) == "Full()" for c in found):
            break
        shortest = int(n)
    return shortest


def _refusal(choice: Choice, calibration: Calibration | None, limit: int | None) -> str:
    auto, work, machine = choice.auto, choice.work, choice.machine
    assert auto.tpot is not None

    def fastest(recovery: float, limit: int | None) -> tuple[float, tuple[LayerChoice, ...]]:
        asked = dataclasses.replace(auto, recovery=recovery)
        layers = _cheapest(asked, work, machine, calibration, limit)
        return sum(x.seconds for x in layers) + step_seconds(work, machine), layers

    memory = "" if limit is None else f" in {show.nbytes(limit)}"
    lines = [
        f"{_asked(auto)}: at {work.length:,} tokens a token takes at least "
        f"{show.seconds(choice.seconds)} with recovery {auto.recovery:g}{memory}"
    ]
    lower = [p for p in _RECOVERIES if p < auto.recovery]
    best = next((p for p in lower if fastest(p, limit)[0] <= auto.tpot), None)
    ways = [f"tpot={choice.seconds:.3g}"]
    if best is not None:
        ways.append(f"recovery={best:g}")
    seconds, layers = fastest(auto.recovery, None)
    if limit is not None and seconds <= auto.tpot:
        # One index after another, the greatest gain first, until the time is met.
        least = _least_memory(work, machine, layers, auto.tpot)
        ways.append(f"device_memory={least} ({show.nbytes(least)})")
    base = step_seconds(work, machine)
    if base > auto.tpot:
        lines.append(f"reading the weights alone takes {show.seconds(base)}")
    return "; ".join(lines) + ". Nearest that can be had: " + ", or ".join(ways)


def _least_memory(
    work: Workload, machine: Machine, layers: tuple[LayerChoice, ...], tpot: float
) -> int:
    without = [min([x.seconds, *x.others.values()], default=0.0) for x in layers]
    for i, x in enumerate(layers):
        if x.cost.memory:
            without[i] = min(t for name, t in x.others.items() if "Sketch" not in name)
    seconds = sum(without) + step_seconds(work, machine)
    memory = work.kv_bytes
    gains = [(without[i] - x.seconds, x.cost.memory) for i, x in enumerate(layers)]
    for gain, size in sorted(gains, reverse=True):
        if seconds <= tpot:
            break
        seconds, memory = seconds - gain, memory + size
    return memory


def _basis(calibration: Calibration | None) -> str:
    if calibration is None:
        return (
            "keys needed are SmolLM2-135M's, for want of a calibration of this model "
            "(aj.calibrate, alaya calibrate)"
        )
    at = ", ".join(f"{n:,}" for n in calibration.lengths)
    return f"keys needed are as calibrated on {sum(calibration.queries)} queries at {at} tokens"


def _asked(auto: Auto) -> str:
    given = {f.name: getattr(auto, f.name) for f in dataclasses.fields(auto) if f.name != "window"}
    return f"Auto({', '.join(f'{k}={v!r}' for k, v in given.items() if v is not None)})"


def _name(plan: Plan) -> str:
    """What tells the plans of a layer apart."""
    return repr(plan.index) if plan.retrieves else repr(plan.query)


def _describe(plan: Plan) -> str:
    query = plan.query
    if isinstance(query, DIPR):
        return f"DIPR(recovery={query.recovery:g}) @ {plan.index!r}"
    return repr(query)
