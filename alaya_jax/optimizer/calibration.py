"""How many keys a model's heads need, measured on texts like those that it will read.

For sampled queries of each layer and head: the smallest range of scores whose keys hold a share of
the attention mass, by exact scores, beside a window; and how many keys lie within other ranges.
`Auto` predicts from it what a plan will read; without one it takes figures of SmolLM2-135M
(`assumed`).
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alaya_jax import show
from alaya_jax.checkpoint import beside
from alaya_jax.errors import RequestError
from alaya_jax.index import learnt as learning
from alaya_jax.index.learnt import LEAST_TOKENS, Learnt
from alaya_jax.optimizer.cost import KeysKept
from alaya_jax.query import Window

_ARRAYS = ("keys", "read", "pages", "beta", "in_range", "read_in_range")
PAGE = 16
"""Tokens of the pages that are counted; others are taken to need as many keys."""

SURE = 0.95
"""Share of the queries for which `Calibration.beta` keeps its recovery."""

_PAGES = 2  # keys of the pages that are needed, over keys needed: 2.3 at 0.90, 1.6 at 0.99
_GROWTH = 0.3  # keys needed go with length to this power: from 4,096 to 8,192 tokens, 0.18 and 0.29


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Keys outside the window that heads need, means over sampled queries. `str()` is a table,
    which a notebook draws in its own way.

    Attributes:
      model, fingerprint: whose.
      window: beside which keys were counted.
      recoveries: [R] shares of the mass, ascending.
      lengths: [N] keys that the queries saw, about, ascending.
      queries: [N] how many were sampled at each.
      keys: float [R, N, L, H], keys a query head needs.
      read: float [R, N, L, K], keys that any query head of a kv head needs.
      pages: float [R, N, L, K], keys of the pages (of `PAGE`) that any of them needs.
      beta: float [R, L, H], the range of scores that keeps the share for `SURE` of the queries of
        all lengths: for `DIPR(beta=calibration.beta_for(layer, recovery))`.
      ranges: [J] ranges of scores, ascending.
      in_range: float [J, N, L, H], keys of a query head within each range of its best score.
      read_in_range: float [J, N, L, K], keys that are so for any query head of a kv head.
      learnt: what sketches learn of the texts, where it was just measured on enough of them; it is
        kept in a file of its own.
    """

    model: str
    fingerprint: str
    window: Window
    recoveries: tuple[float, ...]
    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    keys: np.ndarray
    read: np.ndarray
    pages: np.ndarray
    beta: np.ndarray
    ranges: tuple[float, ...]
    in_range: np.ndarray
    read_in_range: np.ndarray
    learnt: Learnt | None = dataclasses.field(default=None, repr=False)

    def kept(
        self, layer: int, recovery: float, length: int, by: Literal["key", "page"] = "key"
    ) -> KeysKept:
        """Keys outside the window at this recovery and length; by page, those of the pages that
        any head of a group needs.

        Between the figures measured, logarithms are interpolated; past the lengths measured, keys
        grow as they do from the shortest to the longest, no faster than the length.
        """
        if by == "page":
            pages = self.pages[:, :, layer]
            mean, most = (self._at(x, recovery, length) for x in (pages.mean(-1), pages.max(-1)))
            return KeysKept(mean, most)
        return KeysKept(
            self._at(self.keys[:, :, layer].mean(-1), recovery, length),
            self._at(self.read[:, :, layer].max(-1), recovery, length),
        )

    def within(self, layer: int, recovery: float, length: int) -> KeysKept:
        """Keys outside the window within the range `beta_near` of the best score, at this length.

        `read` is of a kv head in the mean, unlike that of `kept`: for a search that serves the
        query heads of each together.
        """
        return KeysKept(*(self._grown(x, length) for x in _in_range(self, layer, recovery)))

    def _at(self, counts: np.ndarray, recovery: float, length: int) -> float:
        """Of counts [R, N]."""
        if recovery >= 1:
            return float(length)
        logs = np.log1p(counts)
        by_length = np.array([self._by_recovery(row, recovery) for row in logs.T])
        return self._grown(by_length, length)

    def _by_recovery(self, values: np.ndarray, recovery: float) -> float:
        """Of values [R]."""
        lost = [-np.log(1 - p) for p in self.recoveries]
        return through(lost, values, -np.log(1 - recovery))

    def _grown(self, by_length: np.ndarray, length: int) -> float:
        """A number of keys, from log1p of those at the lengths measured, [N]."""
        x, at = np.log(self.lengths), np.log(max(length, 1))
        growth = _GROWTH
        if len(x) > 1:
            growth = float(np.clip((by_length[-1] - by_length[0]) / (x[-1] - x[0]), 0.0, 1.0))
        inside = np.interp(at, x, by_length)
        past = growth * (at - np.clip(at, x[0], x[-1]))
        return float(min(np.expm1(max(inside + past, 0.0)), length))

    def share(self, recovery: float) -> np.ndarray:
        """float [L], share of the keys that are read at the longest length measured."""
        n = self.lengths[-1]
        layers = range(self.keys.shape[2])
        return np.array([self.kept(i, recovery, n).read / n for i in layers])

    def wants_full(self, recovery: float, share: float = 0.3) -> list[int]:
        """Layers that read more than this share of the keys: they are as well read in full."""
        return np.flatnonzero(self.share(recovery) > share).tolist()

    def beta_for(self, layer: int, recovery: float) -> np.ndarray:
        """float32 [H]; see `beta`.

        Raises:
          RequestError: that recovery was not measured.
        """
        if recovery not in self.recoveries:
            raise RequestError(
                f"beta_for(recovery={recovery}): measured were {self.recoveries}; calibrate with "
                "recoveries=..."
            )
        return self.beta[self.recoveries.index(recovery), layer].astype(np.float32)

    def beta_near(self, layer: int, recovery: float) -> np.ndarray | None:
        """float32 [H], `beta_for` of any recovery up to the largest that was measured: between two,
        interpolated; below the least, that one's. None above.
        """
        if recovery > self.recoveries[-1]:
            return None
        asked = max(recovery, self.recoveries[0])
        beta = [self._by_recovery(row, asked) for row in self.beta[:, layer].T]
        return np.asarray(beta, np.float32)

    def table(self) -> show.Table:
        """Shares of the keys at the longest length, for people."""
        n = self.lengths[-1]
        rows = []
        for layer in range(self.keys.shape[2]):
            shares = (self.keys[r, -1, layer] / n for r in range(len(self.recoveries)))
            cells = [f"{x.mean():.1%} ({x.min():.1%} to {x.max():.1%})" for x in shares]
            betas = [f"{self.beta[r, layer].mean():.0f}" for r in range(len(self.recoveries))]
            rows.append((str(layer), *cells, *betas))
        columns = ["layer", *(f"keys for {p:g}: mean (heads)" for p in self.recoveries)]
        columns += [f"beta for {p:g}" for p in self.recoveries]
        full = self.wants_full(0.95)
        notes = (
            f"share of {n:,} keys beside a window of {self.window.sink} + {self.window.recent}, "
            f"over {self.queries[-1]} queries; beta holds for {SURE:.0%} of them",
            f"layers that read more than 30% of the keys for 0.95: {full or 'none'}",
            f"sketches: {self.learnt or f'no basis: that takes {LEAST_TOKENS:,} tokens of text'}",
        )
        return show.Table(f"keys that {self.model} needs", tuple(columns), rows, notes)

    def __repr__(self) -> str:
        return f"Calibration({self.model!r}, {self.lengths[-1]:,} keys, {self.recoveries})"

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def to_dict(self) -> dict[str, Any]:
        """For JSON; see `from_dict`."""
        fields = [f.name for f in dataclasses.fields(self) if f.name != "learnt"]
        data = {name: getattr(self, name) for name in fields}
        data["window"] = dataclasses.asdict(self.window)
        for name in _ARRAYS:
            data[name] = np.round(data[name], 3).tolist()
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Calibration":
        """The inverse of `to_dict`."""
        fields = dict(data)
        fields["window"] = Window(**fields["window"])
        for name in ("recoveries", "lengths", "queries", "ranges"):
            fields[name] = tuple(fields[name])
        for name in _ARRAYS:
            fields[name] = np.asarray(fields[name], np.float64)
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, whole or not at all."""
        beside.replace(Path(path), json.dumps(self.to_dict()).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Reads what `save` wrote.

        Raises:
          RequestError: it is damaged.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"{path} is no calibration, or one of another version ({error}); delete it, or "
                "calibrate again"
            ) from error


def assumed(
    recovery: float, length: int, group: int, by: Literal["key", "page"] = "key"
) -> KeysKept:
    """Keys that a model nobody has calibrated needs: as SmolLM2-135M at 4,096 tokens, which keeps
    0.90, 0.95 and 0.98 of the mass with 4.1, 7.4 and 13% of the keys; the heads of a group are
    taken to need different ones, the worst case. Pages hold twice as many.
    """
    if recovery >= 1:
        return KeysKept(length, length)
    at_4096 = 4096 * 0.0073 * (1 - recovery) ** -0.75
    keys = at_4096 * (length / 4096) ** _GROWTH
    if by == "page":
        read = min(_PAGES * group * keys, length)
        return KeysKept(read, read)
    return KeysKept(min(keys, length), min(group * keys, length))


def places(fingerprint: str, directory: Path | None) -> list[Path]:
    """Where a model's calibration may lie; see `beside.places`."""
    return beside.places("calibration", fingerprint, ".json", directory)


def keep(calibration: Calibration, directory: Path | None) -> Path:
    """Saves a calibration in the first place that can be written; says where. What sketches learn
    goes beside it.

    Raises:
      OSError: none can be.
    """
    if calibration.learnt is not None:
        learning.keep(calibration.learnt, directory)
    return beside.keep(calibration.save, places(calibration.fingerprint, directory))


def find(fingerprint: str, directory: Path | None) -> Calibration | None:
    """The calibration of a model, if there is one.

    Raises:
      RequestError: it is damaged.
    """
    found = (p for p in places(fingerprint, directory) if p.is_file())
    path = next(found, None)
    return None if path is None else Calibration.load(path)


@functools.lru_cache(maxsize=1024)  # asked again at each length
def _in_range(
    calibration: Calibration, layer: int, recovery: float
) -> tuple[np.ndarray, np.ndarray]:
    """log1p of the keys [N] in the range `beta_near`: of a query head, and of a kv head."""
    beta = calibration.beta_near(layer, recovery)
    if beta is None:
        raise RequestError(
            f"recovery {recovery}: at most {calibration.recoveries[-1]} was measured"
        )

    def at(counts: np.ndarray, beta: float) -> np.ndarray:
        """[N], of counts [J, N]."""
        logs = np.log1p(counts)
        return np.expm1([np.interp(beta, calibration.ranges, column) for column in logs.T])

    heads, groups = calibration.in_range[:, :, layer], calibration.read_in_range[:, :, layer]
    alone = np.array([at(heads[:, :, h], x) for h, x in enumerate(beta)])  # [H, N]
    together, mean = [], beta.reshape(groups.shape[-1], -1).mean(-1)
    for group, members in enumerate(np.arange(len(beta)).reshape(len(mean), -1)):
        # Those of a group overlap as they do where all its heads have the same range.
        apart = sum(at(heads[:, :, h], mean[group]) for h in members)
        overlap = at(groups[:, :, group], mean[group]) / np.maximum(apart, 1e-9)
        together.append(alone[members].sum(0) * overlap)
    return np.log1p(alone.mean(0)), np.log1p(np.mean(together, axis=0))


def through(x: Sequence[float] | np.ndarray, y: np.ndarray, at: float) -> float:
    """Linear between points, and beyond them as the first or the last two go on."""
    if len(x) == 1:
        return float(y[0])
    i = int(np.clip(np.searchsorted(x, at), 1, len(x) - 1))
    return float(y[i - 1] + (y[i] - y[i - 1]) * (at - x[i - 1]) / (x[i] - x[i - 1]))
