"""The memory that pages, what indexes know of them, and graphs share: who holds it, who is refused.

A budget is one number. Pages take their part of it whole. The rest is for indexes: what was made
for one plan stays for the next, until another needs its room and no open session asks for it. It
can be made again, of keys, or read again, from the store.
"""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from alaya_jax.errors import CacheFullError
from alaya_jax.units import nbytes

Part = tuple[Any, int]
"""What an index of pages, or a context's graph, holds of one layer: which, and the layer."""

Parts = Mapping[Part, int]
"""Their bytes."""


class Claim:
    """What a batch asks of indexes of pages, by its newest plans: nothing of it is dropped.

    Attributes:
      parts: of all layers.
    """

    def __init__(self):
        """Starts with nothing."""
        self.parts: Parts = {}

    @contextlib.contextmanager
    def asking(self, parts: Parts) -> Iterator[None]:
        """Asks for these from now on, if the block does not fail."""
        before, self.parts = self.parts, parts
        try:
            yield
        except BaseException:
            self.parts = before
            raise

    def end(self) -> None:
        """Asks for nothing more; waits for nobody."""
        self.parts = {}


class Room:
    """An account of that memory. Threads take turns under the lock of the pages' pool.

    Attributes:
      limit: bytes of pages, indexes and graphs; None: no bound.
      pages: bytes of the pages.
      setting: how errors name the bound.
    """

    def __init__(
        self,
        limit: int | None = None,
        pages: int = 0,
        setting: str = "",
        forget: Callable[[], None] = lambda: None,
    ):
        """Args:
        limit, pages, setting: see the class.
        forget: lets go of graphs that nobody asks.
        """
        self.limit, self.pages, self.setting = limit, pages, setting
        self._forget = forget
        self._claims: weakref.WeakSet[Claim] = weakref.WeakSet()
        self._graphs: weakref.WeakValueDictionary[Part, Any] = weakref.WeakValueDictionary()
        self._sizes: dict[Part, int] = {}

    def claim(self) -> Claim:
        """Of a new batch; it counts as long as it is referred to."""
        made = Claim()
        self._claims.add(made)
        return made

    def claimed(self, but: Claim | None = None) -> dict[Part, int]:
        """What batches ask of indexes of pages, one left out."""
        found: dict[Part, int] = {}
        for claim in list(self._claims):
            found.update({} if claim is but else claim.parts)
        return found

    def hold(self, part: Part, graph: Any, size: int) -> None:
        """A graph is in memory now, for as long as somebody refers to it."""
        self._graphs[part] = graph
        self._sizes = {p: s for p, s in self._sizes.items() if p in self._graphs} | {part: size}

    def graph(self, part: Part) -> Any:
        """A graph that is in memory; None: it is not."""
        return self._graphs.get(part)

    @property
    def graphs(self) -> dict[Part, int]:
        """The graphs that are in memory."""
        return {part: self._sizes.get(part, 0) for part in list(self._graphs)}

    def make(self, made: Parts, wanted: Parts, claim: Claim | None = None) -> list[Part]:
        """Room for what a batch asks.

        Args:
          made: the indexes of pages that are there, those to drop first in front.
          wanted: parts of indexes and graphs, those that are there too.
          claim: of the batch, which asks for `wanted` in place of what it asked before; None: of
            one that asks for it besides.

        Returns:
          those of `made` that have to be dropped.

        Raises:
          CacheFullError: no room, whatever nobody asks is dropped. Nothing is, but graphs that
            nobody asks.
        """
        if self.limit is None or self._over({**made, **self.claimed(claim), **wanted}) <= 0:
            return []
        self._forget()
        if self._over({**self.claimed(claim), **wanted}) > 0:
            gc.collect()  # sessions that nobody can reach any more, in a circle of references
            if self._over({**self.claimed(claim), **wanted}) > 0:
                self.refuse(wanted, self.claimed(claim) | self.graphs)
        kept, gone = {**self.claimed(claim), **wanted}, []
        left = {**made, **kept}
        for part in made:
            if self._over(left) <= 0:
                break
            if part not in kept:
                gone.append(part)
                del left[part]
        return gone

    def fits(self, wanted: Parts) -> bool:
        """Whether something could be held beside the pages if nobody asked for anything else."""
        return self.limit is None or self.pages + sum(wanted.values()) <= self.limit

    def refuse(self, wanted: Parts, others: Parts | None = None) -> NoReturn:
        """Raises CacheFullError: it says who holds what, and what to do.

        Args:
          wanted: what has no room.
          others: what has to stay beside it.
        """
        others = others or {}
        new = {part: size for part, size in wanted.items() if part not in others}
        asked, held = sum(new.values()), self.pages + sum(others.values())
        beside = "".join(f", {name} {size:,}" for name, size in by_name(others).items())
        close = "close a session that asks for one of these, " if others else ""
        more = f"Budget(device={held + asked}, indexes={held + asked - self.pages})"
        raised = f"{more} ({nbytes(held + asked)})" if self.pages else "more"
        raise CacheFullError(
            f"{' and '.join(by_name(new))} would take {asked:,} bytes, and of the "
            f"{self.limit:,} of {self.setting} {held:,} are held (pages {self.pages:,}{beside}): "
            f"{close}ask a lighter index, such as a sketch of fewer bits, name it in "
            f"Budget(indexes=...), which leaves room for it in place of pages, or give {raised}"
        )

    def _over(self, parts: Parts) -> int:
        """Bytes above the bound, if these were held beside the graphs that are in memory."""
        assert self.limit is not None
        return self.pages + sum({**self.graphs, **parts}.values()) - self.limit


def by_name(parts: Parts) -> dict[str, int]:
    """Bytes of each index and each graph that takes any, all layers, by `repr`."""
    sizes: dict[str, int] = {}
    for (index, _), size in parts.items():
        sizes[repr(index)] = sizes.get(repr(index), 0) + size
    return {name: size for name, size in sizes.items() if size}
