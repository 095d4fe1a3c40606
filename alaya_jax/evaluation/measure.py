"""What a policy answers to a question, and what it read for that, beside full attention."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from alaya_jax.evaluation.compared import sparse_layers
from alaya_jax.evaluation.tasks.item import Item
from alaya_jax.explain.analysis import analyze
from alaya_jax.generation import generate
from alaya_jax.query import Full
from alaya_jax.query.plan import Attention, Plans, same_plans
from alaya_jax.runtime.sampling.params import Greedy
from alaya_jax.session import Session

LOOKED_AT = 8
"""Tokens of full attention's answer whose distributions are compared, at most."""


class Expected(NamedTuple):
    """What full attention answers.

    Attributes:
      ids: of the answer; an end of the text where it says nothing else.
      logprobs: float32 [n, V], of the distributions of its first tokens.
    """

    ids: list[int]
    logprobs: np.ndarray


@dataclasses.dataclass
class Measured:
    """One question under one policy.

    Attributes:
      said: the answer.
      score: see `Item.score`.
      keys: keys attended to, in the mean over the answer's tokens, the heads, and the layers that
        the policy makes sparse (all of them, where it makes none).
      keys_all: the same over all layers.
      visible: keys that there were.
      mass, error: [L][H], of the first token of the answer: the share of the attention mass that
        was read, and |out - full| / |full| of the attention's output.
      kl: of the first tokens, each given full attention's answer so far: how far the distribution
        is from full attention's, nats.
      top1: share of them whose likeliest token is full attention's.
      seconds: that the answer took.
    """

    said: str
    score: float
    keys: float
    keys_all: float
    visible: float
    mass: list[list[float]]
    error: list[list[float]]
    kl: list[float]
    top1: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


class Asked:
    """A question whose prompt is in the cache, but for its last token, by full attention.

    Args:
      session: with nothing but that in its cache; it stays as it is.
      last: the last token of the prompt.
      item: which is asked.
    """

    def __init__(self, session: Session, last: int, item: Item):
        self._session, self._last, self._item = session, np.asarray([last], np.int32), item
        self._whole = session.fork()
        self._whole.prefill(self._last)
        self._answered: list[tuple[Plans, _Answer]] = []
        self._measured: list[tuple[Plans, Measured]] = []

    def close(self) -> None:
        """Gives its pages back."""
        self._whole.close()

    def expected(self) -> Expected:
        """What full attention answers."""
        plans = self._plans(Full())
        ids = self._answer(plans).ids[:LOOKED_AT] or list(self._session.model.eos_ids[:1])
        return Expected(ids, self._logprobs(ids, plans))

    def under(self, attention: Attention, expected: Expected) -> Measured:
        """What a policy answers. It chooses the keys from the first token of the answer on.

        Where it comes to plans that were measured already, it is not asked again: `Auto` often
        chooses to read every key of a short text.
        """
        plans = self._plans(attention)
        return _once(self._measured, plans, lambda: self._measure(plans, expected))

    def _measure(self, plans: Plans, expected: Expected) -> Measured:
        answer = self._answer(plans)
        analysis = analyze(self._whole.batch, plans, repeats=0)
        logprobs = self._logprobs(expected.ids, plans)
        want = expected.logprobs.astype(np.float64)
        kl = np.sum(np.exp(want) * (want - logprobs.astype(np.float64)), axis=-1)
        attended = answer.attended
        layers = len(attended)
        sparse = sparse_layers(plans, layers) or list(range(layers))
        return Measured(
            said=answer.said,
            score=self._item.score(answer.said),
            keys=float(attended[sparse].mean()),
            keys_all=float(attended.mean()),
            visible=answer.visible,
            mass=np.round(analysis.recovery, 5).tolist(),
            error=np.round(analysis.error, 5).tolist(),
            kl=np.round(np.maximum(kl, 0.0), 7).tolist(),
            top1=float(np.mean(logprobs.argmax(-1) == want.argmax(-1))),
            seconds=round(answer.seconds, 3),
        )

    def _plans(self, attention: Attention) -> Plans:
        return self._whole.plans(attention, self._whole.length + self._item.most)

    def _answer(self, plans: Plans) -> "_Answer":
        return _once(self._answered, plans, lambda: self._generated(plans))

    def _generated(self, plans: Plans) -> "_Answer":
        with self._session.fork() as fork:
            started = time.perf_counter()
            run = generate(
                fork,
                self._last,
                max_new_tokens=self._item.most,
                attention=plans,
                prefill=plans,
                sampling=Greedy(),
            )
            said = "".join(token.text for token in run)
            seconds = time.perf_counter() - started
            reads = fork.account.reads
            phases = [reads[name] for name in ("prefill", "decode") if name in reads]
            tokens = sum(phase.queries for phase in phases)
            attended = sum(phase.mean("attended") * phase.queries for phase in phases) / tokens
            visible = sum(phase.visible for phase in phases) / tokens
        return _Answer(list(run.ids[0]), said, seconds, np.asarray(attended), visible)

    def _logprobs(self, ids: list[int], plans: Plans) -> np.ndarray:
        """Log-probabilities [n, V] of all tokens in the places of `ids`, behind the prompt."""
        made: list[Any] = []
        with self._session.fork() as fork:
            rows = fork.rows(np.concatenate([self._last, np.asarray(ids[:-1], np.int32)]))
            fork.batch.make_room([len(ids)], plans)
            passed, _ = fork.batch.feed(
                rows, plans, lambda *args: None, on_output=lambda x, fed: made.append(x)
            )
            (x,) = made  # so few tokens are one chunk
            logits = fork.batch.stack.logits(dataclasses.replace(passed, last=x[0]))
        logits = np.asarray(logits)[: len(ids)].astype(np.float32)
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def _once[T](known: list[tuple[Plans, T]], plans: Plans, find: Callable[[], T]) -> T:
    """What is known of equal plans; else it is found, and known."""
    for others, found in known:
        if same_plans(others, plans):
            return found
    known.append((plans, find()))
    return known[-1][1]


class _Answer(NamedTuple):
    """An answer; of its tokens, in the mean, keys attended to [L, H] and those there were."""

    ids: list[int]
    said: str
    seconds: float
    attended: np.ndarray
    visible: float
