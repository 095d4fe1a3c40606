"""Which plan answers in which layer, by predicted cost.

`choose` is pure: the same workload, machine and calibration give the same plans. Of the plans that
keep the recovery asked for, each layer takes the fastest; where the indexes do not fit into memory,
those that gain least time for their bytes go first.

A graph keeps no share of the mass by itself: it is asked for the range of scores that kept it in
the calibration, and without a calibration it is no choice.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from alaya_jax import units
from alaya_jax.errors import PlanError
from alaya_jax.index import Flat, Graph
from alaya_jax.index.recovery import MARGIN
from alaya_jax.optimizer.calibration import SURE, Calibration, assumed
from alaya_jax.optimizer.choice import LayerChoice, PlanChoice
from alaya_jax.optimizer.cost import Cost, KeysKept, Machine, Workload, cost, step_seconds
from alaya_jax.query import DIPR, Full
from alaya_jax.query.auto import Auto
from alaya_jax.query.plan import Plan

_RECOVERIES = (0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Tried when a goal is refused, to name the largest that fits."""

GRAPH_FROM = 16_384
"""Tokens from which it is worth measuring what a graph would save where there is none."""

_WORTH = 0.9
"""Share of the time that a graph must bring it down to, to be named where there is none."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A plan that a layer might take, its cost, and the keys outside the window that it keeps."""

    plan: Plan
    cost: Cost
    kept: KeysKept

    @property
    def seconds(self) -> float:
        """Predicted."""
        return self.cost.seconds


Options = dict[str, Option]
"""Those of a layer, by name."""


def choose(
    auto: Auto,
    work: Workload,
    machine: Machine,
    calibration: Calibration | None = None,
    memory: int | None = None,
) -> PlanChoice:
    """The fastest plans that keep `auto.recovery`, within its memory and time.

    Args:
      auto: what is asked.
      work: what is to be served.
      machine: where.
      calibration: of the model; None: keys are predicted from another model's.
      memory: bytes that there are for keys, values and indexes, whatever `auto` allows; None: not
        known.

    Raises:
      PlanError: nothing fits; the message has the nearest goals that do.
    """
    limit = min((x for x in (auto.memory, memory) if x is not None), default=None)
    if limit is not None and work.kv_bytes > limit:
        raise PlanError(
            f"{_asked(auto)}: the keys and values of {work.held:,} tokens alone take "
            f"{units.nbytes(work.kv_bytes)}, and {units.nbytes(limit)} are allowed; raise "
            "device_memory, or have fewer tokens"
        )
    choice = PlanChoice(
        auto,
        work,
        machine,
        _cheapest(auto, work, machine, calibration, limit),
        _basis(calibration),
        _full_below(auto, work, machine, calibration),
    )
    if auto.tpot is not None and choice.seconds > auto.tpot:
        raise PlanError(_refusal(choice, calibration, limit))
    return dataclasses.replace(choice, graph=_of_the_graph(choice, calibration, limit))


def options(
    auto: Auto, work: Workload, machine: Machine, calibration: Calibration | None, layer: int
) -> Options:
    """What a layer may do to keep the recovery."""
    # A scan aims higher by this much, for the errors of its estimates.
    aim = auto.recovery + MARGIN * (1 - auto.recovery)

    def needed(by: Literal["key", "page"]) -> KeysKept:
        if calibration is None:
            return assumed(aim, work.length, work.config.group_size, by)
        return calibration.kept(layer, aim, work.length, by)

    kept = needed("key")
    plans = {"Full()": (Plan(Full()), kept)}
    window = int(auto.window.sink) + int(auto.window.recent)
    if auto.recovery < 1 and work.length > window:
        query = DIPR(recovery=auto.recovery, window=auto.window)
        for index in (Flat(), *work.sketches):
            plans[repr(index)] = Plan(query, index), kept
        if machine.page_scan is not None:
            sketch = work.sketches[0]
            by_page = Plan(query, sketch, by="page", share="group")
            plans[f"{sketch!r} by page"] = by_page, needed("page")
        if auto.graph and work.graph and machine.walk is not None and calibration is not None:
            beta = calibration.beta_near(layer, auto.recovery)
            if beta is not None:
                found = calibration.within(layer, auto.recovery, work.length)
                asked: Any = beta  # as data a numpy array is as good as jax's
                plans["Graph()"] = Plan(DIPR(beta=asked, window=auto.window), work.graph), found
    return {
        name: Option(plan, cost(plan, work, machine, kept), kept)
        for name, (plan, kept) in plans.items()
    }


def _cheapest(
    auto: Auto,
    work: Workload,
    machine: Machine,
    calibration: Calibration | None,
    limit: int | None,
) -> tuple[LayerChoice, ...]:
    layers = range(work.config.num_hidden_layers)
    found = [options(auto, work, machine, calibration, layer) for layer in layers]
    fastest = [min(of, key=lambda name, of=of: of[name].seconds) for of in found]
    names = list(fastest)
    if limit is not None:
        taken = work.kv_bytes + sum(of[n].cost.memory for of, n in zip(found, names, strict=True))
        while taken > limit:
            _, layer, name = min(_lighter(found, names))
            taken += _more(found[layer], names[layer], name)
            names[layer] = name
        while ways := _faster(found, names, limit - taken):  # what room is left is used
            _, layer, name = min(ways)
            taken += _more(found[layer], names[layer], name)
            names[layer] = name
    return tuple(
        _layer_choice(name, of, name != best)
        for name, of, best in zip(names, found, fastest, strict=True)
    )


def _lighter(found: list[Options], names: list[str]) -> list[tuple[float, int, str]]:
    """Ways to take less memory: seconds lost a byte, the layer, and what it does then."""
    ways = []
    for layer, (of, now) in enumerate(zip(found, names, strict=True)):
        for name, other in of.items():
            saved = -_more(of, now, name)
            if saved > 0:
                ways.append(((other.seconds - of[now].seconds) / saved, layer, name))
    return ways


def _faster(found: list[Options], names: list[str], room: int) -> list[tuple[float, int, str]]:
    """Ways to take less time within so many bytes more: seconds, less than 0, the layer, how."""
    return [
        (other.seconds - of[now].seconds, layer, name)
        for layer, (of, now) in enumerate(zip(found, names, strict=True))
        for name, other in of.items()
        if other.seconds < of[now].seconds and _more(of, now, name) <= room
    ]


def _more(of: Options, now: str, then: str) -> int:
    """Bytes that one plan takes more than another."""
    return of[then].cost.memory - of[now].cost.memory


def _layer_choice(name: str, of: Options, squeezed: bool) -> LayerChoice:
    taken = of[name]
    others = {other: x.cost for other, x in of.items() if other != name}
    beside = ", ".join(f"{other} {units.seconds(c.seconds)}" for other, c in others.items())
    reason = f"against {beside}" if others else "all keys are in the window, or asked for"
    if squeezed:
        reason += "; no memory left for a faster index"
    seconds = {other: c.seconds for other, c in others.items()}
    return LayerChoice(taken.plan, taken.cost, taken.kept, seconds, reason)


def _full_below(
    auto: Auto, work: Workload, machine: Machine, calibration: Calibration | None
) -> int | None:
    """The shortest length from which on some layer does better than to read every key; a graph
    leaves as many keys uncovered as now.
    """
    longest, tail = max(work.config.max_length, work.length), work.length - work.graph_length
    lengths = np.unique(np.geomspace(256, max(longest, 257), 160).astype(int))[::-1]
    shortest = None
    for n in map(int, lengths):
        at = dataclasses.replace(work, length=n, graph_length=max(n - tail, 0))
        layers = range(work.config.num_hidden_layers) if calibration else [0]
        found = (options(auto, at, machine, calibration, i) for i in layers)
        if all(min(of, key=lambda k: of[k].seconds) == "Full()" for of in found):
            break
        shortest = n
    return shortest


def _of_the_graph(choice: PlanChoice, calibration: Calibration | None, limit: int | None) -> str:
    """What there is to say of the context's graph, or of one that might be built."""
    auto, work, machine = choice.auto, choice.work, choice.machine
    if auto.recovery >= 1 or not auto.graph:
        return ""
    if any(isinstance(layer.plan.index, Graph) for layer in choice.layers):
        return (
            f"a graph estimates no mass: it is asked for the range of scores that held "
            f"{auto.recovery:g} for {SURE:.0%} of the calibrated queries, and finds most of those "
            "keys, not surely all (explain(analyze=True) shows what it held; Auto(graph=False) "
            "leaves it out)"
        )
    if work.graph is not None:
        if calibration is None:
            return (
                f"the context's graph is not asked: no calibration says which range of scores "
                f"holds {auto.recovery:g} (aj.calibrate, alaya calibrate)"
            )
        if calibration.beta_near(0, auto.recovery) is None:
            return (
                f"the context's graph is not asked: {auto.recovery:g} is more than was calibrated "
                f"({calibration.recoveries[-1]:g}; calibrate with recoveries=...)"
            )
        return ""
    if machine.walk is None or calibration is None or not work.graph_length or work.context > 1:
        return ""
    built = dataclasses.replace(work, graph=Graph())
    layers = _cheapest(auto, built, machine, calibration, limit)
    seconds = sum(x.seconds for x in layers) + step_seconds(work, machine)
    if seconds > _WORTH * choice.seconds:
        return ""
    size = sum(x.cost.memory for x in layers if isinstance(x.plan.index, Graph))
    return (
        f"a graph of the context ({units.nbytes(size)}; alaya db index ID, db.build_index) would "
        f"make that {units.seconds(seconds)}, and may miss some of the keys"
    )


def _refusal(choice: PlanChoice, calibration: Calibration | None, limit: int | None) -> str:
    auto, work, machine = choice.auto, choice.work, choice.machine
    assert auto.tpot is not None

    def fastest(recovery: float, limit: int | None) -> float:
        asked = dataclasses.replace(auto, recovery=recovery)
        layers = _cheapest(asked, work, machine, calibration, limit)
        return sum(x.seconds for x in layers) + step_seconds(work, machine)

    memory = "" if limit is None else f" in {units.nbytes(limit)}"
    lines = [
        f"{_asked(auto)}: at {work.length:,} tokens a token takes at least "
        f"{units.seconds(choice.seconds)} with recovery {auto.recovery:g}{memory}"
    ]
    lower = [p for p in _RECOVERIES if p < auto.recovery]
    best = next((p for p in lower if fastest(p, limit) <= auto.tpot), None)
    ways = [f"tpot={choice.seconds:.3g}"]
    if best is not None:
        ways.append(f"recovery={best:g}")
    if limit is not None and fastest(auto.recovery, None) <= auto.tpot:
        least = _least_memory(auto, work, machine, calibration)
        ways.append(f"device_memory={least} ({units.nbytes(least)})")
    base = step_seconds(work, machine)
    if base > auto.tpot:
        lines.append(f"reading the weights alone takes {units.seconds(base)}")
    return "; ".join(lines) + ". Nearest that can be had: " + ", or ".join(ways)


def _least_memory(
    auto: Auto, work: Workload, machine: Machine, calibration: Calibration | None
) -> int:
    """For the time asked: one index after another, the greatest gain a byte first."""
    assert auto.tpot is not None
    layers = range(work.config.num_hidden_layers)
    found = [options(auto, work, machine, calibration, layer) for layer in layers]
    now = [min((x for x in of.values() if not x.cost.memory), key=_seconds) for of in found]
    base = step_seconds(work, machine)
    while base + sum(map(_seconds, now)) > auto.tpot:
        ways = [
            ((here.seconds - x.seconds) / (x.cost.memory - here.cost.memory), layer, x)
            for layer, (of, here) in enumerate(zip(found, now, strict=True))
            for x in of.values()
            if x.cost.memory > here.cost.memory and x.seconds < here.seconds
        ]
        _, layer, option = max(ways, key=lambda way: way[0])
        now[layer] = option
    return work.kv_bytes + sum(x.cost.memory for x in now)


def _seconds(option: Option) -> float:
    return option.seconds


def _basis(calibration: Calibration | None) -> str:
    if calibration is None:
        return (
            "keys needed are SmolLM2-135M's, for want of a calibration of this model "
            "(aj.calibrate, alaya calibrate)"
        )
    at = ", ".join(f"{n:,}" for n in calibration.lengths)
    return f"keys needed are as calibrated on {sum(calibration.queries)} queries at {at} tokens"


def _asked(auto: Auto) -> str:
    """What was asked for: the goals, and what is not at its default."""
    plain = Auto()
    given = {f.name: getattr(auto, f.name) for f in dataclasses.fields(auto) if f.name != "window"}
    return f"Auto({', '.join(f'{k}={v!r}' for k, v in given.items() if v != getattr(plain, k))})"
