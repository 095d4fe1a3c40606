"""Words that tasks make keys of."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from alaya_jax.errors import RequestError


class Words(NamedTuple):
    """Lists of words by kind."""

    nouns: Sequence[str]
    adjectives: Sequence[str]
    verbs: Sequence[str]

    @property
    def pairs(self) -> list[str]:
        """Names such as "quiet-harbor", sorted."""
        return sorted({f"{first}-{noun}" for first in self.adjectives for noun in self.nouns})

    @property
    def all(self) -> list[str]:
        """Each word once, sorted."""
        return sorted({*self.nouns, *self.adjectives, *self.verbs})


def own() -> Words:
    """This library's own: a few hundred plain English words."""
    text = (Path(__file__).parent / "words.txt").read_text("utf-8")
    return Words(*(part.split() for part in text.split("\n\n")))


def wonderwords() -> Words:
    """Those of the package of that name, which RULER's generators use.

    Raises:
      RequestError: it is not installed.
    """
    found = importlib.util.find_spec("wonderwords")
    if found is None or found.origin is None:
        raise RequestError("RULER's own words need: pip install wonderwords")
    lists = Path(found.origin).parent / "assets"

    def read(name: str) -> list[str]:
        return [line.rstrip() for line in (lists / name).read_text("utf-8").splitlines()]

    return Words(read("nounlist.txt"), read("adjectivelist.txt"), read("verblist.txt"))
