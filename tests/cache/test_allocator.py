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

    SHARDS = 1

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(PAGES, 16, shards=self.SHARDS)
        self.nobodys = set(range(NO_PAGE, PAGES, PAGES // self.SHARDS))
        self.holders: list[np.ndarray] = []

    @property
    def counts(self) -> collections.Counter:
        return collections.Counter(int(p) for pages in self.holders for p in pages)

    @rule(n=st.integers(0, PAGES), after=st.none() | st.integers(0, PAGES - 1))
    def allocate(self, n, after):
        held, free = set(self.counts), PAGES - self.SHARDS - len(self.counts)
        if n > free:
            with pytest.raises(CacheFullError):
                self.allocator.allocate(n, after)
            return
        before = self.free_by_shard()
        pages = self.allocator.allocate(n, after)
        assert len({int(p) for p in pages} - held - self.nobodys) == n == len(pages)
        self.holders.append(pages)
        # No shard gave pages while another, untouched or not, had more than one left above it.
        left = self.free_by_shard()
        gave = [b for a, b in zip(before, left, strict=True) if a != b]
        assert max(left) - min(gave, default=PAGES) <= 1

    def free_by_shard(self) -> list[int]:
        size = PAGES // self.SHARDS
        held = collections.Counter(page // size for page in self.counts)
        return [size - 1 - held[shard] for shard in range(self.SHARDS)]

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
        assert self.allocator.num_free == PAGES - self.SHARDS - len(counts)
        for page in set(range(PAGES)) - self.nobodys:
            assert self.allocator.is_shared(page) == (counts[page] > 1)


class SpreadPages(Pages):
    """The same where the pool is split in three: all but one page of each part can be had."""

    SHARDS = 3


TestPages = Pages.TestCase
TestSpreadPages = SpreadPages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=25)
TestSpreadPages.settings = TestPages.settings


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


def test_a_sequence_is_spread_in_stripes_and_each_part_is_one_run(monkeypatch):
    """Twelve pages over three shards of eight, two of a stripe on each in turn."""
    monkeypatch.setattr("alaya_jax.cache.allocator.STRIPE", 2)
    allocator = PageAllocator(24, 16, shards=3)
    pages = allocator.allocate(12)
    np.testing.assert_array_equal(pages, [1, 2, 9, 10, 17, 18, 3, 4, 11, 12, 19, 20])
    # What follows goes where most is free; the part on the shard of the last page follows it.
    np.testing.assert_array_equal(allocator.allocate(3, after=20), [5, 13, 21])
    allocator.release(pages[[0, 1, 6, 7]])
    np.testing.assert_array_equal(allocator.allocate(4), [1, 2, 3, 4])
    assert allocator.capacity == 21
    assert allocator.num_free == 6
    np.testing.assert_array_equal(np.sort(allocator.allocate(6)), [6, 7, 14, 15, 22, 23])
    with pytest.raises(CacheFullError, match="0 of 21"):
        allocator.allocate(1)


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
