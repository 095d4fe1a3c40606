"""Lists of wanted pages, against numpy."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alaya_jax.pallas_kernels.page_lists import compact as compact_

compact = jax.jit(compact_, static_argnames="capacity")


@settings(max_examples=25)
@given(hnp.arrays(bool, (2, 3, 9)), st.sampled_from([None, 4]))
def test_entries_in_order_and_their_count(keep, capacity):
    found = compact(keep, capacity)
    assert found.index.shape == (2, 3, capacity or 9)
    for b, j in np.ndindex(2, 3):
        want = np.flatnonzero(keep[b, j])
        assert found.count[b, j] == len(want)
        held = want[:capacity]
        np.testing.assert_array_equal(found.index[b, j, : len(held)], held)


@pytest.mark.parametrize("value", [False, True])
def test_none_and_all(value):
    found = compact(np.full((1, 1, 5), value))
    assert found.count.tolist() == [[5 * value]]
    if value:
        assert found.index.tolist() == [[[0, 1, 2, 3, 4]]]


def test_a_table_without_entries():
    found = compact(np.zeros((2, 1, 0), bool))
    assert found.index.shape == (2, 1, 0)
    assert found.count.tolist() == [[0], [0]]
