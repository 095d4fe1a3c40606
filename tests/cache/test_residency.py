"""The account of what is kept in memory of mapped files, and its bound."""

import numpy as np
import pytest

from alaya_jax.cache.residency import FileAccount, PagesMet, Residency

K, Q, PIECE = 2, 12, 10
PAGE = 2 * K * PIECE


@pytest.fixture
def gone():
    """What was let go of: (layer, pages), or (name of an index, pages)."""
    return []


def account(residency, gone, pinned=lambda: None, name="here"):
    keys = np.zeros((K, Q, PIECE, 1), np.uint8)
    return FileAccount(
        residency,
        name,
        keys,
        let_go=lambda layer, pages: gone.append((layer, pages.tolist())),
        pinned=pinned,
    )


def touch(files, layer, pages, met=None):
    return files.residency.touch(files.layer(layer), np.asarray(pages), met)


def test_what_was_met_longest_ago_goes_first_and_no_more_than_has_to(gone):
    residency = Residency(6 * PAGE)
    files = account(residency, gone)
    assert files.page_bytes == PAGE
    assert touch(files, 0, [3, 1, 2]) == (0, 6, 3 * PAGE)
    assert touch(files, 1, [5, 6]) == (0, 4, 2 * PAGE)
    assert touch(files, 0, [1]) == (2, 0, 0)
    assert touch(files, 1, [7]) == (0, 2, PAGE)
    residency.make_room()
    assert gone == []
    touch(files, 1, [8, 9])
    residency.make_room()
    assert gone == [(0, [3, 2])], "page 1 was met again"
    assert residency.nbytes == 6 * PAGE
    residency.make_room(spare=1)
    assert gone.pop() == (1, [5])
    assert touch(files, 0, [1, 2, 3]) == (2, 4, 2 * PAGE)


def test_what_is_about_to_be_read_stays(gone):
    residency = Residency(2 * PAGE)
    files = account(residency, gone)
    touch(files, 0, [1, 2])
    since, waited = residency.now, []
    touch(files, 0, [2, 3, 4])
    residency.make_room(since=since, wait=lambda: waited.append(gone.copy()))
    assert gone == [(0, [1])]
    assert waited == [[]], "nothing is let go of before"
    assert residency.nbytes == 3 * PAGE
    residency.make_room()
    assert gone == [(0, [1]), (0, [2])]


def test_pieces_of_pages_are_counted_and_go_together(gone):
    residency = Residency(PAGE)
    files = account(residency, gone)
    met = np.array([[1, 0, 3], [2, 0, 0]], np.uint8)
    assert touch(files, 0, [4, 5, 6], met) == (0, 3, 4 * PIECE)
    assert touch(files, 0, [4, 5, 6], met) == (3, 0, 0)
    met[0, 0] = 2
    assert touch(files, 0, [4, 5, 6], met) == (2, 1, PIECE), "its keys were there, not its values"
    assert touch(files, 0, [4, 5, 6], met * 0) == (0, 0, 0)
    residency.make_room()
    assert gone == [(0, [4])]
    assert residency.nbytes == 2 * PIECE


def test_pinned_pages_after_others_and_leaves_last(gone):
    pinned = np.zeros(Q, bool)
    pinned[[1, 2]] = True
    residency = Residency(100 * PAGE)
    files = account(residency, gone, lambda: pinned)
    kept = files.leaves("sketch", 7, lambda pages: gone.append(("sketch", pages.tolist())))
    assert residency.touch(kept, np.arange(4)) == (0, 4, 28)
    held = files.leaves("in memory", 5, None)
    residency.touch(held, np.arange(2))
    touch(files, 0, [1, 3])
    touch(files, 1, [2])
    touch(files, 1, [4])
    assert residency.leaves_nbytes == 38
    left = residency.limit = 38 + 3 * PAGE
    residency.make_room()
    assert gone == [(0, [3])]
    residency.limit = 38 + PAGE
    residency.make_room()
    assert gone == [(0, [3]), (1, [4]), (0, [1])]
    residency.limit = 30
    residency.make_room()
    assert gone[3:] == [(1, [2]), ("sketch", [0, 1])]
    residency.limit = 1
    residency.make_room()
    assert gone[5:] == [("sketch", [2, 3])]
    assert residency.nbytes == residency.leaves_nbytes == 10, "that can be had nowhere else"
    assert left > residency.nbytes
    pinned[:] = False
    residency.limit = 10 + PAGE
    touch(files, 0, [1, 2])
    residency.make_room()
    assert gone[6:] == [(0, [1])]


def test_no_bound_keeps_no_list(gone):
    residency = Residency()
    files = account(residency, gone)
    for _ in range(10_000):
        touch(files, 0, range(Q))
    residency.make_room()
    assert gone == []
    assert residency.nbytes == Q * PAGE
    assert not any(residency._queues)


def test_the_list_does_not_grow_with_time(gone):
    residency = Residency(100 * PAGE)
    files = account(residency, gone)
    for layer in np.arange(9_000) % 3:
        touch(files, layer, range(Q))
    assert sum(len(pages) for queue in residency._queues for _, _, pages in queue) < 5_000
    residency.limit = 1
    residency.make_room()
    assert sorted(gone) == [(layer, list(range(Q))) for layer in range(3)]
    assert residency.nbytes == 0


def test_any_order_of_calls_keeps_the_account(gone, rng):
    """Against sets and a list of when each page was met."""
    residency = Residency(9 * PAGE)
    files = [account(residency, gone, name=name) for name in ("here", "there")]
    last: dict[tuple[int, int, int], int] = {}
    for now in range(300):
        name, layer = (int(n) for n in rng.integers(0, 2, 2))
        pages = rng.permutation(Q)[: rng.integers(1, 6)]
        hits, misses, _ = touch(files[name], layer, pages)
        known = sum((name, layer, int(page)) in last for page in pages)
        assert (hits, misses) == (K * known, K * (len(pages) - known))
        last |= {(name, layer, int(page)): now for page in pages}
        residency.make_room()
        while len(last) > 9:
            oldest = min(last.values())
            first = [key for key, then in last.items() if then == oldest]
            # Of pages that were met together any may stay: the account says which.
            for key in first:
                if files[key[0]].layer(key[1]).used[key[2]] == 0:
                    del last[key]
            if len(last) > 9:
                assert not any(last[key] == oldest for key in first if key in last)
        assert residency.nbytes == len(last) * PAGE <= 9 * PAGE
        kept = [
            (n, i, int(page))
            for n in range(2)
            for i in range(2)
            for page in np.flatnonzero(files[n].layer(i).used)
        ]
        assert sorted(kept) == sorted(last)


def test_pages_met_are_added_up():
    met = PagesMet.nothing(2)
    more = PagesMet(*(np.array([n, 10 * n]) for n in range(5)))
    met.add(more)
    met.add(more)
    assert met.bytes_verified.tolist() == [8, 80]
    assert met.pool.tolist() == [0, 0]
    assert more.memory.tolist() == [1, 10]
    assert PagesMet.hit_rate(3, 1) == 0.75
    assert PagesMet.hit_rate(0, 0) is None
