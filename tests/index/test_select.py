"""Choosing among scores, against a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alaya_jax.index.select import as_mask, largest, largest_of_all


@pytest.mark.parametrize(("n", "k"), [(1000, 3), (1003, 3), (1000, 25), (129, 1), (40, 40)])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), values=st.sampled_from([2, 5, 10**6]))
def test_largest_is_the_head_of_a_stable_sort(n, k, seed, values):
    """Few values: many are equal, within chunks and between them."""
    scores = np.random.default_rng(seed).integers(0, values, (2, 1, 3, n)).astype(np.float32)
    scores[scores == 0] = -np.inf
    best, column = largest(jnp.asarray(scores), k)
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    want = np.take_along_axis(scores, order, -1)
    np.testing.assert_array_equal(best, want)
    there = want > -np.inf
    np.testing.assert_array_equal(np.asarray(column)[there], order[there])


def test_a_mask_of_columns():
    columns = jnp.asarray([[[[4, 0, 2]], [[1, 1, 3]]]])
    chosen = jnp.asarray([[[[True, False, True]], [[True, True, False]]]])
    mask = np.asarray(as_mask(columns, chosen, 5))
    assert mask.shape == (1, 2, 1, 5)
    assert mask[0, 0, 0].tolist() == [False, False, True, False, True]
    assert mask[0, 1, 0].tolist() == [False, True, False, False, False]


def test_the_largest_of_all_devices():
    """Two devices, keys of even and odd positions: what each keeps is what one device would."""
    scores = np.asarray([3, 1, 2, 2, 2, 2, 0, 2, -np.inf, 2], np.float32)
    k = 4
    best, at = largest(jnp.asarray(scores.reshape(-1, 2).T), k)
    positions = 2 * at + jnp.arange(2)[:, None]
    chosen = jax.vmap(lambda *x: largest_of_all(*x, "x"), axis_name="x")(best, positions)
    kept = np.sort(np.asarray(positions)[np.asarray(chosen)])
    np.testing.assert_array_equal(kept, np.sort(np.argsort(-scores, kind="stable")[:k]))
