"""Statistics of an evaluation. The problem is the unit: responses to one problem are not independent evidence."""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 9999


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def pass_at_k(num_responses: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that k responses hold a correct one: 1 - C(n-c, k) / C(n, k)."""
    if not 0 <= num_correct <= num_responses or not 1 <= k <= num_responses:
        raise ValueError(f"need 0 <= correct <= n and 1 <= k <= n, got n={num_responses}, correct={num_correct}, k={k}")
    return 1 - comb(num_responses - num_correct, k) / comb(num_responses, k)


def mean_over_problems(values: Sequence[float]) -> Estimate:
    """The mean of one value a problem, with a bootstrap interval over problems."""
    return ratio_over_problems(values, [1.0] * len(values))


def ratio_over_problems(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The ratio of sums over problems, such as nats over tokens, with a bootstrap interval over problems."""
    from scipy.stats import bootstrap

    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    value = float(above.sum() / below.sum())
    if len(above) < 2 or (np.ptp(above) == 0 and np.ptp(below) == 0):
        return Estimate(value, value, value)

    def ratio(above, below, axis):
        return above.sum(axis=axis) / below.sum(axis=axis)

    interval = bootstrap(
        (above, below),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
