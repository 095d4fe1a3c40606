"""A model under one plan, as a test harness asks it: token ids in, numbers and texts out."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alaya_jax.engine import Engine, Request
from alaya_jax.engine.scoring import score
from alaya_jax.errors import RequestError
from alaya_jax.query.plan import Attention
from alaya_jax.runtime.sampling.params import Sampling

_log = logging.getLogger(__name__)

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks have for the most tokens of an answer; of several the first counts."""

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """What a task asks of an answer.

    Attributes:
      most: tokens of it at most.
      sampling: how they are chosen, and the strings that end it.
    """

    most: int
    sampling: Sampling

    @classmethod
    def of(cls, settings: Mapping[str, Any], most: int) -> "AnswerSettings":
        """From the settings that tasks write (`generation_kwargs` of lm-eval).

        Args:
          settings: `until`, `do_sample`, `temperature` and the like; None is as if not said.
          most: tokens, where they do not say.

        Raises:
          RequestError: one is out of range, or is nothing that can be done here.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        until = given.pop("until", ())
        stop = [until] if isinstance(until, str) else list(until)
        lengths = [given.pop(name, None) for name in _LENGTHS]
        most = next((n for n in lengths if n is not None), most)
        greedy = not given.pop("do_sample", given.get("temperature", 0) > 0)
        chosen = {name: given.pop(name) for name in _SAMPLING if name in given}
        if greedy:  # whatever else says how draws would be made
            chosen = {k: v for k, v in chosen.items() if k == "repetition_penalty"}
            chosen["temperature"] = 0.0
        if given.pop("num_beams", 1) != 1:
            raise RequestError("num_beams: beams are not searched here; leave it out, or set 1")
        if given:
            known = ("until", "do_sample", *_LENGTHS, *_SAMPLING)
            raise RequestError(
                f"generation settings {', '.join(sorted(given))}: not known; use {', '.join(known)}"
            )
        return cls(most, Sampling(stop=tuple(s for s in stop if s), **chosen))


class Answering:
    """Scores and continues sequences of token ids through an engine, under one plan.

    What is longer than the model takes loses its beginning, and a warning says how many did.

    Args:
      engine: where it runs.
      attention: what an answer's tokens ask of the keys; a prompt's ask all. None: `Full()`.
      max_length: tokens of prompt and answer at most; None: as many as the model takes.

    Raises:
      RequestError: the model does not take so many.
    """

    def __init__(
        self, engine: Engine, attention: Attention | None = None, max_length: int | None = None
    ):
        limit = min(engine.db.model.length_limit, engine.db.pool.capacity_tokens)
        if max_length is not None and not 2 <= max_length <= limit:
            raise RequestError(
                f"max_length={max_length}: from 2 to {limit:,}, which the model and the memory "
                "for keys and values take"
            )
        self.engine = engine
        self.attention = attention
        self.max_length = limit if max_length is None else max_length

    def scores(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """How likely completions are behind their prompts.

        Args:
          pairs: ids of a prompt and of what follows, both at least one token.

        Returns:
          of each the log-probability (natural) of what follows, and whether greedy decoding says
          it.

        Raises:
          RequestError: one is empty, or what follows leaves no room for a token in front of it.
        """
        cut, prompts, completions = 0, [], []
        for prompt, completion in pairs:
            room = self.max_length - len(completion)
            if room < 1:
                raise RequestError(
                    f"a completion of {len(completion):,} tokens does not fit behind a prompt into "
                    f"{self.max_length:,}"
                )
            cut += len(prompt) > room
            prompts.append(list(prompt[-room:]))
            completions.append(list(completion))
        self._say_cut(cut, len(pairs))
        # Those that begin alike one behind the other: what they share is computed once.
        order = sorted(range(len(pairs)), key=lambda i: prompts[i])
        found = score(
            self.engine,
            [prompts[i] for i in order],
            [completions[i] for i in order],
            attention=self.attention,
        )
        by_place = {i: (one.logprob, one.is_greedy) for i, one in zip(order, found, strict=True)}
        return [by_place[i] for i in range(len(pairs))]

    def rolling(self, ids: Sequence[int], first: int) -> float:
        """The log-probability of a whole text, each of its tokens given those before it.

        A text longer than the model is read in windows: each but the first begins with one token of
        the one before, but for the last, which is as long as the others and scores what is left.

        Args:
          ids: of the text.
          first: the token in front of it, that its first one follows.
        """
        return sum(one for one, _ in self.scores(list(self._windows(ids, first))))

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        asked: Sequence[AnswerSettings],
        *,
        progress: bool = False,
    ) -> list[str]:
        """What the model says behind prompts, up to a stop string, an end of text or the length.

        Raises:
          RequestError: an answer may be so long that no room is left for a prompt.
        """
        cut, requests = 0, []
        for ids, wanted in zip(prompts, asked, strict=True):
            room = self.max_length - wanted.most
            if room < 1:
                raise RequestError(
                    f"an answer of {wanted.most:,} tokens leaves no room for a prompt in "
                    f"{self.max_length:,}; ask for fewer (max_gen_toks), or raise max_length"
                )
            cut += len(ids) > room
            requests.append(
                Request(list(ids[-room:]), wanted.most, self.attention, sampling=wanted.sampling)
            )
        self._say_cut(cut, len(requests))
        return [result.text for result in self.engine.run(requests, progress=progress)]

    def _windows(self, ids: Sequence[int], first: int) -> Iterator[tuple[list[int], list[int]]]:
        """(before, scored) of each window; together they are at most `max_length`."""
        size = self.max_length - 1
        done = min(size, len(ids))
        if done:
            yield [first], list(ids[:done])
        while done < len(ids):
            end = min(done + size, len(ids))
            yield list(ids[end - size - 1 : done]), list(ids[done:end])
            done = end

    def _say_cut(self, cut: int, count: int) -> None:
        if cut:
            _log.warning(
                "%d of %d prompts are longer than max_length=%d allows; they lost their beginning",
                cut,
                count,
                self.max_length,
            )
