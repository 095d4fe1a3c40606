"""What a decoder is asked for one sequence, and how far it is: all that outlives its pages."""

import dataclasses
import functools
from typing import Any

import numpy as np

from alaya_jax.query.origin import Origin, Way
from alaya_jax.query.plan import Plans
from alaya_jax.runtime.sampling.constraint import Allowed
from alaya_jax.runtime.sampling.params import Sampling


@dataclasses.dataclass(eq=False)
class Job:
    """One sequence that is to be decoded.

    Attributes:
      prompt: ids that are given, int32 [n], n >= 1.
      attention, prefill: what decoding and the prefill ask of the keys.
      sampling: how its tokens are chosen.
      end_ids: ids that end it.
      most: new tokens at most; 0: the prompt is only scored.
      split: of the prompt's tokens the first so many are answered by `prefill`, the rest by
        `attention`, as if it had been generated.
      allowed: which ids may come next; None: all.
      scored: the first of the prompt's tokens whose log-probability is wanted; 0: of none.
      salt: only jobs of the same one share pages.
      generated: its new tokens so far.
      scores: what was scored: first token, how many, and device arrays (see `Stack.scores`).
      reused: tokens that were not computed for it when it first came in; None: it did not yet.
      prefilled: tokens that the model was run over before it decoded, all times together.
      attended: keys that decoding attended to, of a layer and head, in the mean of both.
      programs: that were compiled while it waited for them.
    """

    prompt: np.ndarray
    attention: Plans
    prefill: Plans
    sampling: Sampling
    end_ids: tuple[int, ...]
    most: int
    split: int
    allowed: Allowed | None = None
    scored: int = 0
    salt: str = ""
    generated: list[int] = dataclasses.field(default_factory=list)
    scores: list[tuple[int, int, Any]] = dataclasses.field(default_factory=list)
    reused: int | None = None
    prefilled: int = 0
    attended: float = 0.0
    programs: int = 0

    @property
    def row(self) -> np.ndarray:
        """Ids of all tokens that are in the cache before its next token is chosen or fed."""
        made = np.asarray(self.generated[:-1], np.int32)
        return np.concatenate([self.prompt, made]) if len(made) else self.prompt

    @property
    def total(self) -> int:
        """Tokens that are ever in the cache: the last one that is chosen is never fed."""
        return len(self.prompt) + max(self.most - 1, 0)

    @property
    def reusable(self) -> int:
        """Of `row`, tokens that need not be computed for it: whatever was computed elsewhere, the
        last one's output is wanted, and that of each token before one that is scored.
        """
        if self.scored and not self.generated:
            return self.scored - 1
        return len(self.row) - 1 if not self.generated else len(self.row)

    @functools.cached_property
    def ways(self) -> tuple[Way, Way]:
        """Of the prefill and of decoding."""
        return Way.of(self.prefill), Way.of(self.attention)

    @functools.cached_property
    def origin(self) -> Origin:
        """How its keys and values are computed, to the last token that may come."""
        prefill, attention = self.ways
        return Origin().then(0, self.split, prefill).then(self.split, self.total, attention)
