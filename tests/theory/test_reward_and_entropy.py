"""The identities of rewards and of entropy: a mistake in any one of them shows."""

import dataclasses

import pytest
import torch
from sampled import some

from potstill.kl.terms import LossTerms
from potstill.theory import entropy, reward
from potstill.theory.enumeration import Table


def all_checks(module):
    """The checks of one module, one after the other."""
    if module is entropy:
        return entropy.entropy_identities()
    return reward.reward_identities(Table(seed=1), Table(seed=2, spread=1.5))


def with_terms(module, change):
    """Training's pass takes other terms than it is told."""

    def mutate(monkeypatch):
        real = module.fused_loss

        def wrong(hidden, head, teacher, teacher_head, terms, **options):
            return real(hidden, head, teacher, teacher_head, change(terms), **options)

        monkeypatch.setattr(module, "fused_loss", wrong)

    return mutate


def with_constant(module, **constants):
    def mutate(monkeypatch):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)

    return mutate


def without_lengths(monkeypatch):
    real = reward._over_groups

    def wrong(student, texts, size, advantages):
        return real(student, texts, size, lambda groups: reward._centred(texts.score_Y[groups]))

    monkeypatch.setattr(reward, "_over_groups", wrong)


def always_later(monkeypatch):
    real = reward._with_kl

    def wrong(student, start, texts, counts_later):
        return real(student, start, texts, counts_later=True)

    monkeypatch.setattr(reward, "_with_kl", wrong)


def half_of_later(monkeypatch):
    real = reward.ScoredTexts.later
    monkeypatch.setattr(reward.ScoredTexts, "later", lambda self, cost_M: real(self, cost_M) / 2)


def mean_of_ratios(monkeypatch):
    """A text's log-probability as the mean over its tokens."""
    real = reward.ScoredTexts.log_probs
    monkeypatch.setattr(
        reward.ScoredTexts, "log_probs", lambda self, model: real(self, model) / self.length_Y
    )


def without_temperature(monkeypatch):
    real = entropy.fused_loss
    monkeypatch.setattr(
        entropy,
        "fused_loss",
        lambda *sides, temperature, **options: real(*sides, temperature=1.0, **options),
    )


def other_direction(monkeypatch):
    """The reverse KL in the place of the forward KL among the statistics."""
    real = entropy.Setting.excess

    def wrong(self, stats):
        return real(self, dataclasses.replace(stats, forward_kl_N=stats.reverse_kl_N))

    monkeypatch.setattr(entropy.Setting, "excess", wrong)


def leave_one_out(scores_KG):
    others_KG = scores_KG.sum(1, keepdim=True) - scores_KG
    return scores_KG - others_KG / (scores_KG.shape[1] - 1)


def without_the_least(scores_KG):
    return torch.nan_to_num(reward._centred(scores_KG) / scores_KG.std(1, keepdim=True))


def largest(ratio_M, advantage_M):
    cut_M = ratio_M.clamp(1 - reward.LOW, 1 + reward.HIGH)
    return -torch.maximum(ratio_M * advantage_M, cut_M * advantage_M)


def squared(ratio_M, advantage_M):
    return -(ratio_M**2) * advantage_M


def negative_reward(terms):
    return dataclasses.replace(terms, cross_entropy=-terms.cross_entropy)


def reward_lost_beside_kl(terms):
    return dataclasses.replace(terms, cross_entropy=0.0) if terms.reverse else terms


def forward_for_reverse(terms):
    return LossTerms(forward=1.0) if terms.reverse else terms


# By name: the module, the mistake, and how the checks begin that it breaks.
MUTATIONS = {
    "the reward's sign": (
        reward,
        with_terms(reward, negative_reward),
        (
            "groups of 2, centred",
            "clipped surrogate: its gradient",
            "the ratio of the whole text",
            "reward, local KL and later KLs",
            "reward and local KL: grad",
            "score minus w times the text's drawn log-ratio",
        ),
    ),
    "centred by the others": (
        reward,
        with_constant(reward, _centred=leave_one_out),
        ("groups of 2, centred", "groups of 3, centred"),
    ),
    "deviation without what is added to it": (
        reward,
        with_constant(reward, _scaled=without_the_least),
        ("groups of 3, scores 0 or 1 over their deviation",),
    ),
    "not scaled": (
        reward,
        with_constant(reward, _scaled=reward._centred),
        ("groups of 3, graded scores over their deviation",),
    ),
    "lengths not looked at": (
        reward,
        without_lengths,
        ("groups of 3, each response over", "groups of 3, each group over"),
    ),
    "the larger side of the surrogate": (
        reward,
        with_constant(reward, _surrogate=largest),
        ("clipped surrogate: its gradient",),
    ),
    "the ratio squared": (
        reward,
        with_constant(reward, _surrogate=squared),
        ("clipped surrogate before the first update",),
    ),
    "nothing is cut": (
        reward,
        with_constant(reward, LOW=9.0, HIGH=9e9),
        (
            "clipped surrogate: a part of the gradient is cut where A >= 0",
            "clipped surrogate: a part of the gradient is cut where A < 0",
        ),
    ),
    "the writer is the student": (
        reward,
        with_constant(reward, DRIFT=0.0),
        ("the ratio of each token alone",),
    ),
    "the mean of a text's ratios": (reward, mean_of_ratios, ("the ratio of the whole text",)),
    "half of the later KLs": (
        reward,
        half_of_later,
        ("reward, local KL and later KLs", "gradient steps on E[score]"),
    ),
    "hardly any KL": (
        reward,
        with_constant(reward, START_KL=1e-6),
        ("reward and local KL: not grad",),
    ),
    "no reward beside a KL": (
        reward,
        with_terms(reward, reward_lost_beside_kl),
        ("reward and KL in one pass",),
    ),
    "too few steps": (
        reward,
        with_constant(reward, NUM_STEPS=5),
        ("gradient steps on E[score]", "they reach q"),
    ),
    "later KLs where they are not asked for": (
        reward,
        always_later,
        ("reward and local KL: grad", "gradient steps on reward and local KL", "they reach q"),
    ),
    "not stationary": (
        entropy,
        with_constant(entropy, STATIONARY=1e-3),
        (
            "trained head: H(student)",
            "trained head, tokens that count unequally",
            "trained head at temperature 2, entropies at 2",
            "fixed head, trained gain",
            "weight decay: the excess",
            "one end class: the excess",
        ),
    ),
    "temperature not looked at": (
        entropy,
        without_temperature,
        ("trained head at temperature 2, entropies at 1",),
    ),
    "the other direction": (
        entropy,
        other_direction,
        ("trained head: H(student)", "any head: the excess"),
    ),
    "forward for reverse": (
        entropy,
        with_terms(entropy, forward_for_reverse),
        ("head trained by the reverse KL",),
    ),
}


@pytest.mark.parametrize("name", some([(name,) for name in MUTATIONS], every=3))
def test_a_mistake_in_any_one_formula_shows(monkeypatch, name):
    module, mutate, missing = MUTATIONS[name]
    mutate(monkeypatch)
    # Only as far as it takes: all that follow would cost time and show nothing more.
    for check in all_checks(module):
        if not check.holds:
            missing = tuple(each for each in missing if not check.name.startswith(each))
        if not missing:
            break
    assert missing == ()


def test_each_check_has_a_mistake_that_breaks_it():
    beginnings = tuple(each for _, _, broken in MUTATIONS.values() for each in broken)
    checks = [*all_checks(reward), *all_checks(entropy)]
    assert all(check.holds for check in checks)
    assert [check.name for check in checks if not check.name.startswith(beginnings)] == []
