"""Requests on their way: bounded, in order, and dropped when one fails."""

import threading
import time

import pytest

from alaya_jax.storage.in_flight import BYTES, MOST, ahead, window, workers


def test_results_come_in_order_and_few_are_on_their_way():
    at_work, most, lock = [0], [0], threading.Lock()
    made = []

    def work(i):
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        time.sleep(0.01 * (i % 3))
        with lock:
            at_work[0] -= 1
        return i

    def jobs():
        for i in range(30):
            made.append(i)
            yield work, i

    with workers() as pool:
        for i, found in enumerate(ahead(pool, jobs(), 4)):
            assert found == i
            assert len(made) <= i + 4
    assert i == 29
    assert 1 < most[0] <= 4


def test_what_waits_is_dropped_when_one_fails():
    begun = []

    def work(i):
        begun.append(i)
        if i == 3:
            raise RuntimeError("third")
        time.sleep(0.01)

    with pytest.raises(RuntimeError, match="third"), workers() as pool:
        list(ahead(pool, ((work, i) for i in range(1000)), 8))
    assert len(begun) < 20


def test_what_is_on_its_way_is_bounded_by_bytes():
    assert window(1) == MOST
    assert window(BYTES // 3) == 3
    assert window(10 * BYTES) == 1
