"""Requests on their way, and how many at a time."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

BYTES = 256 << 20
"""Of chunks that are on their way at a time; at least one chunk is. What is held in memory is up to
three times that: a chunk's numbers, its object, and tensorstore's copy.
"""

MOST = 16
"""Requests at a time."""

Advance = Callable[[int], object]
"""Is told of bytes that are done with."""


def window(nbytes: int) -> int:
    """How many objects of such a size may be on their way."""
    return max(1, min(MOST, BYTES // nbytes))


@contextlib.contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that wait for requests; when one fails, those that have not begun are dropped."""
    pool = ThreadPoolExecutor(MOST, "alaya-remote")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(pool: ThreadPoolExecutor, jobs: Iterable[Any], count: int) -> Iterator[Any]:
    """The results of jobs (function, *arguments), in order, with at most `count` at a time."""
    waiting: list[Future[Any]] = []
    for function, *arguments in jobs:
        waiting.append(pool.submit(function, *arguments))
        del arguments
        if len(waiting) == count:
            yield waiting.pop(0).result()
    while waiting:
        yield waiting.pop(0).result()
