"""Policies at equal keys read: each so set that a head reads about as many keys as with the others.

All have the same window of first and last keys, so that only what is retrieved differs;
StreamingLLM's is longer by what the others retrieve. Policies that search a graph are answered by
scoring every key: what a perfect graph would find (benchmarks/graph_recall.py says what a real one
does).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alaya_jax import policies
from alaya_jax.errors import RequestError
from alaya_jax.explain.analysis import analyze
from alaya_jax.index import Flat
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import Full, Window
from alaya_jax.query.auto import Auto
from alaya_jax.query.plan import Attention, Plan, Plans, of_layer
from alaya_jax.session import Session

NAMES = ("full", *policies.NAMES, "auto")
"""What can be compared. "auto" keeps a share of the mass, with as many keys as that takes."""

WINDOW = Window(sink=16, recent=64)
"""Shorter than that of `Window()`, which would be a third of a text of 2,048 tokens."""

AUTO_RECOVERY = 0.95

_TUNED: Mapping[str, tuple[str, float, float]] = {
    "alayadb": ("beta", 0.0, 300.0),
    "recovery": ("recovery", 0.01, 0.9999),
}
"""Those that are not told how many keys: their setting, from what reads fewest keys to most."""

_HALVINGS = 8


@dataclasses.dataclass(frozen=True)
class Compared:
    """A policy as it is compared.

    Attributes:
      name: one of `NAMES`.
      settings: what it was told, such as {"keys": 208} or {"beta": 41.2}.
      attention: what `generate` takes.
    """

    name: str
    settings: dict[str, float]
    attention: Attention


def compared(name: str, config: LlamaConfig, settings: Mapping[str, float]) -> Compared:
    """A policy with the window that all of them have.

    Raises:
      RequestError: there is none of that name.
    """
    if name not in NAMES:
        raise RequestError(f"policy {name!r}: use some of {', '.join(NAMES)}")
    if name == "full":
        return Compared(name, {}, Full())
    if name == "auto":
        share = settings.get("recovery", AUTO_RECOVERY)
        return Compared(name, {"recovery": share}, Auto(recovery=share, window=WINDOW))
    given: dict[str, Any] = dict(settings)
    if "keys" in given:
        given["keys"] = int(given["keys"])
    if name == "recovery":
        given["tail"] = False  # which would read the mean of every page as well
    if name in ("retrieval_attention", "alayadb"):
        given["index"] = Flat()
    if name == "streaming_llm":
        longer = WINDOW.recent + given["keys"]
        return Compared(name, dict(settings), Window(WINDOW.sink, longer))
    return Compared(name, dict(settings), _windowed(policies.get(name)(config, **given)))


def keys_of(share: float, length: int, page_size: int) -> int:
    """Keys outside the window for a share of a text: whole pages, at least one."""
    return max(1, round(share * length / page_size)) * page_size


def settings_of(
    names: Sequence[str],
    sessions: Sequence[Session],
    share: float,
    on_step: Callable[[int], None] = lambda steps: None,
) -> dict[str, dict[str, float]]:
    """What each policy is told so that it reads about so many keys outside the window.

    Those that take no number of keys have theirs found by halving, in the mean over the layers and
    heads of the last token of each session. So sessions of texts that nothing is asked about later
    are right for it.

    Args:
      names: of policies.
      sessions: of about equal length, with something in the cache.
      share: of the keys of a session.
      on_step: called with the number of halvings done.
    """
    length = int(np.mean([session.length for session in sessions]))
    keys = keys_of(share, length, sessions[0].pool.page_size)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        if name not in _TUNED:
            found[name] = {} if name in ("full", "auto") else {"keys": keys}
            continue
        setting, low, high = _TUNED[name]
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            read = np.mean([_outside(name, {setting: middle}, session) for session in sessions])
            low, high = (middle, high) if read < keys else (low, middle)
            on_step(1)
        found[name] = {setting: round((low + high) / 2, 4)}
    return found


def steps_of(names: Sequence[str]) -> int:
    """How many halvings `settings_of` makes."""
    return _HALVINGS * sum(name in _TUNED for name in names)


def sparse_layers(plans: Plans, layers: int) -> list[int]:
    """Those that do not read every key."""
    return [i for i in range(layers) if not isinstance(of_layer(plans, i).query, Full)]


def _outside(name: str, settings: Mapping[str, float], session: Session) -> float:
    """Keys outside the window that a policy reads for a session's last token."""
    asked = compared(name, session.model.config, settings).attention
    plans = session.plans(asked, session.length + 1)
    attended = analyze(session.batch, plans, repeats=0).attended
    return float(attended.mean()) - WINDOW.sink - WINDOW.recent


def _windowed(attention: Any) -> Attention:
    """The same with the window of all."""
    if isinstance(attention, tuple):
        return tuple(_windowed(plan) for plan in attention)  # type: ignore[return-value]
    if isinstance(attention, Plan) and not isinstance(attention.query, Full):
        query: Any = attention.query
        return dataclasses.replace(attention, query=dataclasses.replace(query, window=WINDOW))
    return attention
