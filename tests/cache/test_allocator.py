"""Reference counts and runs of pages."""

import collections

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from alaya_jax.cache import NO_PAGE, PageAllocator
from alaya_jax.errors import CacheFullError

PAGES = 12


class Pages(RuleBasedStateMachine):
    """Any order of allocate, share and release, against a counter."""

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(PAGES, 16)
        self.holders: list[np.ndarray] = []

    @property
    def counts(self) -> collections.Counter:
        return collections.Counter(int(p) for pages in self.holders for p in pages)

    @rule(n=st.integers(0, PAGES), after=st.none() | st.integers(0, PAGES - 1))
    def allocate(self, n, after):
        held, free = set(self.counts), PAGES - 1 - len(self.counts)
        if n > free:
            with pytest.raises(CacheFullError):
                self.allocator.allocate(n, after)
            return
        pages = self.allocator.allocate(n, after)
        assert len({int(p) for p in pages} - held - {NO_PAGE}) == n == len(pages)
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data):
        pages = data.draw(st.sampled_from(self.holders))
        part = pages[: data.draw(st.integers(0, len(pages)))]
        self.allocator.share(part)
        self.holders.append(part)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data):
        at = data.draw(st.integers(0, len(self.holders) - 1))
        self.allocator.release(self.holders.pop(at))

    @invariant()
    def accounts_agree(self):
        counts = self.counts
        assert self.allocator.num_free == PAGES - 1 - len(counts)
        for page in range(1, PAGES):
            assert self.allocator.is_shared(page) == (counts[page] > 1)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_pages_continue_a_run_where_they_can():
    allocator = PageAllocator(PAGES, 16)
    first = allocator.allocate(3)
    np.testing.assert_array_equal(np.diff(first), 1)
    second = allocator.allocate(2, after=int(first[-1]))
    np.testing.assert_array_equal(second, first[-1] + np.asarray([1, 2]))


def test_the_tightest_run_is_taken_and_a_long_one_is_kept_whole():
    allocator = PageAllocator(16, 16)
    pages = allocator.allocate(15)
    allocator.release(pages[1:3])
    allocator.release(pages[5:12])
    np.testing.assert_array_equal(allocator.allocate(2), pages[1:3])
    allocator.release(pages[1:3])
    scattered = allocator.allocate(8)  # no run holds them: the longest first
    np.testing.assert_array_equal(scattered, [*pages[5:12], pages[1]])


def test_exhaustion_says_the_numbers_and_the_setting_and_takes_nothing():
    allocator = PageAllocator(PAGES, 16, "Budget(device='96KiB')")
    allocator.allocate(8)
    with pytest.raises(CacheFullError) as error:
        allocator.allocate(4)
    for part in ("64 more tokens", "4 pages", "3 of 11", "Budget(device='96KiB')", "close"):
        assert part in str(error.value)
    assert allocator.num_free == 3


def test_a_page_released_twice_is_a_bug_of_ours():
    allocator = PageAllocator(PAGES, 16)
    pages = allocator.allocate(2)
    allocator.release(pages)
    with pytest.raises(ValueError, match=str(int(pages[1]))):
        allocator.release(pages[1:])
    assert allocator.num_free == PAGES - 1
