"""One question about one text, with its answers, and how an answer is judged."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Literal

from alaya_jax.errors import RequestError

Scorer = Literal["all", "any", "first"]
Count = Callable[[str], int]
"""Tokens of a text."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A question about a text.

    Attributes:
      task: its name.
      context: the text, and what stands before it. Items with equal contexts share its keys and
        values.
      question: what follows the context.
      opening: how the answer begins: it is put into the model's mouth.
      answers: what is looked for in what the model says.
      scorer: see `score`.
      most: tokens of an answer at most.
      depth: where in the context the answer stands, 0 to 1; None: not at one place.
    """

    task: str
    context: str
    question: str
    opening: str
    answers: tuple[str, ...]
    scorer: Scorer
    most: int
    depth: float | None = None

    @property
    def text(self) -> str:
        """All of it, for a model without a chat template."""
        return self.context + self.question + self.opening

    def score(self, said: str) -> float:
        """0 to 1, of what the model says behind the opening.

        "all" is the share of the answers that are found in it and "any" whether one is, both
        whatever the case (RULER's string_match_all and string_match_part); "first" is whether the
        first word is an answer.
        """
        return score(self.scorer, said, self.answers)


def score(scorer: Scorer, said: str, answers: Sequence[str]) -> float:
    """See `Item.score`."""
    low = said.lower()
    found = [answer.lower() in low for answer in answers]
    if scorer == "all":
        return sum(found) / len(found)
    if scorer == "any":
        return float(any(found))
    if scorer == "first":
        word = re.match(r"[^\w]*([\w.]*\w)?", low)
        return float(word is not None and word[1] in {answer.lower() for answer in answers})
    raise RequestError(f"scorer {scorer!r}: use 'all', 'any' or 'first'")


def too_short(task: str, length: int) -> RequestError:
    """The error of a length that holds no item."""
    return RequestError(f"{task}: no item of {length:,} tokens can be made; ask for more")
