"""Statistics of an evaluation. The problem is the unit: responses to one problem are not
independent evidence."""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 9999
# With fewer seeds nothing is said of training: rounding alone moves what one seed seems to show.
SEEDS_TO_JUDGE = 3


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def seeds_in_words(num: int) -> str:
    """How many seeds something rests on, in words where they are too few to judge by."""
    return {1: "one seed", 2: "two seeds"}.get(num, f"{num} seeds")


def pass_at_k(num_responses: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that k responses hold a correct one: 1 - C(n-c, k) / C(n,
    k)."""
    if not 0 <= num_correct <= num_responses or not 1 <= k <= num_responses:
        raise ValueError(
            f"need 0 <= correct <= n and 1 <= k <= n, got n={num_responses}, "
            f"correct={num_correct}, k={k}"
        )
    return 1 - comb(num_responses - num_correct, k) / comb(num_responses, k)


def mean_over_problems(values: Sequence[float]) -> Estimate:
    """The mean of one value a problem, with a bootstrap interval over problems."""
    return ratio_over_problems(values, [1.0] * len(values))


def ratio_over_problems(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The ratio of sums over problems, such as nats over tokens, with a bootstrap interval over
    problems."""
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


class Paired(NamedTuple):
    """The mean difference of two models over the same problems, and the p-value of Wilcoxon's
    signed-rank test."""

    difference: Estimate
    p_value: float


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """a - b of one value a problem, with a paired bootstrap interval over problems; p is 1 where
    all are equal."""
    from scipy.stats import wilcoxon

    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    p_value = 1.0
    if np.any(differences != 0):
        p_value = float(wilcoxon(differences).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    return Paired(mean_over_problems(differences.tolist()), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for that many tests (Holm, 1979): each times how many are not smaller,
    never decreasing."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def seeds_and_problems(values: Sequence[Sequence[float]]) -> Estimate:
    """The mean over training seeds [S] and problems [P] of a value, with an interval for both
    levels.

    The variances of the seeds' means and of the problems' means add up, and Student's t has the
    degrees of freedom of the sum (Satterthwaite, 1946). What single responses add is counted on
    both levels, which makes the interval a little too wide. Resampling the seeds instead would make
    it far too narrow: of three seeds' means, 25 % of all draws have one sign without any effect.
    With one seed the interval is over problems alone.
    """
    from scipy.stats import t

    table = np.asarray(values, dtype=float)
    if len(table) == 1:
        return mean_over_problems(table[0].tolist())
    levels = [means for means in (table.mean(axis=1), table.mean(axis=0)) if len(means) > 1]
    variances = [float(means.var(ddof=1)) / len(means) for means in levels]
    value, variance = float(table.mean()), sum(variances)
    if variance == 0:
        return Estimate(value, value, value)
    freedom = variance**2 / sum(
        v**2 / (len(means) - 1) for v, means in zip(variances, levels, strict=True)
    )
    half = float(t.ppf(0.975, freedom)) * variance**0.5
    return Estimate(value, value - half, value + half)
