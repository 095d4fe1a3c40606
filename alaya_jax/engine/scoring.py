"""How likely a model finds given texts behind given prompts."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from alaya_jax.db import DB
from alaya_jax.engine import Engine, Request, Result, in_order, prompt_ids
from alaya_jax.engine.running import Run
from alaya_jax.errors import RequestError
from alaya_jax.prefix import common_prefix
from alaya_jax.query.plan import Attention
from alaya_jax.settings import under_own_settings


class Score(NamedTuple):
    """Of one completion.

    Attributes:
      logprob: natural logarithm of the probability of all its tokens, one after another.
      is_greedy: whether each of them is the likeliest in its place.
      tokens: (id, logprob) of each.
    """

    logprob: float
    is_greedy: bool
    tokens: tuple[tuple[int, float], ...]


@under_own_settings
def score(
    db_or_engine: DB | Engine,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    attention: Attention | None = None,
) -> list[Score]:
    """How likely completions are behind their prompts; nothing is generated.

    What prompts have in common is computed once, if they are next to each other or stored.

    Args:
      db_or_engine: where it runs.
      prompts: see `Request.prompt`. The empty text is a prompt if the model puts a BOS in front.
      completions: one for each prompt: text or token ids. Where both are texts they are encoded
        together: a token that reaches over the border is one of the completion's.
      attention: what a completion's tokens ask of the keys; the prompt's ask all. Default `Full()`.

    Returns:
      a score for each, in their order.

    Raises:
      RequestError: numbers differ, or a prompt or completion has no tokens.
      AlayaError: see `Engine.submit`.
    """
    for name, given in (("prompts", prompts), ("completions", completions)):
        if isinstance(given, str):
            raise RequestError(f"score: {name} is one text; give a list of texts, one for each")
    if len(prompts) != len(completions):
        raise RequestError(
            f"score: {len(prompts)} prompts and {len(completions)} completions; give one for each"
        )
    with contextlib.ExitStack() as held:
        if isinstance(db_or_engine, DB):
            engine = held.enter_context(contextlib.closing(Engine(db_or_engine)))
        elif isinstance(db_or_engine, Engine):
            engine = db_or_engine
        else:
            raise RequestError(f"score({type(db_or_engine).__name__}): takes a DB or an Engine")
        pairs = [
            _ids(engine.db, prompt, completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        starts = (functools.partial(engine.start, _run(attention, *pair)) for pair in pairs)
        results = held.enter_context(contextlib.closing(in_order(starts)))
        return [_score(result, *pair) for result, pair in zip(results, pairs, strict=True)]


def _run(attention: Attention | None, ids: np.ndarray, at: int) -> Run:
    """What an engine is asked: nothing but the scores of the tokens from `at` on."""
    return Run(Request(ids, 0, attention, prompt_logprobs=True), ids, None, split=at, scored=at)


def _ids(db: DB, prompt: Any, completion: Any) -> tuple[np.ndarray, int]:
    """Ids of both, and how many are the prompt's."""
    first = prompt_ids(db, prompt)
    if type(prompt) is type(completion) is str:  # not what a template rendered
        both = prompt_ids(db, prompt + completion)
        at = common_prefix(first, both)
    else:
        if isinstance(completion, str):
            behind = db.model.encode(completion, add_special_tokens=False, allow_special=False)
        else:
            behind = db.model.check_tokens(completion)
        both, at = np.concatenate([first, behind]), len(first)
    if not 0 < at < len(both):
        raise RequestError(
            f"score: the prompt has {at} tokens and the completion {len(both) - at}; both need at "
            "least one"
        )
    return both, at


def _score(result: Result, ids: np.ndarray, at: int) -> Score:
    assert result.prompt_logprobs is not None
    assert result.prompt_alternatives is not None
    logprobs = [float(x) for x in result.prompt_logprobs[at:] if x is not None]
    likely = [best[0][0] for best in result.prompt_alternatives[at:] if best]
    own = ids[at:].tolist()
    return Score(sum(logprobs), likely == own, tuple(zip(own, logprobs, strict=True)))
