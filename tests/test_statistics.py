import itertools
from math import comb

import numpy as np
import pytest
import scipy.stats

from potstill.statistics import (
    holm,
    mean_over_problems,
    paired,
    pass_at_k,
    ratio_over_problems,
    seeds_and_problems,
)


@pytest.mark.parametrize("num_responses", [1, 4, 6])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_correct_response(num_responses):
    for num_correct in range(num_responses + 1):
        responses = [True] * num_correct + [False] * (num_responses - num_correct)
        for k in range(1, num_responses + 1):
            subsets = list(itertools.combinations(responses, k))
            assert pass_at_k(num_responses, num_correct, k) == pytest.approx(
                np.mean([any(s) for s in subsets])
            )


def test_pass_at_k_is_unbiased():
    p, n, k = 0.13, 16, 5
    chances = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
    assert expected == pytest.approx(1 - (1 - p) ** k)


def test_pass_at_k_refuses_nonsense():
    for arguments in [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)]:
        with pytest.raises(ValueError, match="need 0 <="):
            pass_at_k(*arguments)


def test_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    estimate = mean_over_problems(list(values))
    half_width = 1.96 * values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half_width, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + half_width, abs=0.03)


def test_ratio_is_of_sums_and_resamples_problems_together():
    estimate = ratio_over_problems([2.0, 6.0, 4.0], [1.0, 3.0, 2.0])
    assert estimate == pytest.approx((2.0, 2.0, 2.0))


def test_equal_values_have_no_width():
    assert mean_over_problems([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert mean_over_problems([0.7]) == (0.7, 0.7, 0.7)


def test_paired_differences_and_their_test():
    rng = np.random.default_rng(0)
    a, b = rng.random(40), rng.random(40)
    found = paired(a.tolist(), b.tolist())
    assert found.difference.value == pytest.approx((a - b).mean())
    assert found.p_value == pytest.approx(scipy.stats.wilcoxon(a - b).pvalue)
    # By brute force: of seven differences of one sign all 2^7 signs are as likely, and two are as
    # extreme.
    assert paired([1, 2, 3, 4, 5, 6, 7], [0.0] * 7).p_value == pytest.approx(2 / 2**7)
    assert paired([1.0, 2.0], [1.0, 2.0]) == ((0.0, 0.0, 0.0), 1.0)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(
    ("num_seeds", "of_seeds", "least"), [(24, 0.5, 0.93), (5, 0.1, 0.93), (3, 0.5, 0.90)]
)
def test_intervals_over_seeds_and_problems_cover(num_seeds, of_seeds, least):
    """At least 95 % - 2 % where seeds and problems both vary, a little less where three seeds are
    all that varies."""
    rng = np.random.default_rng(1)
    num_trials = 600
    hits = problems_alone = 0
    for _ in range(num_trials):
        seeds, problems = rng.normal(0, of_seeds, (num_seeds, 1)), rng.normal(0, 1, (1, 60))
        table = 3 + seeds + problems + rng.normal(0, 0.3, (num_seeds, 60))
        found = seeds_and_problems(table.tolist())
        hits += found.low <= 3 <= found.high
        half = 1.96 * table[0].std() / 60**0.5
        problems_alone += abs(table[0].mean() - 3) <= half
    assert least <= hits / num_trials <= 0.97
    if of_seeds == 0.5:
        assert problems_alone / num_trials < 0.7


def test_intervals_over_many_seeds_and_problems_are_those_of_the_bootstrap():
    rng = np.random.default_rng(3)
    table = (
        3 + rng.normal(0, 0.5, (40, 1)) + rng.normal(0, 1, (1, 60)) + rng.normal(0, 0.3, (40, 60))
    )
    draws = [table[rng.integers(0, 40, 40)][:, rng.integers(0, 60, 60)].mean() for _ in range(3000)]
    found = seeds_and_problems(table.tolist())
    assert found.value == pytest.approx(table.mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.05)


def test_seeds_alone_are_students_t_and_one_seed_is_the_bootstrap_over_problems():
    values = [0.1, 0.4, 0.25, 0.3]
    expected = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert seeds_and_problems([[v] for v in values])[1:] == pytest.approx(expected)
    assert seeds_and_problems([values]) == mean_over_problems(values)
    assert seeds_and_problems([[0.5, 0.5], [0.5, 0.5]]) == (0.5, 0.5, 0.5)


def test_intervals_over_problems_cover():
    rng = np.random.default_rng(2)
    found = [mean_over_problems(rng.binomial(8, rng.beta(2, 2, 80)) / 8) for _ in range(500)]
    assert 0.92 <= np.mean([each.low <= 0.5 <= each.high for each in found]) <= 0.97
