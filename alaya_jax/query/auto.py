"""What the optimizer may be asked: a goal, in place of a query."""

import dataclasses
import numbers
from typing import Any, Literal

from alaya_jax.errors import RequestError
from alaya_jax.query import Window
from alaya_jax.units import bytes_of


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Auto:
    """Has the cheapest plan chosen that keeps a share of the attention mass, layer by layer.

    Taken wherever a query is, for all layers at once. `session.explain()` says what was chosen,
    and why. A goal that no plan reaches is refused, with the nearest that can be reached.

    Attributes:
      tpot: most seconds for a token of each sequence; None: as fast as possible.
      recovery: share of the attention mass to keep, above 0 and at most 1; at 1 all keys are read.
      device_memory: for keys, values and indexes, over all devices, bytes or "8GiB"; None: what
        the device says it has beside the weights, or no limit where it does not say.
      window: tokens that are always attended to.
      graph: whether a layer may ask the context's graph, where it has one. A walk estimates no
        mass, so it is asked for the range of scores that held the share in the calibration; what
        it misses of that is not known.
      prefill: how a prefill reads keys: "dense" reads every key; "sparse" may leave blocks of
        keys out (`Tiles`), where that is predicted to be faster. Their share of the mass is an
        estimate from a few queries, and what is lost goes into the keys and values that are kept.
    """

    tpot: float | None = None
    recovery: float = 0.95
    device_memory: int | str | None = None
    window: Window = dataclasses.field(default_factory=Window)
    graph: bool = True
    prefill: Literal["dense", "sparse"] = "dense"

    def __post_init__(self):
        if self.tpot is not None and not (_is_real(self.tpot) and self.tpot > 0):
            raise RequestError(f"Auto(tpot={self.tpot!r}): seconds a token, above 0")
        if not (_is_real(self.recovery) and 0 < self.recovery <= 1):
            raise RequestError(f"Auto(recovery={self.recovery!r}): above 0, at most 1")
        if not isinstance(self.window, Window):
            raise RequestError(f"Auto(window={self.window!r}): must be a Window(sink, recent)")
        if self.prefill not in ("dense", "sparse"):
            raise RequestError(f"Auto(prefill={self.prefill!r}): use 'dense' or 'sparse'")
        if self.device_memory is not None:
            bytes_of(self.device_memory, "Auto(device_memory=...)")

    @property
    def memory(self) -> int | None:
        """`device_memory` in bytes."""
        if self.device_memory is None:
            return None
        return bytes_of(self.device_memory, "Auto(device_memory=...)")
