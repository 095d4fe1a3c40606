"""Which layers share a program: few of them, in groups that are alike."""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

SIZES = range(1, 7)
"""Layers of a group. Compiling costs by layer, and each call of a program a little of a step."""


class Group(NamedTuple):
    """Consecutive layers of one program: the first of them, and how many."""

    first: int
    layers: int


def groups(kinds: Sequence[Hashable], layers_per_program: int | None = None) -> list[Group]:
    """Splits layers into groups that few programs serve.

    Args:
      kinds: of each layer, what makes its program: layers of one kind can share one.
      layers_per_program: most layers of a group; None: about five, so that groups of one size serve
        all layers of a kind.
    """
    runs = list(_runs(kinds))
    sizes: dict[Hashable, int] = {}
    for kind in dict.fromkeys(kinds):
        lengths = [run.layers for run in runs if kinds[run.first] == kind]
        sizes[kind] = layers_per_program or _size(lengths)
    return [
        Group(first, min(size, run.first + run.layers - first))
        for run in runs
        for size in [sizes[kinds[run.first]]]
        for first in range(run.first, run.first + run.layers, size)
    ]


def _runs(kinds: Sequence[Hashable]) -> Iterator[Group]:
    """The runs of equal layers."""
    first = 0
    for _, run in itertools.groupby(kinds):
        count = len(list(run))
        yield Group(first, count)
        first += count


def _size(lengths: list[int]) -> int:
    """The size of group that costs least for runs of such lengths, where a layer that is compiled
    counts as much as a program that is called in each step.
    """

    def cost(size: int) -> tuple[int, int]:
        compiled = {min(size, length) for length in lengths}
        compiled |= {length % size for length in lengths}
        called = sum(-(-length // size) for length in lengths)
        return sum(compiled) + called, abs(size - 5)

    return min(SIZES, key=cost)
