"""Estimates of a KL from the log-probability that each model gives to what the student drew: a
token, or a span of tokens.

With k = log q/p at y ~ q (docs/theory.md, section 5; Tang & Munos, arXiv 2506.09477), the expected
gradient is that of

    k1 = k as a constant reward     -(-k - b) log q(y), the local reverse KL, with any baseline b
    that ignores y
    k2 = k^2 / 2, differentiated    the local reverse KL
    k3 = e^-k - 1 + k, differentiated    the forward KL, whatever it is called elsewhere
    k1, differentiated    zero; not offered
"""

from typing import Literal

from torch import Tensor

from potstill.config import Objective
from potstill.kl.terms import TokenStats

Estimator = Literal["k1", "k2", "k3"]


def log_ratio(stats: TokenStats) -> Tensor:
    """k [N] = log q(y) - log p(y) of the written tokens."""
    assert stats.student_log_prob_N is not None and stats.teacher_log_prob_N is not None
    return stats.student_log_prob_N - stats.teacher_log_prob_N


def estimate(k: Tensor, estimator: Estimator) -> Tensor:
    """The estimate of the KL, in nats."""
    if estimator == "k1":
        return k
    return k**2 / 2 if estimator == "k2" else (-k).exp() - 1 + k


def slope(k: Tensor, estimator: Estimator) -> Tensor:
    """The constant whose product with the gradient of log q(y) is the estimate's gradient."""
    return 1 - (-k).exp() if estimator == "k3" else k


def token_slope(stats: TokenStats, objective: Objective) -> Tensor:
    """That of each written token [N], its baseline subtracted."""
    slope_N = slope(log_ratio(stats), objective.estimator)
    if objective.baseline == "exact":
        # The reward is -k and its mean -KL(q || p), so that what is left of it is KL(q || p) - k.
        assert stats.reverse_kl_N is not None
        return slope_N - stats.reverse_kl_N
    return slope_N
