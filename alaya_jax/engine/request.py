"""What an engine is asked, and what it answers."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from alaya_jax.errors import RequestError
from alaya_jax.generation import Token
from alaya_jax.query.plan import Attention
from alaya_jax.runtime.sampling.params import Greedy, Sampling

FinishReason = Literal["eos", "stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt that is to be continued.

    Attributes:
      prompt: text, in which nothing is a control token; what a chat template rendered; messages of
        a chat, `[{"role": ..., "content": ...}]`; or token ids [n].
      max_new_tokens: at most so many; 0 with `prompt_logprobs` only.
      attention: what decoding asks of the keys; default `Full()`.
      prefill: what prefill asks of the keys; default `Full()`, or what `attention=Auto(...)` says.
      sampling: how tokens are chosen.
      prompt_logprobs: also the log-probability of each of the prompt's tokens given those before
        it. All of the prompt is computed then, whatever is known of it.
      cache_salt: with one, what is computed is shared with requests of the same salt only, and
        nothing is taken from stored contexts.

    Raises:
      RequestError: a setting is none of these.
    """

    prompt: Any
    max_new_tokens: int = 256
    attention: Attention | None = None
    prefill: Attention | None = None
    sampling: Sampling = dataclasses.field(default_factory=Greedy)
    prompt_logprobs: bool = False
    cache_salt: str = ""

    def __post_init__(self):
        if not isinstance(self.prompt_logprobs, bool):
            raise RequestError(f"prompt_logprobs={self.prompt_logprobs!r}: write True or False")
        if not isinstance(self.cache_salt, str):
            raise RequestError(f"cache_salt={self.cache_salt!r}: must be a text")
        least = 0 if self.prompt_logprobs else 1
        most = self.max_new_tokens
        if not isinstance(most, int | np.integer) or isinstance(most, bool) or most < least:
            raise RequestError(
                f"max_new_tokens={most!r}: must be a count, at least 1, or 0 with "
                "prompt_logprobs=True"
            )
        if not isinstance(self.sampling, Sampling):
            raise RequestError(
                f"sampling={self.sampling!r}: use aj.Greedy() or aj.Sampling(temperature=...)"
            )
        self.sampling.require_fits(int(most))


@dataclasses.dataclass(frozen=True)
class Times:
    """Wall times of a request, seconds.

    Attributes:
      queued_s: from `submit` until it was first given pages.
      first_token_s: from `submit` to its first token; None: there was none.
      decode_s: from the first token to the last.
      total_s: from `submit` to its end.
    """

    queued_s: float
    first_token_s: float | None
    decode_s: float
    total_s: float


Likely = tuple[tuple[int, float], ...]
"""Token ids and log-probabilities, the likeliest first."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a request.

    Attributes:
      index: its number among the engine's requests, from 0.
      prompt_tokens: n, of its prompt.
      ids: of the new tokens, without one that ends the text.
      text: what they say, up to a stop string.
      tokens: as they came; see `Token`.
      finish_reason: "eos" (or another of the ids that end it), "stop" (a stop string), "length", or
        "cancelled".
      cached_tokens: of the prompt, those that were not computed for it: they came from a stored
        context or from another request.
      keys_read: keys that decoding attended to, in the mean over its tokens, layers and heads; NaN
        where it chose one token or none.
      timing: see `Times`.
      programs: how many were compiled, or read from disk, while it waited for them.
      prompt_logprobs: of each of the prompt's tokens given those before it, natural logarithms;
        None for the first, which follows nothing. None where they were not asked for.
      prompt_alternatives: beside each the likeliest (id, logprob) in its place, one, or as many as
        `Sampling.logprobs` asks for.
    """

    index: int
    prompt_tokens: int
    ids: tuple[int, ...]
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    cached_tokens: int
    keys_read: float
    timing: Times
    programs: int
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_alternatives: tuple[Likely | None, ...] | None = None


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What an engine does at the moment, and has done.

    Attributes:
      slots: requests that may run at once.
      running: requests that have pages.
      prefilling: of these, whose prompt is not read to its end.
      waiting: requests that have none.
      requests: that were taken so far; finished, failed: of these.
      pages: of the pool, P without those that belong to nobody.
      pages_free: that nobody holds.
      pages_requests: held by requests, pages that several share counted once.
      pages_contexts: held by stored contexts in memory, and by no request.
      pages_others: held by sessions beside the engine. Free and held are all.
      tokens_prefilled: that the model was run over before it chose one, computed again ones too.
      tokens_reused: of prompts, that were not computed.
      tokens_generated: that were chosen.
      preemptions: how often a request had to leave its pages to others.
      steps: of decoding, of a group each.
      programs: that were compiled, or read from disk, for all of it.
    """

    slots: int
    running: int
    prefilling: int
    waiting: int
    requests: int
    finished: int
    failed: int
    pages: int
    pages_free: int
    pages_requests: int
    pages_contexts: int
    pages_others: int
    tokens_prefilled: int
    tokens_reused: int
    tokens_generated: int
    preemptions: int
    steps: int
    programs: int


def scored(scores: Sequence[tuple[int, int, Any]], n: int) -> tuple[Any, Any]:
    """Log-probabilities and likeliest tokens of a prompt of n tokens, in Python's numbers.

    Args:
      scores: see `Job.scores`.
      n: of the prompt.
    """
    own: list[float | None] = [None] * n
    best: list[Likely | None] = [None] * n
    for first, count, (logprob, ids, logprobs) in scores:
        columns = (np.asarray(x)[0, :count].tolist() for x in (logprob, ids, logprobs))
        for i, (mine, likely, their) in enumerate(zip(*columns, strict=True), start=first):
            own[i], best[i] = mine, tuple(zip(likely, their, strict=True))
    return tuple(own), tuple(best)
