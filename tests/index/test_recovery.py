"""Keys that hold a share of the attention mass: the definition, and the promise on real keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alaya_jax.index import Scan, recover

DIM = 64
compiled = jax.jit(recover, static_argnames="head_dim")


def by_definition(scores, window_lse, seed, target):
    """Smallest beta >= 0 of one row, and its mass; float64."""
    weights = np.exp(scores / np.sqrt(DIM))
    window = np.exp(window_lse)
    total = weights.sum() + window
    best = max(scores.max(), seed)
    for beta in [0.0, *np.sort(best - scores)]:
        mass = (window + weights[scores >= best - beta].sum()) / total
        if beta >= 0 and mass >= target - 1e-9:
            return beta, mass
    raise AssertionError("all keys hold all mass")


@settings(max_examples=15)
@given(
    spread=st.floats(0.1, 60),
    window=st.one_of(st.none(), st.floats(-40, 40)),
    recovery=st.floats(0.01, 0.999),
    margin=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 2**31),
)
def test_equals_definition(spread, window, recovery, margin, seed):
    rng = np.random.default_rng(seed)
    scores = (spread * rng.standard_normal((2, 2, 3, 90))).astype(np.float32)
    best = np.full((2, 2, 3), -np.inf if window is None else window, np.float32)
    lse = best / np.sqrt(DIM) + (0 if window is None else 1.0)  # a window of e equal keys
    # Keys that are not eligible count for nothing.
    padded = np.concatenate([scores, np.full((2, 2, 3, 38), -np.inf, np.float32)], -1)
    found = compiled(padded, lse, best, recovery, DIM, margin)
    target = recovery + margin * (1 - recovery)
    resolution = np.sqrt(DIM) * np.log(128 / (1 - target)) * 2.0**-14 + 1e-4
    for row in np.ndindex(2, 2, 3):
        beta, mass = by_definition(scores[row].astype(np.float64), lse[row], best[row], target)
        assert -1e-3 <= found.beta[row] - beta <= resolution
        top = max(scores[row].max(), best[row])
        kept = np.asarray(found.kept[row])
        assert not kept[90:].any()
        np.testing.assert_array_equal(kept[:90], scores[row] >= top - found.beta[row])
        weights = np.exp(scores[row].astype(np.float64) / np.sqrt(DIM))
        share = (np.exp(lse[row]) + weights[kept[:90]].sum()) / (np.exp(lse[row]) + weights.sum())
        np.testing.assert_allclose(found.mass[row], share, rtol=1e-4)
        assert share >= target - 1e-5
        assert mass <= share + 1e-5


def test_recovery_of_one_keeps_every_key(rng):
    scores = jnp.asarray(90 * rng.standard_normal((1, 1, 2, 50)), jnp.float32)
    nothing = jnp.full((1, 1, 2), -jnp.inf)
    found = compiled(scores.at[..., 40:].set(-jnp.inf), nothing, nothing, 1.0, DIM)
    assert np.all(np.asarray(found.kept)[..., :40])
    assert not np.any(np.asarray(found.kept)[..., 40:])
    np.testing.assert_allclose(found.mass, 1.0)


def test_no_key_at_all():
    nothing = jnp.full((1, 1, 2), -jnp.inf)
    found = compiled(jnp.full((1, 1, 2, 8), -jnp.inf), nothing, nothing, 0.9, DIM)
    assert not np.any(found.kept)
    np.testing.assert_array_equal(found.mass, 1.0)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_key_that_may_hold_much_is_read(heads, rng):
    """One key in a thousand scores as much more as its error bar allows: the sum of what is
    expected of all says nothing of it, and it holds more than may be lost.
    """
    rows = (heads, 3 - heads, 4)
    scores = np.sqrt(DIM) * rng.standard_normal((*rows, 1000)).astype(np.float32)
    scores[..., :8] += 12 * np.sqrt(DIM)  # the keys that are attended to
    estimate, error = scores.copy(), np.float32(3 * np.sqrt(DIM))
    scores[..., 500] = scores.max(-1) - 2 * np.sqrt(DIM)
    estimate[..., 500] = scores[..., 500] - 0.99 * error

    def held(kept):
        return jax.nn.logsumexp(jnp.where(kept, scores, -jnp.inf) / np.sqrt(DIM), axis=-1)

    of_row, of_key = jnp.ones(rows), jnp.full((heads, 1000), error)
    scan = Scan(jnp.asarray(estimate), (of_row,), (of_key,), deviations=4.0)
    nothing = jnp.full(rows, -jnp.inf)
    kept = jax.jit(lambda: recover(scan, nothing, nothing, 0.95, DIM, held=held).kept)()
    weights = np.exp((scores - scores.max(-1, keepdims=True)) / np.sqrt(DIM), dtype=np.float64)
    mass = np.where(kept, weights, 0).sum(-1) / weights.sum(-1)
    assert np.all(kept[..., 500])
    assert np.all(mass >= 0.95)
    assert np.mean(kept) < 0.02


@pytest.mark.parametrize("recovery", [0.9, 0.95, 0.98])
@pytest.mark.parametrize("layer", ["real 6", "real 20"])
def test_promise_holds_on_real_keys(all_keys, layer, recovery):
    """Of a 4-bit sketch, outside a window: the true mass, and far fewer keys than a fixed k."""
    paged = all_keys[layer](None)
    n = paged.length
    true = paged.scores()
    weights = np.exp((true - true.max(-1, keepdims=True)) / np.sqrt(DIM))
    weights /= weights.sum(-1, keepdims=True)
    outside = slice(64, n - 128)
    window = np.concatenate([true[..., :64], true[..., n - 128 :]], -1)
    lse = np.logaddexp.reduce(window / np.sqrt(DIM), -1).astype(np.float32)
    estimate = paged.ask(paged.sketch(), low=64, high=n - 128).estimate
    found = compiled(estimate, lse, window.max(-1).astype(np.float32), recovery, DIM)
    kept = np.asarray(found.kept)[..., outside]
    mass = 1 - np.where(kept, 0, weights[..., outside]).sum(-1)
    assert np.mean(mass >= recovery) >= 0.98  # 72 rows: one may miss
    assert mass.min() >= recovery - 0.2 * (1 - recovery)
    assert np.abs(mass - np.asarray(found.mass)).mean() < 0.01
    assert kept.mean() < 0.5
