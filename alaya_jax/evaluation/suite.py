"""What is asked in a run: items of several tasks and lengths, and their prompts."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alaya_jax import prompts
from alaya_jax.errors import RequestError
from alaya_jax.evaluation.tasks import legal, retrieval, ruler
from alaya_jax.evaluation.tasks.item import Count, Item
from alaya_jax.model import Model
from alaya_jax.prefix import common_prefix

_TEMPLATE_ROOM = 96
"""Tokens of a chat template around an item."""

HELD_OUT = 9_999
"""Seed of the texts that policies' settings are found on; nothing is asked about them."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """What a run asks.

    Attributes:
      name: for people.
      lengths: tokens of an item and its answer, at most.
      ruler: tasks of RULER, each with this many texts at each length.
      passkey, key_values, legal: texts of each at each length.
      questions: asked about a text of these three.
    """

    name: str
    lengths: tuple[int, ...]
    ruler: tuple[tuple[str, int], ...]
    passkey: int
    key_values: int
    legal: int
    questions: int

    def at(self, length: int) -> "Suite":
        """The same up to a length.

        Raises:
          RequestError: none is left.
        """
        lengths = tuple(n for n in self.lengths if n + _TEMPLATE_ROOM <= length)
        if not lengths:
            raise RequestError(
                f"suite {self.name}: its shortest items have {min(self.lengths):,} tokens, and the "
                f"model takes {length:,}"
            )
        return dataclasses.replace(self, lengths=lengths)


SUITES = {
    "quick": Suite(
        name="quick",
        lengths=(2400, 3900),  # whose programs are the same
        ruler=(("niah_single_1", 1), ("niah_single_2", 1)),
        passkey=1,
        key_values=0,
        legal=1,
        questions=3,
    ),
    "full": Suite(
        name="full",
        lengths=(4096, 8000, 16384, 32768, 65536, 131072),
        ruler=tuple((task, 10) for task in ruler.NAMES),
        passkey=4,
        key_values=4,
        legal=8,
        questions=6,
    ),
}


class Source(NamedTuple):
    """Where texts come from that this library does not have.

    Attributes:
      legal: a directory of *.LICENSE files; None: no legal questions.
      essay: text for the needles of some of RULER's tasks; "" leaves these out.
      squad, hotpotqa: files for two more of them; None leaves these out.
    """

    legal: Path | None = None
    essay: str = ""
    squad: Path | None = None
    hotpotqa: Path | None = None


@dataclasses.dataclass(frozen=True)
class Text:
    """One context, and all that is asked about it.

    Attributes:
      name: of it in a run.
      length: tokens that were asked for.
      items: with the same context.
    """

    name: str
    length: int
    items: tuple[Item, ...]


def texts(suite: Suite, model: Model, source: Source, seed: int) -> list[Text]:
    """All that a suite asks of a model, shortest texts first. Equal seeds make equal texts.

    Raises:
      TokenizerError: the model has no tokenizer.
      RequestError: a text cannot be made.
    """
    count = _count_of(model)
    made = ruler.Source(count, essay=source.essay, squad=source.squad, hotpotqa=source.hotpotqa)
    found: list[Text] = []

    def add(kind: str, length: int, number: int, items: Sequence[Item]) -> None:
        found.append(Text(f"{kind}-{length}-{number}", length, tuple(items)))

    def several(kind: str, make: Callable[..., list[Item]], number: int, length: int) -> None:
        """Texts with several questions each."""
        for i in range(number):
            add(kind, length, i, make(count, length, suite.questions, seed + i))

    for length in suite.lengths:
        several("passkey", retrieval.passkey, suite.passkey, length)
        several("kv", retrieval.key_values, suite.key_values, length)
        for task, number in suite.ruler:
            if made.has(task):
                for i, item in enumerate(ruler.items(task, made, length, number, seed)):
                    add(task, length, i, [item])
        if source.legal is not None:
            several("legal", functools.partial(legal.items, source.legal), suite.legal, length)
    return found


def held_out(model: Model, length: int, seed: int = HELD_OUT) -> list[Item]:
    """Questions about a text of its own, on which settings are found."""
    return retrieval.passkey(_count_of(model), length, 3, seed)


def _count_of(model: Model) -> Count:
    tokenizer = prompts.tokenizer_of(model)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False, allow_special=False)
    return lambda text: len(encode(text))


def digest(asked: list[Text]) -> str:
    """By which two runs know whether they ask the same."""
    rows = [dataclasses.asdict(item) for text in asked for item in text.items]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def prompt_ids(model: Model, item: Item) -> np.ndarray:
    """Ids of an item's prompt, int32 [n]: a user's message and the beginning of the answer; the
    bare text, where the model has no chat template.
    """
    tokenizer = prompts.tokenizer_of(model)
    if tokenizer.chat is None:
        return tokenizer.encode(item.text, allow_special=False)
    asked = [{"role": "user", "content": item.context + item.question}]
    ids = prompts.prompt(tokenizer, asked, None, None).ids
    opening = item.opening.lstrip()  # the template's own white space stands in front
    behind = tokenizer.encode(opening, add_special_tokens=False, allow_special=False)
    return np.concatenate([ids, behind])


def shared_ids(rows: list[np.ndarray]) -> np.ndarray:
    """Ids that prompts about one text have in common: their text, and what stands before it."""
    if len(rows) == 1:
        return rows[0][: max(1, len(rows[0]) - 64)]
    shared = min(common_prefix(one, other) for one, other in itertools.pairwise(rows))
    return rows[0][: max(1, min(shared, *(len(row) - 2 for row in rows)))]
