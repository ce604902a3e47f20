"""Estimates of a KL from the log-probability that each model gives to the token which the student
drew.

With k = log q/p at y ~ q (docs/theory.md, section 5; Tang & Munos, arXiv 2506.09477), the expected
gradient is that of

    k1 = k as a constant reward     -(-k - b) log q(y), the local reverse KL, with any baseline b
    that ignores y
    k2 = k^2 / 2, differentiated    the local reverse KL
    k3 = e^-k - 1 + k, differentiated    the forward KL, whatever it is called elsewhere
    k1, differentiated    zero; not offered
"""

from torch import Tensor

from potstill.config import Objective
from potstill.kl.terms import TokenStats


def log_ratio(stats: TokenStats) -> Tensor:
    """k [N] = log q(y) - log p(y) of the written tokens."""
    assert stats.student_log_prob_N is not None and stats.teacher_log_prob_N is not None
    return stats.student_log_prob_N - stats.teacher_log_prob_N


def estimate(stats: TokenStats, objective: Objective) -> Tensor:
    """The estimate of the KL [N], in nats."""
    k_N = log_ratio(stats)
    if objective.estimator == "k1":
        return k_N
    return k_N**2 / 2 if objective.estimator == "k2" else (-k_N).exp() - 1 + k_N


def slope(stats: TokenStats, objective: Objective) -> Tensor:
    """The constant [N] whose product with the gradient of log q(y) is the estimate's gradient."""
    k_N = log_ratio(stats)
    if objective.estimator == "k3":
        return 1 - (-k_N).exp()
    if objective.baseline == "exact":
        # The reward is -k and its mean -KL(q || p), so that what is left of it is KL(q || p) - k.
        assert stats.reverse_kl_N is not None
        return k_N - stats.reverse_kl_N
    return k_N
