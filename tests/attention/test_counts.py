"""What attention read, as arrays of one shape."""

import numpy as np

from alaya_jax.attention.counts import Counts


def test_each_is_broadcast_to_the_rows():
    counts = Counts.of((2, 3, 4), np.arange(3)[:, None], 7)
    assert {x.shape for x in (counts.attended, counts.scored, counts.read, counts.mass)} == {
        (2, 3, 4)
    }
    np.testing.assert_array_equal(counts.attended[1, :, 0], [0, 1, 2])
    assert (np.asarray(counts.scored) == 7).all()


def test_what_was_not_told_is_nothing_read_and_a_mass_that_is_not_known():
    counts = Counts.of((1, 1, 2), 1, 1)
    assert not np.any(counts.read)
    assert not np.any(counts.widened)
    assert np.isnan(counts.mass).all()
