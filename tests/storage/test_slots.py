"""Free slots follow from the lists of pages; a context takes one run where it can."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from alaya_jax.storage.slots import chosen, free_slots, located, runs

SLOTS = st.lists(st.integers(0, 30), unique=True, max_size=20).map(lambda x: np.array(x, np.int32))


@given(st.lists(SLOTS, max_size=4))
def test_what_is_in_no_list_is_free(lists):
    held = {int(s) for pages in lists for s in pages}
    assert free_slots(lists, 31).tolist() == [s for s in range(31) if s not in held]


@given(SLOTS, st.integers(0, 20))
def test_chosen_slots_are_free_and_in_one_run_where_one_is_long_enough(slots, count):
    free = np.sort(slots)
    count = min(count, len(free))
    got = chosen(free, count)
    assert len(got) == count
    assert len(np.unique(got)) == count
    assert np.isin(got, free).all()
    lengths = [stop - start for start, stop in runs(free)]
    if count and any(n >= count for n in lengths):
        ((start, stop),) = runs(got)
        assert stop - start == count
        holding = next(n for n, (a, b) in zip(lengths, runs(free), strict=True) if a <= start < b)
        assert holding == min(n for n in lengths if n >= count), "the shortest that has room"


@given(SLOTS)
def test_runs_are_the_slots_in_their_order(slots):
    listed = [s for start, stop in runs(slots) for s in range(start, stop)]
    assert listed == slots.tolist()
    for part, start in located(slots):
        assert slots[part].tolist() == list(range(start, start + part.stop - part.start))
    assert np.concatenate([slots[:0], *(slots[p] for p, _ in located(slots))]).tolist() == listed
