"""RULER's thirteen tasks (arXiv 2404.06654), made by seed at any length.

The formats, sizes, random draws and their order are those of RULER's published generators, so that
with the same words, essays, sentence splitter and tokenizer the items are the same, character by
character (tests/evaluation/test_ruler.py compares them). By default the words are this library's
own, and the essays are what the caller gives.
"""

import dataclasses
import itertools
import json
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alaya_jax.errors import RequestError
from alaya_jax.evaluation.tasks.item import Count, Item, too_short
from alaya_jax.evaluation.tasks.vocabulary import Words, own

SEED = 42
"""Of the published generators."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40))]


class Needles(NamedTuple):
    """A variant of the needle in a haystack.

    Attributes:
      haystack: "repeat" (one sentence again and again), "essay", or "needle" (other needles).
      keys, values: what they are made of, "words", "numbers" or "uuids".
      num_keys, num_values, num_queries: keys in the text, values of each, and keys asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NIAH = {
    "niah_single_1": Needles("repeat"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_keys=4, num_queries=4),
}
NAMES = (*NIAH, "vt", "cwe", "fwe", "qa_1", "qa_2")


@dataclasses.dataclass(frozen=True)
class Source:
    """What items are made from.

    Attributes:
      count: tokens of a text.
      words: for keys, and the lists of "cwe".
      essay: the haystack of some tasks; its white space is made single spaces.
      sentences: splits it.
      squad, hotpotqa: files with the questions of "qa_1" and "qa_2", as they are published.
    """

    count: Count
    words: Words = dataclasses.field(default_factory=own)
    essay: str = ""
    sentences: Callable[[str], Sequence[str]] = lambda text: re.split(r"(?<=[.!?]) +", text)
    squad: Path | None = None
    hotpotqa: Path | None = None

    def has(self, task: str) -> bool:
        """Whether there is what a task is made from."""
        if task in NIAH:
            return bool(self.essay) or NIAH[task].haystack != "essay"
        return {"qa_1": self.squad, "qa_2": self.hotpotqa}.get(task, Path()) is not None


def items(task: str, source: Source, length: int, number: int, seed: int = SEED) -> Iterator[Item]:
    """The first items of a task.

    Args:
      task: one of `NAMES`.
      source: what they are made from.
      length: tokens of an item and its answer at most; they come close to it.
      number: of items.
      seed: of the draws.

    Raises:
      RequestError: there is no such task, something it is made from is missing, or the length holds
        no item.
    """
    if task not in NAMES:
        raise RequestError(f"task {task!r}: use one of {', '.join(NAMES)}")
    if not source.has(task):
        what = {"qa_1": "squad=FILE", "qa_2": "hotpotqa=FILE"}.get(task, "essay=TEXT")
        raise RequestError(f"{task}: what it is made from is missing; give Source({what})")
    if task in NIAH:
        makes: _Task = _Niah(task, source, length, seed)
    elif task == "vt":
        makes = _Variables(source, length, seed)
    elif task == "cwe":
        makes = _CommonWords(source, length, seed)
    elif task == "fwe":
        makes = _FrequentWords(source, length, seed)
    else:
        read = _read_squad if task == "qa_1" else _read_hotpotqa
        makes = _Questions(task, source, length, seed, read)
    return (makes.item(index) for index in range(number))


class _Task:
    """Finds the size that comes close to a length, then makes items of it."""

    name: str
    most: int
    step = 10
    largest = math.inf

    def __init__(self, source: Source, length: int, seed: int):
        self.source, self.length, self.seed = source, length, seed
        self.random = random.Random(seed)
        self.extra = 0
        """Tokens of what every item has in front."""
        self.size = 0

    def make(self, size: int, index: int) -> Item:
        """An item of a size, in whatever is counted: sentences, words, documents."""
        raise NotImplementedError

    def ending(self, item: Item) -> str:
        """What is counted as an answer while the size is looked for."""
        return " ".join(item.answers)

    def room(self, item: Item, ending: str = "") -> int:
        """Tokens of it and of its answer."""
        return self.source.count(item.text + ending) + self.most + self.extra

    def find_size(self, stops_before_growing: bool = False) -> None:
        """The largest size that fits; by steps, as RULER does it."""
        size, used = self.step, self.most + self.extra
        while used < self.length:
            item = self.make(size, 0)
            used = self.room(item, self.ending(item))
            if used > self.length:
                size -= self.step
                break
            if stops_before_growing and size > self.largest:
                size = int(self.largest)
                break
            size += self.step
            if not stops_before_growing and size > self.largest:
                size = int(self.largest)
                break
        self.size = size

    def item(self, index: int) -> Item:
        """The next item: at most as long as asked for."""
        size = self.size
        for _ in range(100):
            try:
                item = self.make(size, index)
            except ValueError:  # more is to be drawn than there is
                item = None
            if item is not None and self.room(item) <= self.length:
                return item
            if size > self.step:
                size -= self.step
        raise too_short(self.name, self.length)


class _Niah(_Task):
    most = 128

    def __init__(self, task: str, source: Source, length: int, seed: int):
        super().__init__(source, length, seed)
        self.name, self.kind = task, NIAH[task]
        self.step = 500 if self.kind.haystack == "essay" else 25 if length >= 4096 else 5
        self.pairs = source.words.pairs
        self.essay = re.sub(r"\s+", " ", source.essay).split(" ")
        if self.kind.haystack == "essay":
            self.largest = len(self.essay)
        self.find_size(stops_before_growing=True)

    def value(self, kind: str) -> str:
        if kind == "numbers":
            return str(self.random.randint(10**6, 10**7 - 1))
        if kind == "words":
            return self.random.choice(self.pairs)
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.kind.values} for {key} is: {value}."

    def make(self, size: int, index: int) -> Item:
        kind = self.kind
        keys, values, needles = [], [], []
        for _ in range(max(kind.num_keys, kind.num_queries)):
            keys.append(self.value(kind.keys))
            values.append([])
            for _ in range(kind.num_values):
                values[-1].append(self.value(kind.values))
                needles.append(self.needle(keys[-1], values[-1][-1]))
        random.Random(self.seed).shuffle(needles)
        text = self.with_essay(size, needles) if kind.haystack == "essay" else None
        text = self.with_lines(size, needles) if text is None else text
        asked = self.random.sample(range(len(keys)), kind.num_queries)
        names = [keys[i] for i in asked]
        query = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
        answers = tuple(value for i in asked for value in values[i])
        return self.told(text, query, answers)

    def with_essay(self, size: int, needles: list[str]) -> str:
        text = " ".join(self.essay[:size])
        parts = list(self.source.sentences(text.strip()))
        drawn = self.random.sample(DEPTHS, len(needles))
        at = [0, *sorted(int(len(parts) * (depth / 100)) for depth in drawn), len(parts)]
        pieces = []
        for i, (start, end) in enumerate(itertools.pairwise(at)):
            pieces.append(" ".join(parts[start:end]))
            pieces += needles[i : i + 1]
        return " ".join(pieces)

    def with_lines(self, size: int, needles: list[str]) -> str:
        if self.kind.haystack == "repeat":
            lines = [NOISE] * size
        else:
            lines = [
                self.needle(self.value(self.kind.keys), self.value(self.kind.values))
                for _ in range(size)
            ]
        places = sorted(self.random.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def told(self, text: str, query: str, answers: tuple[str, ...]) -> Item:
        one = self.kind.num_queries * self.kind.num_values == 1
        what = self.kind.values[:-1] if one else self.kind.values
        some, are, all_are = ("A", "is", "is") if one else ("Some", "are", "are all")
        at = text.find(f"{query} is: {answers[0]}") if one else -1
        return Item(
            task=self.name,
            context=f"{some} special magic {what} {are} hidden within the following text. Make "
            f"sure to memorize it. I will quiz you about the {what} afterwards.\n{text}\n",
            question=f"What {all_are} the special magic {what} for {query} mentioned in the "
            "provided text?",
            opening=f" The special magic {what} for {query} mentioned in the provided text {are}",
            answers=answers,
            scorer="all",
            most=self.most,
            depth=at / len(text) if at >= 0 else None,
        )


class _Variables(_Task):
    name, most, hops = "vt", 30, 4

    def __init__(self, source: Source, length: int, seed: int):
        super().__init__(source, length, seed)
        self.numbers = np.random.RandomState(seed)  # the published draws
        self.example = ""
        self.is_example, asked = True, self.length
        self.length, self.step = 500, 5
        self.find_size()
        shown = self.item(0)
        self.example = f"{shown.text} {' '.join(shown.answers)}\n\n"
        self.is_example, self.length, self.step = False, asked, 10
        self.extra = source.count(self.example)
        self.find_size()

    def ending(self, item: Item) -> str:
        return f" {list(item.answers)}"

    def letters(self, count: int) -> str:
        return "".join(self.random.choices(string.ascii_uppercase, k=count))

    def make(self, size: int, index: int) -> Item:
        width = 3 if self.is_example else 5
        names = [self.letters(width) for _ in range(self.hops + 1)]
        while len(set(names)) < self.hops + 1:  # of equal ones the first are taken all the same
            names.append(self.letters(width))
        names = names[: self.hops + 1]
        value = str(self.numbers.randint(10000, 99999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names)]
        lines = [NOISE + "\n"] * size
        if len(lines) <= len(chain):
            parts = [part for line in lines for part in line.split(".")]
            lines = [f"{part}." if part.strip() else part for part in parts]
            chain = chain[: len(lines) - 1]
        places = sorted(self.random.sample(range(len(lines)), len(chain)))
        for moved, (place, link) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + moved, link)
        text = " ".join(lines).replace(". \n", ".\n")
        return Item(
            task=self.name,
            context="Memorize and track the chain(s) of variable assignment hidden in the "
            f"following text.\n\n{text}\n",
            question=f"Question: Find all variables that are assigned the value {value} in the "
            "text above.",
            opening=" Answer: According to the chain(s) of variable assignment in the text above, "
            f"{self.hops + 1} variables are assgined the value {value}, they are: ",
            answers=tuple(names),
            scorer="all",
            most=self.most,
        )

    def item(self, index: int) -> Item:
        item = super().item(index)
        if self.is_example:
            return item
        shown = self.example
        for name in shown[shown.index("they are: ") + len("they are: ") :].split():
            shown = shown.replace(name, self.letters(len(name)))
        return dataclasses.replace(item, context=f" {shown}\n\n{item.context}")


class _CommonWords(_Task):
    name, most, common = "cwe", 120, 10

    def __init__(self, source: Source, length: int, seed: int):
        super().__init__(source, length, seed)
        words = source.words.all
        if length >= 32768 and len(words) < 8000:  # more than a small list has are needed
            words = sorted({*words, *source.words.pairs})
        random.Random(seed).shuffle(words)
        self.words, self.largest = words, len(words)
        self.find_size()

    def ending(self, item: Item) -> str:
        return " " + _numbered(item.answers)

    def listed(self, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
        drawn = self.random.sample(self.words, size)
        common, others = drawn[: self.common], drawn[self.common :]
        words = common * often + others * seldom
        random.Random(self.seed).shuffle(words)
        return _numbered(words), common

    def make(self, size: int, index: int) -> Item:
        short = self.length < 4096
        shown, said = self.listed(20, 3, 1) if short else self.listed(40, 10, 3)
        text, common = self.listed(size, 6, 1) if short else self.listed(size, 30, 3)
        question = "Question: What are the 10 most common words in the above list?"
        opening = " Answer: The top 10 words that appear most often in the list are:"
        told = (
            "Below is a numbered list of words. In these words, some appear more often than "
            "others. Memorize the ones that appear most often.\n"
        )
        example = f"{told}{shown}\n{question}{opening}{_numbered(said)}\n"
        answers = tuple(common)
        context = f"{example}{told}{text}\n"
        return Item(self.name, context, question, opening, answers, "all", self.most)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


class _FrequentWords(_Task):
    name, most, letters = "fwe", 50, 6

    def __init__(self, source: Source, length: int, seed: int):
        super().__init__(source, length, seed)
        self.step = length // 32
        vocabulary = self.vocabulary()
        size = length // self.letters
        while source.count(self.told(vocabulary, size).text) < length:
            size += self.step
        self.size = size - self.step

    def vocabulary(self) -> list[str]:
        def word() -> str:
            return "".join(self.random.choices(string.ascii_lowercase, k=self.letters))

        count = self.length // 50
        drawn = [word() for _ in range(count)]
        while len(set(drawn)) < count:
            drawn.append(word())
        words = sorted(set(drawn))
        random.Random(self.seed).shuffle(words)
        return ["...", *words[1:]]  # the most frequent one is noise

    def told(self, vocabulary: list[str], size: int) -> Item:
        ranks = np.arange(1, len(vocabulary) + 1)
        zeta = math.pi**2 / 6  # the sum of ranks**-2.0
        counts = (size * (ranks**-2.0) / zeta).astype(int)
        words = [word for word, n in zip(vocabulary, counts, strict=True) for _ in range(n)]
        random.Random(self.seed).shuffle(words)
        return Item(
            task=self.name,
            context="Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {' '.join(words)}\n",
            question="Question: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?",
            opening=" Answer: According to the coded text above, the three most frequently "
            "appeared words are:",
            answers=tuple(vocabulary[1:4]),
            scorer="all",
            most=self.most,
        )

    def item(self, index: int) -> Item:
        vocabulary, size = self.vocabulary(), self.size
        item = self.told(vocabulary, size)
        while self.source.count(item.text) > self.length:  # RULER leaves no room for the answer
            size -= self.step
            if size < 1:
                raise too_short(self.name, self.length)
            item = self.told(vocabulary, size)
        return item


class _Asked(NamedTuple):
    question: str
    answers: tuple[str, ...]
    own: list[int]
    near: list[int]


class _Questions(_Task):
    most = 32

    def __init__(self, task: str, source: Source, length: int, seed: int, read: Any):
        super().__init__(source, length, seed)
        self.name = task
        self.asked, self.documents = read(source.squad if task == "qa_1" else source.hotpotqa)
        self.largest = len(self.documents)
        self.find_size()

    def ending(self, item: Item) -> str:
        return f" {list(item.answers)}"

    def make(self, size: int, index: int) -> Item:
        asked, documents = self.asked[index], self.documents
        if size < len(documents):
            lacking = size - len(asked.own)
            if lacking > len(asked.near):
                known = {*asked.own, *asked.near}
                others = [i for i in range(len(documents)) if i not in known]
                drawn = self.random.sample(others, max(0, lacking - len(asked.near)))
                chosen = [*asked.own, *asked.near, *drawn]
            else:
                chosen = [*asked.own, *self.random.sample(asked.near, lacking)]
            documents = [documents[i] for i in chosen]
        else:
            documents = list(documents)
        random.Random(self.seed).shuffle(documents)
        text = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
        told = (
            "Answer the question based on the given documents. Only give me the answer and do not "
            "output any other words."
        )
        return Item(
            task=self.name,
            context=f"{told}\n\nThe following are given documents.\n\n{text}\n\n",
            question=f"{told}\n\nQuestion: {asked.question}",
            opening=" Answer:",
            answers=asked.answers,
            scorer="any",
            most=self.most,
        )


def _read_squad(path: Path) -> tuple[list[_Asked], list[str]]:
    articles = json.loads(path.read_text("utf-8"))["data"]
    documents = sorted({part["context"] for article in articles for part in article["paragraphs"]})
    place = {text: i for i, text in enumerate(documents)}
    asked = []
    for article in articles:
        near = [place[part["context"]] for part in article["paragraphs"]]
        for part in article["paragraphs"]:
            own = place[part["context"]]
            rest = [i for i in near if i != own]
            for one in part["qas"]:
                if not one["is_impossible"]:
                    answers = tuple(answer["text"] for answer in one["answers"])
                    asked.append(_Asked(one["question"], answers, [own], rest))
    return asked, documents


def _read_hotpotqa(path: Path) -> tuple[list[_Asked], list[str]]:
    rows = json.loads(path.read_text("utf-8"))

    def texts(row: Any) -> list[str]:
        return [f"{title}\n{''.join(parts)}" for title, parts in row["context"]]

    documents = sorted({text for row in rows for text in texts(row)})
    place = {text: i for i, text in enumerate(documents)}
    asked = [
        _Asked(row["question"], (row["answer"],), [place[text] for text in texts(row)], [])
        for row in rows
    ]
    return asked, documents
