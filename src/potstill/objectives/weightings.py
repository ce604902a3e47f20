"""Weightings by name: functions of a few lines from what is known of each token to its loss terms.

Each takes `Tokens` and its arguments, and gives the terms of these tokens. Weights are constants of
the gradient. A function that looks at other tokens of a rollout is listed in TOGETHER: it is called
with whole rollouts, where the others may be called with any tokens. What each does, and the papers,
are in `potstill.config.WEIGHTINGS`; `potstill methods` prints them.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from potstill.config import Objective
from potstill.kl.terms import LossTerms, TokenStats
from potstill.kl.weights import terms_of_rows
from potstill.objectives.tokens import Tokens
from potstill.tasks.own import OwnFunction, own_task
from potstill.types import DataError

TokenWeighting = Callable[[Tokens], LossTerms]


def entropy_aware(tokens: Tokens, above: float) -> LossTerms:
    """Forward KL at its weight f where H(p) > `above`, reverse KL at 1 - f there and at 1
    elsewhere."""
    assert tokens.stats.teacher_entropy_N is not None
    is_above_N = (tokens.stats.teacher_entropy_N > above).to(tokens.stats.teacher_entropy_N.dtype)
    forward, reverse = tokens.terms.forward, tokens.terms.reverse
    return LossTerms(forward=forward * is_above_N, reverse=reverse + forward * (1 - is_above_N))


def todi(tokens: Tokens) -> LossTerms:
    """Forward KL at a = sigmoid(log p(y) - log q(y)), reverse KL at 1 - a."""
    # Not torch.sigmoid, which on a CPU rounds an element by where it lies: in a vector, or in the
    # rest after them. Groups of rows, which memory decides on, would then change bits.
    forward_N = 1 / (1 + (-_log_ratio(tokens)).exp())
    return LossTerms(forward=forward_N, reverse=1 - forward_N)


def akl(tokens: Tokens, mass: float) -> LossTerms:
    """Forward KL at g, the share of sum |p - q| that is on the teacher's head of `mass`, reverse KL
    at 1 - g."""
    assert tokens.head_share_N is not None
    return LossTerms(forward=tokens.head_share_N, reverse=1 - tokens.head_share_N)


def by_writer(tokens: Tokens) -> LossTerms:
    """Forward KL on the teacher's tokens, reverse KL on the student's."""
    reverse_N = tokens.is_student_N.to(tokens.stats.student_entropy_N.dtype)
    return LossTerms(forward=1 - reverse_N, reverse=reverse_N)


def first_tokens(tokens: Tokens, num: float) -> LossTerms:
    """The terms times 1 at t < `num`, times 0 from there on."""
    return split(tokens, at=num, before=1.0, after=0.0)


def split(tokens: Tokens, at: float, before: float, after: float) -> LossTerms:
    """The terms times `before` at t < `at`, times `after` from there on."""
    is_before_N = (tokens.position_N < at).to(tokens.stats.student_entropy_N.dtype)
    return tokens.terms.scaled(before * is_before_N + after * (1 - is_before_N))


def position_decay(tokens: Tokens, half_life: float) -> LossTerms:
    """The terms times 2^(-t / `half_life`)."""
    position_N = tokens.position_N.to(tokens.stats.student_entropy_N.dtype)
    return tokens.terms.scaled((-position_N / half_life).exp2())


def importance(tokens: Tokens, gamma: float) -> LossTerms:
    """The terms times 1 + `gamma` (1 - A_t / A), with A_t the sum of |log p(y) - log q(y)| over the
    rollout's tokens before t, and A over all."""

    def share_before(gaps: Tensor) -> Tensor:
        return (gaps.cumsum(0) - gaps) / gaps.sum().clamp(min=torch.finfo(gaps.dtype).tiny)

    share_N = _by_rollout(share_before, _log_ratio(tokens).abs(), tokens)
    return tokens.terms.scaled(1 + gamma * (1 - share_N))


def prefix_ratio(tokens: Tokens, cap: float) -> LossTerms:
    """The terms times the probability of the rollout's tokens before t by the student over that by
    whoever drew them, at most `cap`. Tokens of which that is not known, such as those of one end
    class, count as alike."""
    told_N, ours_N = tokens.engine_log_prob_N, tokens.stats.student_log_prob_N
    assert told_N is not None and ours_N is not None
    log_ratio_N = torch.where(told_N.isnan(), 0.0, ours_N - told_N)
    before_N = _by_rollout(lambda ratios: ratios.cumsum(0) - ratios, log_ratio_N, tokens)
    return tokens.terms.scaled(before_N.exp().clamp(max=cap))


def least_likely(tokens: Tokens, share: float, constant: float) -> LossTerms:
    """-`constant` as the reward of the round(`share` T) tokens of a rollout of T that were least
    likely when they were written, of equals the first."""

    def is_chosen(log_probs: Tensor) -> Tensor:
        num = round(share * len(log_probs))
        places = log_probs.argsort(stable=True)[:num]
        return torch.zeros_like(log_probs).index_fill(0, places, 1)

    assert tokens.sampling_log_prob_N is not None
    is_chosen_N = _by_rollout(is_chosen, tokens.sampling_log_prob_N, tokens)
    return LossTerms(cross_entropy=-constant * is_chosen_N)


def bounded_reward(tokens: Tokens, power: float) -> LossTerms:
    """(p(y)^`power` - q(y)^`power`) / `power` as the reward of a token."""
    log_p_N, log_q_N = _log_probs(tokens.stats)
    return LossTerms(cross_entropy=((power * log_p_N).exp() - (power * log_q_N).exp()) / power)


def sign_gate(tokens: Tokens, agree: float, disagree: float) -> LossTerms:
    """The terms times `agree` where log p(y) > log q(y) just if s >= 1/2, else times `disagree`."""
    ratio_N = _log_ratio(tokens)
    assert tokens.score_N is not None
    agrees_N = ((ratio_N > 0) == (tokens.score_N >= 0.5)).to(ratio_N.dtype)
    return tokens.terms.scaled(agree * agrees_N + disagree * (1 - agrees_N))


def forward_if_right(tokens: Tokens) -> LossTerms:
    """Forward KL where s >= 1/2, reverse KL elsewhere."""
    assert tokens.score_N is not None
    forward_N = (tokens.score_N >= 0.5).to(tokens.score_N.dtype)
    return LossTerms(forward=forward_N, reverse=1 - forward_N)


def pass_rate(tokens: Tokens) -> LossTerms:
    """The terms times r (1 - r), with r the mean score of the prompt's responses."""
    rate_N = tokens.group_score_N
    assert rate_N is not None
    return tokens.terms.scaled(rate_N * (1 - rate_N))


WEIGHTING_FUNCTIONS: dict[str, Callable[..., LossTerms]] = {
    "entropy-aware": entropy_aware,
    "todi": todi,
    "akl": akl,
    "by-writer": by_writer,
    "first-tokens": first_tokens,
    "split": split,
    "position-decay": position_decay,
    "importance": importance,
    "prefix-ratio": prefix_ratio,
    "least-likely": least_likely,
    "bounded-reward": bounded_reward,
    "sign-gate": sign_gate,
    "forward-if-right": forward_if_right,
    "pass-rate": pass_rate,
}
TOGETHER = ("importance", "prefix-ratio", "least-likely")


def make_weighting(objective: Objective) -> TokenWeighting | None:
    """The function of `objective.weights`. Raises DataError for one of the user's own that is not
    there."""
    name, arguments = objective.weights, objective.weighting_arguments
    if name is None:
        return None
    if own_task(name) is None:
        return functools.partial(WEIGHTING_FUNCTIONS[name], **arguments)
    return OwnWeighting(OwnFunction(name, "weights"), arguments)


def weighs_together(objective: Objective) -> bool:
    """Whether the weighting looks at other tokens of a rollout, as one of the user's own may."""
    return objective.weights in TOGETHER or own_task(objective.weights) is not None


class OwnWeighting:
    """A weighting of the user's own, whose terms are checked. Raises DataError for those that do
    not fit."""

    def __init__(self, function: OwnFunction, arguments: dict[str, Any]):
        self.function, self.arguments = function, arguments

    def __call__(self, tokens: Tokens) -> LossTerms:
        rows = slice(0, len(tokens.position_N))
        mixture_weight = tokens.terms.mixture_weight if tokens.terms.has_mixture else None

        def terms(stats: TokenStats, rows: slice) -> LossTerms:
            return self.function(tokens, **self.arguments)

        try:
            return terms_of_rows(terms, tokens.stats, rows, mixture_weight)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{self.function.what}: {error}") from None


def _by_rollout(function: Callable[[Tensor], Tensor], values_N: Tensor, tokens: Tokens) -> Tensor:
    """A function of the values of one rollout at a time, [N]."""
    counts = tokens.rollout_N.unique_consecutive(return_counts=True)[1].tolist()
    return torch.cat([values_N[:0], *map(function, values_N.split(counts))])


def _log_probs(stats: TokenStats) -> tuple[Tensor, Tensor]:
    """Log-probability [N] of the written token, the teacher's and the student's."""
    assert stats.teacher_log_prob_N is not None and stats.student_log_prob_N is not None
    return stats.teacher_log_prob_N, stats.student_log_prob_N


def _log_ratio(tokens: Tokens) -> Tensor:
    log_p_N, log_q_N = _log_probs(tokens.stats)
    return log_p_N - log_q_N
