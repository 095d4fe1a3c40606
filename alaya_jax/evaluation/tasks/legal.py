"""Questions about real licenses, with answers that stand in them: what a section is about, what it
refers to, how a term is defined, and whose the copyright is.

The texts are of the package licensedcode-data (the data of ScanCode; some two thousand licenses, of
their licensors): `pip install licensedcode-data`, or a directory with its *.LICENSE files.
"""

import dataclasses
import functools
import importlib.util
import random
import re
from collections.abc import Iterator
from pathlib import Path

from alaya_jax.errors import RequestError
from alaya_jax.evaluation.tasks.item import Count, Item, Scorer, too_short

KINDS = ("term", "party", "clause", "reference")
"""Of questions; those first that small models answer, too."""

_HEADING = re.compile(r"^ {0,4}(\d{1,2})\. +([A-Z][A-Za-z ,/&'-]{3,60}?)\.?$", re.M)
_REFERENCE = re.compile(r"\b[Ss]ection (\d{1,2})(?![\d.])(?!\()")
_TERM = re.compile(
    r'["“]([A-Z][A-Za-z ]{3,30})["”] (?:shall mean|means) ((?:[\w,\'-]+ ){7}[\w\'-]+)'
)
_PARTY = re.compile(
    r"^[Cc]opyright (?:\([Cc]\)|©) (?:\d{4}(?:[-,] ?\d{4})*),? (?:by )?"
    r"([A-Z][A-Za-z&.' -]{4,50}[A-Za-z])(?=[,.;]|$)",
    re.M,
)
_QUESTION_ROOM = 96
"""Tokens for a question and its answer, beside the text."""


@dataclasses.dataclass(frozen=True)
class License:
    """A license.

    Attributes:
      name: as people call it.
      text: of it, without what the data says about it.
    """

    name: str
    text: str

    @property
    def headed(self) -> str:
        """As a part of a context."""
        return f"=== {self.name} ===\n\n{self.text}\n\n"


def installed() -> Path | None:
    """Where the package has its texts; None where it is not installed."""
    found = importlib.util.find_spec("licensedcode")
    places = found.submodule_search_locations if found else None
    return Path(next(iter(places))) / "data" / "licenses" if places else None


@functools.lru_cache(maxsize=2)
def licenses(path: Path) -> tuple[License, ...]:
    """The English licenses of a directory that have something to ask about, by name; of equal texts
    the first.

    Raises:
      RequestError: there are none.
    """
    found: dict[str, License] = {}
    for file in sorted(path.glob("*.LICENSE")):
        parts = re.match(r"---\n(.*?)\n---\n(.*)", file.read_text("utf-8"), re.DOTALL)
        name = re.search(r"^name: (.+)$", parts[1], re.M) if parts else None
        if parts is None or name is None or re.search(r"^language: ", parts[1], re.M):
            continue
        license = License(name[1].strip("'\"").removeprefix("The "), parts[2].strip())
        if any(True for _ in _questions(license)):
            found.setdefault(license.text, license)
    if not found:
        raise RequestError(f"{path}: no English *.LICENSE file with anything to ask about")
    return tuple(sorted(found.values(), key=lambda license: license.name))


def items(path: Path, count: Count, length: int, questions: int, seed: int) -> list[Item]:
    """Questions about one context: whole licenses, in random order, as many as fit.

    Args:
      path: see `licenses`.
      count: tokens of a text.
      length: tokens of an item and its answer at most.
      questions: at most so many, kinds and licenses as different as can be.
      seed: of the draws.

    Raises:
      RequestError: no license fits.
    """
    draw, room = random.Random(seed), length - _QUESTION_ROOM
    chosen: list[License] = []
    names: set[str] = set()
    for license in draw.sample(licenses(path), len(licenses(path))):
        needed = count(license.headed)
        if needed <= room and license.name not in names:
            chosen.append(license)
            names.add(license.name)
            room -= needed
        if room < 400:  # as short as hardly a license is
            break
    if not chosen:
        raise too_short("legal", length)
    context = "".join(license.headed for license in chosen)
    asked = [item for license in chosen for item in _questions(license)]
    draw.shuffle(asked)
    by_kind = {kind: [item for item in asked if item.kind == kind] for kind in KINDS}
    ordered = [
        by_kind[kind][turn]
        for turn in range(max(map(len, by_kind.values())))
        for kind in KINDS
        if turn < len(by_kind[kind])
    ]
    return [question.item(context) for question in ordered[:questions]]


@dataclasses.dataclass(frozen=True)
class _Question:
    kind: str
    about: License
    question: str
    opening: str
    answer: str
    scorer: Scorer
    at: int

    def item(self, context: str) -> Item:
        begins = context.index(self.about.headed) + self.about.headed.index(self.about.text)
        return Item(
            task=f"legal_{self.kind}",
            context=context,
            question=self.question,
            opening=self.opening,
            answers=(self.answer,),
            scorer=self.scorer,
            most=24,
            depth=(begins + self.at) / len(context),
        )


def _questions(license: License) -> Iterator[_Question]:
    """All that can be asked about a license, each with one answer."""
    for ask in (_clauses, _terms, _parties):
        yield from ask(license)


def _clauses(license: License) -> Iterator[_Question]:
    """What a numbered section is about, and which one section it refers to."""
    headings = [
        found
        for found in _HEADING.finditer(license.text)
        if len(found[2].split()) <= 7  # else it is a sentence
    ]
    numbers = [int(found[1]) for found in headings]
    if len(headings) < 3 or numbers != list(range(1, len(numbers) + 1)):
        return  # of several lists of numbers, it cannot be told which is meant
    ends = [found.start() for found in headings[1:]] + [len(license.text)]
    for found, end in zip(headings, ends, strict=True):
        number, title = found[1], found[2].strip()
        yield _Question(
            kind="clause",
            about=license,
            question=f"In the {license.name}, what is the title of section {number}?",
            opening=f" In the {license.name}, section {number} has the title: {number}.",
            answer=title,
            scorer="all",
            at=found.start(),
        )
        others = set(_REFERENCE.findall(license.text[found.end() : end]))
        if len(others) == 1 and number not in others:
            (other,) = others
            if int(other) <= len(headings):
                at = license.text.index(f"ection {other}", found.end())
                yield _Question(
                    kind="reference",
                    about=license,
                    question=f"In the {license.name}, to which other section does section {number} "
                    f"({title}) refer?",
                    opening=f" Section {number} refers to section",
                    answer=other,
                    scorer="first",
                    at=at,
                )


def _terms(license: License) -> Iterator[_Question]:
    """How the definition of a term begins."""
    found = list(_TERM.finditer(license.text))
    names = [one[1] for one in found]
    for one in found:
        if names.count(one[1]) == 1:
            yield _Question(
                kind="term",
                about=license,
                question=f"How does the {license.name} define “{one[1]}”?",
                opening=f" In the {license.name}, “{one[1]}” means",
                answer=one[2],
                scorer="all",
                at=one.start(),
            )


def _parties(license: License) -> Iterator[_Question]:
    """Whose the copyright is, where it is one's."""
    owners = {
        re.sub(r"\.? All [Rr]ights.*", "", one[1]).strip() for one in _PARTY.finditer(license.text)
    }
    if len(owners) == 1:
        (owner,) = owners
        yield _Question(
            kind="party",
            about=license,
            question=f"Who holds the copyright according to the {license.name}?",
            opening=f" According to the {license.name}, the copyright is held by",
            answer=owner,
            scorer="all",
            at=license.text.index(owner),
        )
