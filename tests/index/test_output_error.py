"""Keys that keep the output's error below a bound: the definitions in float64, and the extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alaya_jax.index import Look, Scan, Summaries, keep_below
from alaya_jax.index.output_error import FACTOR, spread_of

DIM, SIZE, PAGES = 32, 8, 20


def spread_by_definition(v, mean):
    """Of one page's values [n, D]: R, and R |C| / tr C."""
    apart = (v - mean).astype(np.float64)
    products = apart @ apart.T
    n = len(v)
    spread = np.sqrt(np.trace(products) / max(n, 1))
    np.fill_diagonal(products, 0)
    size = np.sqrt(np.sum(products**2) / max(n * (n - 1), 1))
    return np.array([spread, min(size / spread, spread) if spread else 0])


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e15])
def test_spread_is_by_definition(rng, scale):
    v = scale * rng.standard_normal((2, 4, 16, 32)).astype(np.float32)
    filled = np.array([16, 7, 1, 0])
    valid = (np.arange(16) < filled[:, None])[None, :, :, None]
    v = np.where(valid, v, np.nan).astype(np.float32)  # a page holds whatever was there before
    mean = np.zeros((2, 4, 32), np.float32)
    for head, page in np.ndindex(2, 3):
        mean[head, page] = v[head, page, : filled[page]].mean(0)
    found = np.asarray(jax.jit(spread_of)(v, valid, mean))
    for at in np.ndindex(2, 4):
        want = spread_by_definition(v[at][: filled[at[1]]], mean[at])
        np.testing.assert_allclose(found[at], want, rtol=1e-5, atol=scale * 1e-6)


def test_spread_in_one_direction(rng):
    """Of values on a line their distance from the mean; of any others less, the less alike."""
    n, dim = 512, 64
    along = rng.standard_normal((n, 1)) * rng.standard_normal(dim)
    apart = rng.standard_normal((n, dim))
    v = np.stack([along - along.mean(0), apart - apart.mean(0)])[None].astype(np.float32)
    found = np.asarray(spread_of(v, np.ones((1, 2, n, 1), bool), np.zeros((1, 2, dim))))[0]
    distance = np.sqrt(np.mean(np.sum(v * v, -1), -1))[0]
    np.testing.assert_allclose(found[:, 0], distance, rtol=1e-4)
    line, sphere = found[:, 1] / distance
    assert line == pytest.approx(1, rel=0.05)
    assert sphere == pytest.approx(dim**-0.5, rel=0.05)


def output(xp, values, weight, mask):
    """Sum of weights of what is read and of the rest, and the output."""
    v, mean, window, near = values
    read, rest = xp.where(mask, weight, 0), xp.where(mask, 0, weight)
    total = window + read.sum(-1), rest.sum(-1)
    out = window * near + read @ v.reshape(-1, DIM) + rest @ xp.repeat(mean, SIZE, axis=0)
    return *total, out / (total[0] + total[1])[..., None]


@jax.jit
def found(scores, sigma, spread, known, values, error):
    """What is kept if scores may err by `sigma` in the exponent."""

    def look(weights, mask):
        weight = weights.weight * jnp.exp(DIM**-0.5 * weights.best)[..., None]
        read, _, out = output(jnp, values, weight, mask)
        return Look(jnp.linalg.norm(out, axis=-1), jnp.log(read))

    of_row = jnp.full(scores.shape[:-1], sigma * DIM**0.5)
    scan = Scan(scores, (of_row,), (jnp.ones((1, scores.shape[-1])),))
    best = jnp.zeros(scores.shape[:-1])
    return keep_below(scan, Summaries(spread, known), best, error, DIM, look)


class Case:
    """Random keys of one kv head and two query heads, in full pages; scores that are exact."""

    def __init__(self, seed, spread=2.0, window=1.0, alike=0.0):
        rng = np.random.default_rng(seed)
        self.scores = (spread * DIM**0.5 * rng.standard_normal((1, 2, 3, PAGES * SIZE))).astype("f")
        v = rng.standard_normal((PAGES, SIZE, DIM)) + rng.standard_normal((PAGES, 1, DIM))
        self.v = (v + alike * rng.standard_normal(DIM)).astype(np.float32)
        self.mean = self.v.mean(1)
        self.window = window  # weight of one key whose value is this:
        self.near = rng.standard_normal(DIM).astype(np.float32)
        apart = [spread_by_definition(*page) for page in zip(self.v, self.mean, strict=True)]
        self.spread = np.asarray(apart, np.float32)[None]
        self.known = np.ones(PAGES * SIZE, bool)

    def find(self, error, sigma=0.0):
        error = np.broadcast_to(np.float32(error), self.scores.shape[:-1])
        values = self.v, self.mean, np.float32(self.window), self.near
        return found(self.scores, np.float32(sigma), self.spread, self.known, values, error)

    def estimate(self, kept):
        """The estimated error of each row, float64; and the true one."""
        weight = np.exp(self.scores.astype(np.float64) / DIM**0.5)
        values = self.v, self.mean, self.window, self.near
        read, rest, out = output(np, values, weight, kept)
        unread = np.where(kept, 0, weight).reshape(*weight.shape[:-1], PAGES, SIZE)
        varies = unread.var(-1) * SIZE * SIZE / (SIZE - 1)
        apart, along = np.moveaxis(self.spread[0], -1, 0)
        missing = np.sqrt((varies * apart**2).sum(-1)) + (np.sqrt(varies) * along).sum(-1)
        missing = FACTOR * missing
        full = output(np, values, weight, np.ones_like(kept))[-1]
        true = np.linalg.norm(out - full, axis=-1) / np.linalg.norm(full, axis=-1)
        return missing, missing / (read + rest) / np.linalg.norm(out, axis=-1), true


@settings(max_examples=15)
@given(
    spread=st.floats(0.1, 8),
    window=st.sampled_from([1e-6, 1.0, 1e4]),
    alike=st.sampled_from([0.0, 2.0]),
    error=st.floats(0.003, 0.5),
    seed=st.integers(0, 2**31),
)
def test_the_bound_holds_with_few_keys(spread, window, alike, error, seed):
    case = Case(seed, spread, window, alike)
    found = case.find(error)
    kept = np.asarray(found.kept)
    missing, estimated, _ = case.estimate(kept)
    np.testing.assert_allclose(np.exp(found.missing), missing, rtol=2e-3, atol=1e-3 * window)
    # The bound is of an output that may still err by as much.
    assert (estimated <= error * (1 + error) + 1e-3).all()
    # No key of a larger weight is left out.
    least = np.min(np.where(kept, case.scores, np.inf), -1)
    assert (np.max(np.where(kept, -np.inf, case.scores), -1) <= least).all()
    # With a good part of the kept keys less, it would not hold.
    for row in np.ndindex(*kept.shape[:-1]):
        fewer = np.zeros_like(kept)
        n = int(0.5 * kept[row].sum()) - 8
        if n >= 0:
            fewer[row][np.argsort(-case.scores[row])[:n]] = True
            assert case.estimate(fewer)[1][row] > 0.9 * error * (1 - error) ** 2


def test_an_error_of_zero_keeps_every_key():
    case = Case(3)
    case.scores[..., 100:] = -np.inf
    kept = np.asarray(case.find(0.0).kept)
    assert kept[..., :100].all()
    assert not kept[..., 100:].any()


def test_each_head_has_its_own_bound():
    """[K, G, T], or what broadcasts to it."""
    case = Case(4)
    kept = np.asarray(case.find(np.array([0.01, 0.3])[None, :, None]).kept)
    for head, error in enumerate((0.01, 0.3)):
        np.testing.assert_array_equal(kept[:, head], case.find(error).kept[:, head])
    assert kept[0, 0].sum() > 2 * kept[0, 1].sum()


@pytest.mark.parametrize(
    "change",
    [
        lambda case: case.scores.fill(-np.inf),  # no key at all
        lambda case: case.scores.fill(5.0),  # weights of a page are equal: its mean is exact
        lambda case: case.spread.fill(0.0),  # so are its values
    ],
    ids=["no key", "equal weights", "equal values"],
)
def test_no_key_is_kept_where_none_is_needed(change):
    case = Case(5)
    change(case)
    found = case.find(0.01)
    assert not np.any(found.kept)
    assert np.all(np.asarray(found.missing) < -5)


def test_keys_without_a_mean_do_not_count_as_unread():
    case = Case(6)
    case.known[: PAGES * SIZE // 2] = False
    found = case.find(0.02)
    case.spread[:, : PAGES // 2] = 0
    missing = case.estimate(np.asarray(found.kept))[0]
    np.testing.assert_allclose(np.exp(found.missing), missing, rtol=2e-3)


def test_scores_that_may_err_take_more_keys():
    """Where they may err by much, all but every key: a weight that is not known answers nothing."""
    case = Case(7)
    exact, small, large = (np.mean(case.find(0.05, sigma).kept) for sigma in (0.0, 0.5, 5.0))
    assert exact < small < large
    assert large > 0.9
