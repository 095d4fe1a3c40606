"""Who waits, and who may go before whom."""

from collections.abc import Iterator

PASSES = 8
"""How often others that came later may go before one that waits."""

LOOK = 32
"""How many of those that wait longest may go next."""


class Waiting[T]:
    """A queue in which one that fits may pass one that does not fit, a bounded number of times.

    Whoever was passed `passes` times is passed no more: nobody behind it goes before it did. One
    thread at a time may use it.
    """

    def __init__(self, passes: int = PASSES, look: int = LOOK):
        """Args: see `PASSES` and `LOOK`."""
        self._passes, self._look = passes, look
        self._items: list[T] = []
        self._passed: list[int] = []

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: T) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._items))

    def add(self, item: T) -> None:
        """Behind all others."""
        self._items.append(item)
        self._passed.append(0)

    def add_first(self, item: T) -> None:
        """Before all others: it was in already, and had to leave."""
        self._items.insert(0, item)
        self._passed.insert(0, 0)

    def candidates(self) -> list[T]:
        """Those that may go next, the one that came first in front."""
        found = []
        for item, passed in zip(self._items[: self._look], self._passed, strict=False):
            found.append(item)
            if passed >= self._passes:
                break
        return found

    def take(self, item: T) -> None:
        """It goes; those in front of it were passed once more."""
        at = self._at(item)
        for i in range(at):
            self._passed[i] += 1
        del self._items[at], self._passed[at]

    def remove(self, item: T) -> None:
        """It waits no more, and passed nobody."""
        at = self._at(item)
        del self._items[at], self._passed[at]

    def _at(self, item: T) -> int:
        return self._items.index(item)
