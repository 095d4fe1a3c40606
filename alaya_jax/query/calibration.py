"""How many keys a model's heads need, measured on texts like those that it will read.

For sampled queries of each layer and head: the smallest range of scores whose keys hold a share of
the attention mass, by exact scores, beside a window. `Auto` predicts from it what a plan will read;
without one it takes figures of SmolLM2-135M (`assumed`).
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alaya_jax.attention.paged import (
    KeyRange,
    Pages,
    attend_range,
    over_query_blocks,
    score_range,
)
from alaya_jax.checkpoint.bundled import cache_directory
from alaya_jax.errors import RequestError
from alaya_jax.index import recover
from alaya_jax.model import Model
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.llama import Params, forward
from alaya_jax.progress import progress_bar
from alaya_jax.query import Window, show
from alaya_jax.query.cost import Kept

RECOVERIES = (0.9, 0.95, 0.99)
SURE = 0.95
"""Share of the queries for which `Calibration.beta` keeps its recovery."""

_PAGE = 16
_BLOCK = 128  # query tokens attended to at once
_GROWTH = 0.3  # keys needed go with length to this power: from 4,096 to 8,192 tokens, 0.18 and 0.29


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Keys outside the window that heads need, means over sampled queries.

    Attributes:
      model, fingerprint: whose.
      window: beside which keys were counted.
      recoveries: [R] shares of the mass, ascending.
      lengths: [N] keys that the queries saw, about, ascending.
      queries: [N] how many were sampled at each.
      keys: float [R, N, L, H], keys a query head needs.
      read: float [R, N, L, K], keys that any query head of a kv head needs.
      beta: float [R, L, H], the range of scores that keeps the share for `SURE` of the queries of
        all lengths: for `DIPR(beta=calibration.beta_for(layer, recovery))`.
    """

    model: str
    fingerprint: str
    window: Window
    recoveries: tuple[float, ...]
    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    keys: np.ndarray
    read: np.ndarray
    beta: np.ndarray

    def kept(self, layer: int, recovery: float, length: int) -> Kept:
        """Keys outside the window at this recovery and length.

        Between the figures measured, logarithms are interpolated; past the lengths measured, keys
        grow as they do from the shortest to the longest, no faster than the length.
        """
        return Kept(
            self._at(self.keys[:, :, layer].mean(-1), recovery, length),
            self._at(self.read[:, :, layer].max(-1), recovery, length),
        )

    def _at(self, counts: np.ndarray, recovery: float, length: int) -> float:
        """Of counts [R, N]."""
        if recovery >= 1:
            return float(length)
        logs = np.log1p(counts)
        lost = [-np.log(1 - p) for p in self.recoveries]
        by_length = np.array([_through(lost, row, -np.log(1 - recovery)) for row in logs.T])
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
        )
        return show.Table(f"keys that {self.model} needs", tuple(columns), rows, notes)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; see `from_dict`."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["window"] = dataclasses.asdict(self.window)
        for name in ("keys", "read", "beta"):
            data[name] = np.round(data[name], 3).tolist()
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Calibration":
        """The inverse of `to_dict`."""
        fields = dict(data)
        fields["window"] = Window(**fields["window"])
        for name in ("recoveries", "lengths", "queries"):
            fields[name] = tuple(fields[name])
        for name in ("keys", "read", "beta"):
            fields[name] = np.asarray(fields[name], np.float64)
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, whole or not at all."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(self.to_dict()))
        part.replace(place)

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
                f"{path} is no calibration ({error}); delete it, or calibrate again"
            ) from error


def assumed(recovery: float, length: int, group: int) -> Kept:
    """Keys that a model nobody has calibrated needs: as SmolLM2-135M at 4,096 tokens, which keeps
    0.90, 0.95 and 0.98 of the mass with 4.1, 7.4 and 13% of the keys; the heads of a group are
    taken to need different ones, the worst case.
    """
    if recovery >= 1:
        return Kept(length, length)
    at_4096 = 4096 * 0.0073 * (1 - recovery) ** -0.75
    keys = min(at_4096 * (length / 4096) ** _GROWTH, length)
    return Kept(keys, min(group * keys, length))


def calibrate(
    model: Model,
    texts: Sequence[Any],
    *,
    length: int | None = None,
    queries: int = 32,
    recoveries: tuple[float, ...] = RECOVERIES,
    window: Window | None = None,
    save: bool = True,
    progress: bool = True,
) -> Calibration:
    """Measures how many keys each head needs, on texts; what `Auto` predicts from is kept.

    Args:
      model: whose heads.
      texts: strings or lists of token ids; the longer the better. Each is cut into pieces.
      length: of the pieces, tokens; default the longest text's, at most 4,096.
      queries: sampled in each piece, near each of its lengths: whole, half, a quarter.
      recoveries: shares of the mass to measure for.
      window: tokens that count as attended in any case; default `Window()`.
      save: keep it where `Auto` finds it (see `places`).
      progress: shows a bar on stderr when it is a terminal.

    Raises:
      RequestError: the texts are too short for a query to see keys outside the window, or a
        recovery is not between 0 and 1.
    """
    window = window or Window()
    if not recoveries or not all(0 < p < 1 for p in recoveries):
        raise RequestError(f"calibrate(recoveries={recoveries}): shares above 0 and below 1")
    recoveries = tuple(sorted(recoveries))
    rows = [model.check_tokens(model.encode(t) if isinstance(t, str) else t) for t in texts]
    longest = max((len(row) for row in rows), default=0)
    length = min(length or min(longest, 4096), model.length_limit, max(longest, 1))
    seen = [n for n in (length // 4, length // 2, length) if n >= 2 * (window.sink + window.recent)]
    if not seen:
        raise RequestError(
            f"calibrate: the longest text has {longest:,} tokens and pieces have {length:,}; for "
            f"keys beside the window to matter they need {2 * (window.sink + window.recent):,}"
        )
    pieces = [row[at : at + length] for row in rows for at in range(0, max(len(row), 1), length)]
    pieces = [piece for piece in pieces if len(piece) >= seen[0]]
    rng = np.random.default_rng(0)
    found: dict[int, list[tuple[np.ndarray, ...]]] = {n: [] for n in seen}
    width = -(-length // _BLOCK) * _BLOCK
    with progress_bar("calibrating", sum(map(len, pieces)), show=progress) as advance:
        for piece in pieces:
            fits = [n for n in seen if n <= len(piece)]
            at = [np.sort(rng.integers(max(int(0.9 * n), 1), n, queries)) for n in fits]
            at += [np.zeros(queries, np.int64)] * (len(seen) - len(fits))  # one program for all
            tokens = np.zeros(width, np.int32)
            tokens[: len(piece)] = piece
            measured = _needed(
                model.params,
                jnp.asarray(tokens),
                jnp.asarray(np.concatenate(at), jnp.int32),
                jnp.asarray(recoveries, jnp.float32),
                window,
                config=model.config,
                rope_length=model.rope_length,
            )
            keys, read, beta = (np.asarray(x, np.float64) for x in measured)
            for i, n in enumerate(fits):
                part = slice(i * queries, (i + 1) * queries)
                found[n].append((keys[..., part], read[..., part], beta[..., part]))
            advance(len(piece))
    # Each [L, R, heads, queries].
    joined = {
        n: [np.concatenate(x, axis=-1) for x in zip(*parts, strict=True)]
        for n, parts in found.items()
        if parts
    }
    keys, read = (
        np.stack([x[i].mean(-1).swapaxes(0, 1) for x in joined.values()], axis=1) for i in (0, 1)
    )
    beta = np.concatenate([x[2] for x in joined.values()], axis=-1)
    result = Calibration(
        model=model.name,
        fingerprint=model.fingerprint,
        window=window,
        recoveries=recoveries,
        lengths=tuple(joined),
        queries=tuple(x[0].shape[-1] for x in joined.values()),
        keys=keys,
        read=read,
        beta=np.quantile(beta, SURE, axis=-1).swapaxes(0, 1),
    )
    if save:
        keep(result, model.directory)
    return result


def places(fingerprint: str, directory: Path | None) -> list[Path]:
    """Where a model's calibration may lie: beside its files, or in the cache directory.

    Args:
      fingerprint: of the model.
      directory: of its files; None where they are one file, or come in a package.
    """
    name = f"alaya-calibration-{hashlib.sha256(fingerprint.encode()).hexdigest()[:12]}.json"
    beside = [] if directory is None else [directory / name]
    return [*beside, cache_directory() / "calibration" / name]


def keep(calibration: Calibration, directory: Path | None) -> Path:
    """Saves a calibration in the first place that can be written; says where.

    Raises:
      OSError: none can be.
    """
    *first, last = places(calibration.fingerprint, directory)
    for path in first:
        try:
            calibration.save(path)
        except OSError:
            continue  # a model that others own: the cache directory is ours
        return path
    calibration.save(last)
    return last


def find(fingerprint: str, directory: Path | None) -> Calibration | None:
    """The calibration of a model, if there is one.

    Raises:
      RequestError: it is damaged.
    """
    found = (p for p in places(fingerprint, directory) if p.is_file())
    path = next(found, None)
    return None if path is None else Calibration.load(path)


def _through(x: Sequence[float], y: np.ndarray, at: float) -> float:
    """Linear between points, and beyond them as the first or the last two go on."""
    if len(x) == 1:
        return float(y[0])
    i = int(np.clip(np.searchsorted(x, at), 1, len(x) - 1))
    return float(y[i - 1] + (y[i] - y[i - 1]) * (at - x[i - 1]) / (x[i] - x[i - 1]))


@functools.partial(jax.jit, static_argnames=("config", "rope_length"))
def _needed(
    params: Params,
    tokens: Int[Array, " T"],
    at: Int[Array, " n"],
    recoveries: Float[Array, " R"],
    window: Window,
    *,
    config: LlamaConfig,
    rope_length: int | None,
) -> tuple[Array, Array, Array]:
    """The model over one piece of text, with full attention.

    Args:
      params, config, rope_length: the model.
      tokens: of the piece; what is behind its end is never seen from `at`.
      at: positions of the sampled queries.
      recoveries: shares of the mass.
      window: tokens attended in any case.

    Returns:
      keys needed int32 [L, R, H, n], for all heads of a group together [L, R, K, n], and their
      range of scores float32 [L, R, H, n].
    """
    positions = jnp.arange(tokens.shape[0])

    def attend(layer: int, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        del layer
        t, kv_heads, dim = k.shape[1:]
        # [1, T, K, D] as pages of _PAGE tokens
        k, v = (jnp.moveaxis(x[0], 1, 0).reshape(kv_heads, -1, _PAGE, dim) for x in (k, v))
        pages = Pages(k, v, jnp.arange(t // _PAGE))
        rows = jnp.moveaxis(q[0].reshape(t, kv_heads, -1, dim), 0, 2)

        def causal(q: Array, p: Array) -> Array:
            return attend_range(q, pages, KeyRange(jnp.zeros_like(p), p + 1))[0].out

        out = over_query_blocks(causal, rows, positions, _BLOCK)
        out = jnp.moveaxis(out, 2, 0).reshape(q.shape).astype(q.dtype)

        sampled, zero, end = rows[:, :, at], jnp.zeros_like(at), at + 1
        sink = jnp.minimum(window.sink, end)
        inside_range = KeyRange(zero, end, sink, jnp.maximum(sink, end - window.recent))
        inside, best = attend_range(sampled, pages, inside_range)
        scores = score_range(sampled.astype(pages.operand_dtype), pages, KeyRange(zero, end))
        scores = jnp.where(inside_range.mask(pages.all_positions()), -jnp.inf, scores)

        def one(recovery: Array) -> tuple[Array, Array, Array]:
            found = recover(scores, inside.lse, best, recovery, dim, margin=0.0)
            n = found.kept.shape[2]
            return (
                jnp.sum(found.kept, axis=-1, dtype=jnp.int32).reshape(-1, n),
                jnp.sum(found.kept.any(1), axis=-1, dtype=jnp.int32),
                found.beta.reshape(-1, n),
            )

        return out, (*state, jax.lax.map(one, recoveries))

    _, by_layer = forward(
        params,
        config,
        tokens[None],
        positions[None],
        attend,
        (),
        logits_at=jnp.zeros(1, jnp.int32),
        rope_length=rope_length,
    )
    return jax.tree.map(lambda *x: jnp.stack(x), *by_layer)
