import numpy as np
import pytest

from alaya_jax.prefix import common_prefix


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        ([], [], 0),
        ([1], [], 0),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 3, 2], 1),
        ([4, 5], [4, 5], 2),
    ],
)
def test_common_prefix(one, other, common):
    rows = np.asarray(one, np.int32), np.asarray(other, np.int32)
    assert common_prefix(*rows) == common_prefix(*reversed(rows)) == common
