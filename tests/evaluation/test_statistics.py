"""Paired tests against known values."""

import numpy as np
import pytest

from alaya_jax.evaluation.statistics import bootstrap, mcnemar


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 0, 1.0),
        (5, 0, 0.0625),  # 2 / 2**5
        (8, 1, 0.0390625),  # 2 (1 + 9) / 2**9
        (15, 4, 0.01921082),  # scipy.stats.binomtest(4, 19).pvalue
    ],
)
def test_mcnemar(lost, gained, p):
    assert mcnemar(lost, gained) == pytest.approx(p, rel=1e-6)
    assert mcnemar(gained, lost) == mcnemar(lost, gained)


def test_an_interval_is_as_wide_as_theory_says():
    differences = np.random.default_rng(1).normal(0.2, 1.0, 400)
    low, high = bootstrap(differences.tolist(), [str(i) for i in range(400)])
    half = 1.96 * differences.std() / 20
    assert low == pytest.approx(differences.mean() - half, abs=0.02)
    assert high == pytest.approx(differences.mean() + half, abs=0.02)


def test_questions_of_one_text_count_as_one():
    """Each twenty times: as wide as without."""
    differences = np.random.default_rng(1).normal(0.2, 1.0, 40)
    once = bootstrap(differences.tolist(), [str(i) for i in range(40)])
    often = bootstrap(np.repeat(differences, 20).tolist(), [str(i // 20) for i in range(800)])
    assert often == pytest.approx(once)


def test_one_text_has_no_spread():
    assert bootstrap([1.0, 0.0], ["a", "a"]) == (0.5, 0.5)
