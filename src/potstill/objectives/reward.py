"""The reward: scores of a step's responses, what each is worth beside its group, and the policy
gradient as a weight of each token's log-probability."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from potstill.config import Reward
from potstill.evaluation.quality import Scorer
from potstill.objectives.tokens import Tokens
from potstill.types import Credit, Rollout

# As TRL and verl add it to a group's standard deviation.
LEAST_DEVIATION = 1e-4


def with_credit(
    rollouts: Sequence[Rollout], texts: Sequence[str], grader: Scorer, reward: Reward
) -> list[Rollout]:
    """The same rollouts, each with its credit. Those of a group follow each other."""
    grades = grader.grade([rollout.prompt.example for rollout in rollouts], texts)
    credited = []
    for first in range(0, len(rollouts), reward.group_size):
        group = list(rollouts[first : first + reward.group_size])
        scores = [grade.score for grade in grades[first : first + reward.group_size]]
        is_cut = [rollout.stop == "length" for rollout in group]
        for rollout, credit in zip(group, credits_of(scores, is_cut, reward), strict=True):
            credited.append(dataclasses.replace(rollout, credit=credit))
    return credited


def credits_of(scores: Sequence[float], is_cut: Sequence[bool], reward: Reward) -> list[Credit]:
    """The credit of each response of one group; `is_cut` says which the window cut.

    The standard deviation is that of a sample, over one less than the group's size.
    """
    if reward.truncated == "zero":
        scores = [0.0 if cut else score for score, cut in zip(scores, is_cut, strict=True)]
    counts = [reward.truncated != "mask" or not cut for cut in is_cut]
    counted = [score for score, counted in zip(scores, counts, strict=True) if counted]
    mean = math.fsum(counted) / len(counted) if counted else 0.0
    deviation = 0.0
    # Scores that are alike can differ from their mean by rounding.
    if len(set(counted)) > 1:
        squares = math.fsum((score - mean) ** 2 for score in counted)
        deviation = math.sqrt(squares / (len(counted) - 1))
    scale = deviation + LEAST_DEVIATION if reward.advantage == "std" else 1.0
    baseline = 0.0 if reward.advantage == "score" else mean
    return [
        Credit(
            score=score,
            group_score=mean,
            group_deviation=deviation,
            advantage=(score - baseline) / scale if is_counted else 0.0,
        )
        for score, is_counted in zip(scores, counts, strict=True)
    ]


def with_log_probs(
    rollouts: Sequence[Rollout], log_probs: Mapping[int, tuple[float, ...]]
) -> list[Rollout]:
    """The same rollouts, those that are new with the student's log-probabilities by their
    places."""
    known = list(rollouts)
    for place, values in log_probs.items():
        known[place] = dataclasses.replace(known[place], log_probs=values)
    return known


def policy_gradient(tokens: Tokens, reward: Reward) -> Tensor:
    """The weight [N] of each token's cross-entropy: `surrogate_weight` of its ratio and its
    advantage, times that of the reward."""
    ratio_N, advantage_N = _ratio_and_advantage(tokens)
    return reward.weight * surrogate_weight(ratio_N, advantage_N, reward.clip)


def surrogate_weight(ratio_N: Tensor, advantage_N: Tensor, clip: tuple[float, float]) -> Tensor:
    """The constant [N] by which the gradient of -log q(y) is that of the clipped surrogate
    -min(r A, clip(r) A) of the advantage A (arXiv 1707.06347).

    r is the ratio of the student's probability to that when the rollout was new. The constant is A
    r where r is not clipped, and 0 where it is (docs/theory.md, section 9).
    """
    is_clipped_N = is_clipped(ratio_N, advantage_N, clip)
    return torch.where(is_clipped_N, 0.0, advantage_N * ratio_N)


def is_clipped(ratio_N: Tensor, advantage_N: Tensor, clip: tuple[float, float]) -> Tensor:
    """Whether each token [N] has gone as far as it may in the direction of its advantage."""
    low, high = clip
    is_too_low_N = (advantage_N < 0) & (ratio_N < 1 - low)
    return is_too_low_N | (advantage_N > 0) & (ratio_N > 1 + high)


def num_clipped(tokens: Tokens, reward: Reward) -> int:
    """How many of the tokens have gone so far."""
    return int(is_clipped(*_ratio_and_advantage(tokens), reward.clip).sum())


def _ratio_and_advantage(tokens: Tokens) -> tuple[Tensor, Tensor]:
    now_N, then_N = tokens.stats.student_log_prob_N, tokens.sampling_log_prob_N
    assert now_N is not None and then_N is not None and tokens.advantage_N is not None
    return (now_N - then_N).exp(), tokens.advantage_N


def reward_sums(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Sums over the rollouts of a rank that are scored: of the scores, of their squares, and how
    many are of groups that differ in score; nothing where none is."""
    credits = [rollout.credit for rollout in rollouts if rollout.credit is not None]
    if not credits:
        return {}
    return {
        "reward": sum(credit.score for credit in credits),
        "reward_squared": sum(credit.score**2 for credit in credits),
        "groups_with_signal": float(sum(credit.group_deviation > 0 for credit in credits)),
    }
