"""How a prefill under `Auto(prefill="sparse")` is answered: by predicted time.

  Full            full * (query tokens times the keys that each sees)
  Tiles, all      tile * the same: every block is scored, exactly
  Tiles, chosen   (select + tile * density) * the same

Constants of the machine are measured with the engine (`machine.prefill_for`). The density, the
share of keys in the blocks that hold the recovery for the queries that are asked, is SmolLM2-135M's
(benchmarks/results/sparse_prefill.jsonl, lines `quality`): no calibration knows that of a model.
"""

import dataclasses
from typing import Any

import numpy as np

from alaya_jax import units
from alaya_jax.optimizer.calibration import through
from alaya_jax.query import Full, Tiles
from alaya_jax.query.auto import Auto
from alaya_jax.query.plan import Plan

CHUNK = 512
"""Query tokens whose density is taken to be the same."""

_RECOVERIES = (0.8, 0.9, 0.95, 0.98)
_LENGTHS = (2048, 4096, 8192)
_DENSITY = (
    (0.296, 0.188, 0.108),
    (0.380, 0.267, 0.160),
    (0.484, 0.365, 0.229),
    (0.627, 0.507, 0.340),
)
"""By recovery and length."""


@dataclasses.dataclass(frozen=True)
class PrefillMachine:
    """Constants of a device for one shape of layer, in seconds a query token and key, all heads.

    Attributes:
      device: which.
      full: by full attention.
      tile: in a list of blocks.
      select: to choose the blocks, of all keys that are seen.
    """

    device: str
    full: float
    tile: float
    select: float


@dataclasses.dataclass(frozen=True)
class PrefillChoice:
    """What a prefill does, and why.

    Attributes:
      plan: of every layer.
      seconds: predicted, attention of all layers and new tokens.
      others: seconds of what was not chosen, by name.
    """

    plan: Plan
    seconds: float
    others: dict[str, float]

    @property
    def reason(self) -> str:
        """In words."""
        beside = ", ".join(f"{name} {units.seconds(x)}" for name, x in self.others.items())
        return f"predicted attention {units.seconds(self.seconds)}, against {beside}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        named = {"plan": str(self.plan), "predicted_seconds": self.seconds}
        return {**named, "others": self.others, "reason": self.reason}


def density(recovery: float, length: int) -> float:
    """Share of the keys that `Tiles(recovery=...)` scores for queries at this position.

    Logarithms are interpolated; beyond the lengths measured it goes on as between the shortest and
    the longest.
    """
    if recovery >= 1:
        return 1.0
    lost = -np.log(1 - np.asarray(_RECOVERIES))
    rows = np.log(np.asarray(_DENSITY))
    at = [through(lost, column, -np.log(1 - recovery)) for column in rows.T]
    x, here = np.log(_LENGTHS), np.log(max(length, 1))
    slope = min((at[-1] - at[0]) / (x[-1] - x[0]), 0.0)
    inside = np.interp(here, x, at) + slope * (here - np.clip(here, x[0], x[-1]))
    return float(min(np.exp(inside), 1.0))


def choose_prefill(
    auto: Auto, layers: int, machine: PrefillMachine, known: int, length: int
) -> PrefillChoice:
    """The fastest plan for the tokens from `known` to `length` of a sequence.

    Args:
      auto: what is asked; its recovery is what the lists aim at.
      layers: L.
      machine: where.
      known: tokens in the cache.
      length: tokens there will be.
    """
    sparse = Tiles(recovery=auto.recovery)
    plans = {"Full()": Plan(Full()), "Tiles()": Plan(Tiles())}
    if auto.recovery < 1:
        plans[f"Tiles(recovery={auto.recovery:g})"] = Plan(sparse)
    total = dict.fromkeys(plans, 0.0)
    for start in range(known, length, CHUNK):
        end = min(start + CHUNK, length)
        seen = (end - start) * (start + end) / 2
        share = density(auto.recovery, end)
        of_pair = (machine.full, machine.tile, machine.select + machine.tile * share)
        for name, seconds in zip(plans, of_pair, strict=False):
            total[name] += layers * seen * seconds
    name = min(total, key=lambda name: total[name])
    others = {other: x for other, x in total.items() if other != name}
    return PrefillChoice(plans[name], total[name], others)
