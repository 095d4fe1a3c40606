"""Paired comparisons of two policies over the same questions."""

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p-value of McNemar's test.

    Under the null hypothesis a question that only one of two policies answers is as likely the
    one's as the other's.

    Args:
      lost: questions that only the first answers.
      gained: questions that only the second answers.
    """
    n, few = lost + gained, min(lost, gained)
    tail = sum(math.comb(n, i) for i in range(few + 1)) / 2**n
    return min(1.0, 2 * tail)


def bootstrap(
    differences: Sequence[float], groups: Sequence[str], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """A percentile interval of a mean of paired differences.

    Whole groups are drawn, since questions about one text are not independent of each other.

    Args:
      differences: of scores, a question each; at least one.
      groups: the text of each.
      level: of confidence.
      seed: of the draws.
    """
    values = np.asarray(differences, np.float64)
    names, which = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(which, values)
    counts = np.bincount(which)
    drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
