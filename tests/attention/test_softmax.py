"""The softmax, the window's rule, and what a retrieval takes, each by itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax.attention import softmax
from alaya_jax.attention.kernels.asking import abstract, passed_over
from alaya_jax.attention.layer import LayerQueries
from alaya_jax.attention.rows import Held, Rows
from alaya_jax.attention.window import Split
from alaya_jax.cache import PageTable
from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.index.memory import LayerMemory
from alaya_jax.pallas_kernels.dispatch import CPU, Choice
from alaya_jax.query import Window

SCALE = 0.25


@pytest.mark.parametrize("gain", [1.0, 1e4, 1e31])
def test_parts_one_after_another_are_the_whole(gain, rng):
    scores = gain * rng.standard_normal((3, 12))
    scores[0] = -np.inf  # a row that sees nothing
    scores[1, 5:] = -np.inf
    scores[2] -= 10 * gain  # all far below zero
    values = rng.standard_normal((12, 4))
    running, only_scores = softmax.start((3,), 4), softmax.start((3,))
    for part in np.split(np.arange(12), [0, 1, 7]):
        here = jnp.asarray(scores[:, part], jnp.float32)
        if here.shape[1]:
            weighed = jnp.asarray(values[part], jnp.float32)
            running = softmax.fold(running, here, SCALE, lambda p, v=weighed: p @ v)
            only_scores = softmax.fold(only_scores, here, SCALE)
    best = scores.max(-1)
    weight = np.exp(SCALE * (scores[1:] - best[1:, None]))
    out = weight @ values / weight.sum(-1, keepdims=True)
    lse = SCALE * best[1:] + np.log(weight.sum(-1))
    got = softmax.finish(running, SCALE)
    np.testing.assert_allclose(got.out[1:], out, atol=1e-4)
    np.testing.assert_allclose(got.lse[1:], lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(softmax.lse_of(only_scores, SCALE), got.lse)
    np.testing.assert_allclose(softmax.best_of(running), best, rtol=1e-6)
    assert not np.any(got.out[0])
    assert np.isneginf(got.lse[0])


def test_the_window_counts_each_key_once():
    end = jnp.arange(20)
    split = Split.of(Window(4, 6), end)
    position = jnp.arange(20)
    inside, outside = split.inside.mask(position), split.outside.mask(position)
    np.testing.assert_array_equal(inside ^ outside, position < end[:, None])
    np.testing.assert_array_equal(inside.sum(-1), split.size)
    np.testing.assert_array_equal(split.size, np.minimum(end, 10))
    unknown = Split.of(Window(4, 6), end, jnp.int32(9))  # what an index does not know is in it
    assert np.all(unknown.inside.mask(position)[:, 9:] == (position < end[:, None])[:, 9:])


def test_what_a_retrieval_takes():
    pool = jnp.zeros((1, 3, 4, 8))
    nothing = softmax.Partial(jnp.zeros((1, 1, 1, 8)), jnp.full((1, 1, 1), -jnp.inf))
    keys = KeyRange(jnp.zeros(1, jnp.int32), jnp.full(1, 9))
    held = Held(Pages(pool, pool, jnp.arange(3)))
    rows = Rows(jnp.zeros((1, 1, 1, 8)), held, keys, nothing, nothing.lse)
    assert rows.before(None) is rows
    assert int(rows.before(5).keys.high[0]) == 5
    assert rows.axis is None
    memory = LayerMemory(pool, pool, PageTable(jnp.arange(3)[None], jnp.full(1, 9)))
    asked = LayerQueries(jnp.zeros((1, 1, 1, 8)), memory, jnp.ones(1, jnp.int32))
    np.testing.assert_array_equal(asked.covered, [0])
    np.testing.assert_array_equal(asked.starts, [[0, 4, 8]])


def test_why_an_operation_was_passed_over():
    choice = Choice("scan", "xla", CPU, (("mosaic_gpu", "no GPU"),))
    assert passed_over(choice, "xla") is None
    assert passed_over(choice, "mosaic_gpu") == "scan: no GPU"
    assert abstract(2, 3).shape == (2, 3)
