"""What one sequence may ask about the choice of its tokens; `sampler` does it."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from alaya_jax.errors import RequestError
from alaya_jax.runtime.sampling.constraint import Constraint

# Field: (lowest, highest, what is allowed in words). Zero temperature is let through apart.
_FLOATS = {
    "temperature": (1e-5, 1e5, "0 (greedy) or 1e-5 to 1e5"),
    "top_p": (1e-6, 1.0, "1e-6 to 1 (1 keeps all)"),
    "min_p": (0.0, 1.0, "0 to 1 (0 keeps all)"),
    "repetition_penalty": (1e-5, 1e5, "1e-5 to 1e5 (1 changes nothing)"),
    "presence_penalty": (-2.0, 2.0, "-2 to 2 (0 changes nothing)"),
    "frequency_penalty": (-2.0, 2.0, "-2 to 2 (0 changes nothing)"),
}
_INTS = {
    "top_k": (0, 2**31 - 1, "0 (keeps all) or a count of tokens"),
    "seed": (0, 2**32 - 1, "0 to 2**32 - 1"),
    "logprobs": (0, 2**31 - 1, "0 or a count of alternatives"),
    "min_tokens": (0, 2**31 - 1, "0 or a count of tokens"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Sampling:
    """How the tokens of one sequence are chosen.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches p, after top-k
        (Holtzman et al., 2020, section 3.1).
      min_p: keep tokens at least min_p times as likely as the most likely (Nguyen et al., 2024).
      repetition_penalty: positive logits of tokens in the prompt or the output are divided by it,
        negative ones multiplied (Keskar et al., 2019, section 4.1).
      presence_penalty: subtracted once from the logit of every token already in the output.
      frequency_penalty: subtracted once per occurrence in the output.
      logit_bias: added to the logits of these ids; `-inf` forbids a token. A mapping is stored as
        a sorted tuple of pairs, so that a `Sampling` stays hashable.
      seed: seed of the sequence. Equal seeds and logits give equal tokens.
      logprobs: how many of the most likely alternatives to report with each token.
      stop: strings that end the output; the string itself is not part of it.
      stop_ids: token ids that end the output.
      ignore_eos: do not stop at the model's end-of-sequence tokens.
      min_tokens: so many tokens come before one that ends the output, or a stop string that does.
      constraint: what the output's text must be; an id that ends it comes only where the text is
        complete, and comes then, if nothing else can follow, whatever `min_tokens` says. What is
        cut off, by `stop` or by its length, is the beginning of such a text.

    Raises:
      RequestError: a value is of a wrong type or out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    constraint: Constraint | None = None

    def __post_init__(self):
        def put(name: str, value: Any):
            object.__setattr__(self, name, value)

        for name, (low, high, allowed) in _FLOATS.items():
            value = getattr(self, name)
            if not _is(value, numbers.Real):
                raise refused(name, value, f"a number, {allowed}")
            if not (low <= value <= high or (name == "temperature" and value == 0)):
                raise refused(name, value, allowed)
            put(name, float(value))
        for name, (low, high, allowed) in _INTS.items():
            value = getattr(self, name)
            if not (_is(value, numbers.Integral) and low <= value <= high):
                raise refused(name, value, f"a whole number, {allowed}")
            put(name, int(value))
        if not isinstance(self.ignore_eos, bool):
            raise refused("ignore_eos", self.ignore_eos, "True or False")
        put("logit_bias", _bias_pairs(self.logit_bias))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not (isinstance(stop, Sequence) and all(isinstance(s, str) and s for s in stop)):
            raise refused("stop", stop, "a list of strings that are not empty")
        put("stop", tuple(stop))
        ids = self.stop_ids
        if not (
            isinstance(ids, Sequence) and all(_is(i, numbers.Integral) and i >= 0 for i in ids)
        ):
            raise refused("stop_ids", ids, "a list of token ids")
        put("stop_ids", tuple(int(i) for i in ids))
        if not isinstance(self.constraint, Constraint | None):
            raise refused("constraint", self.constraint, "an aj.Constraint(...)")

    def __repr__(self) -> str:
        said = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        )
        return f"Sampling({', '.join(said)})"

    def end_ids(self, eos_ids: Sequence[int]) -> tuple[int, ...]:
        """The ids that end this sequence's output, given the model's end-of-sequence ids."""
        return tuple(sorted({*self.stop_ids, *(() if self.ignore_eos else eos_ids)}))

    def require_fits(self, max_new_tokens: int) -> None:
        """Raises RequestError where the output must be longer than it may be."""
        if self.min_tokens > max_new_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} and max_new_tokens={max_new_tokens} contradict"
            )

    @property
    def is_masked(self) -> bool:
        """Whether, for a next token, not all ids are allowed."""
        ends = bool(self.stop_ids) or not self.ignore_eos
        return self.constraint is not None or (self.min_tokens > 0 and ends)


def Greedy(**controls: Any) -> Sampling:
    """The most likely token at each step: `Sampling(temperature=0, **controls)`."""
    return Sampling(temperature=0.0, **controls)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def refused(name: str, value: Any, allowed: str) -> RequestError:
    """The error that names a setting, its value, and what is allowed."""
    return RequestError(f"sampling: {name}={value!r} is not allowed; use {allowed}")


def _bias_pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    allowed = "a mapping of token id to a number from -3e38 to 3e38 or -inf, each id once"
    try:
        pairs = [(i, b) for i, b in (bias.items() if isinstance(bias, Mapping) else bias)]
    except (TypeError, ValueError) as error:
        raise refused("logit_bias", bias, allowed) from error
    for i, b in pairs:
        # Beyond that a float32 is infinite, or turns so with a logit added.
        if not (_is(i, numbers.Integral) and i >= 0 and _is(b, numbers.Real)) or not (
            -3e38 <= b <= 3e38 or b == -math.inf
        ):
            raise refused("logit_bias", {i: b}, allowed)
    if len({i for i, _ in pairs}) != len(pairs):
        raise refused("logit_bias", bias, allowed)
    return tuple(sorted((int(i), float(b)) for i, b in pairs))


_REMEMBERED = 4096
"""Characters of a text that a later call's stop string may have begun in."""


class StopText:
    """Cuts streamed text at the first stop string, however the text is split into pieces.

    The string that is complete first wins, and of two complete at once the longer.

    Args:
      stop: the strings.
      given: the end of the text so far, which the reader has already.
      held: text behind it that the reader has not.
    """

    def __init__(self, stop: Sequence[str], given: str = "", held: str = ""):
        self.stop = tuple(stop)
        self.stopped = False
        self._longest = max((len(s) - 1 for s in self.stop), default=0)
        self._given = given  # as much as a stop string may have begun in
        self._held = held  # may turn out to be the start of a stop string

    def going_on(self, stop: Sequence[str]) -> "StopText":
        """The same text with other stop strings from here on."""
        return StopText(stop, self._given, self._held)

    def put(self, text: str) -> str:
        """Takes the next piece; returns what is now known to be part of the output."""
        if self.stopped:
            return ""
        # A string that is complete in what was given was none of its call's.
        before = self._given[len(self._given) - min(len(self._given), self._longest) :]
        text = before + self._held + text
        starts = [(s, max(0, len(before) - len(s) + 1)) for s in self.stop]
        found = [(at + len(s), at) for s, i in starts if (at := text.find(s, i)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[len(before) : max(len(before), min(found)[1])]
        ends = (text[-n:] for n in range(min(self._longest, len(text)), 0, -1))
        end = next((e for e in ends if any(s.startswith(e) for s in self.stop)), "")
        new = text[len(before) :]
        self._held = end[max(0, len(end) - len(new)) :]
        return self._give(new[: len(new) - len(self._held)])

    def flush(self) -> str:
        """What was held back, once the text has ended."""
        held, self._held = self._held, ""
        return self._give(held)

    def _give(self, text: str) -> str:
        self._given = (self._given + text)[-_REMEMBERED:]
        return text
