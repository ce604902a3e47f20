"""The reward: credits of groups, and the policy gradient against enumeration and autograd."""

import dataclasses
import math

import pytest
import torch
from conftest import make_rollout

from potstill.answers.grading import Grade
from potstill.config import Objective, Reward
from potstill.kl.definition import token_divergence
from potstill.objectives.lessons import kl_to_start
from potstill.objectives.loss import Loss, batch_loss, teacher_signal
from potstill.objectives.reward import credits_of, is_clipped, reward_sums, with_credit
from potstill.rollouts.batching import make_batches
from potstill.types import Credit

NUM_TOKENS = 23


def reward(**fields) -> Reward:
    return Reward(**({"weight": 1.0, "group_size": 2} | fields))


def test_credits_of_a_group_by_hand():
    scores, whole = [1.0, 0.0, 0.0, 1.0], [False] * 4
    mean, deviation = 0.5, math.sqrt(4 * 0.25 / 3)
    for advantage, expected in (
        ("mean", [0.5, -0.5, -0.5, 0.5]),
        ("std", [x / (deviation + 1e-4) for x in (0.5, -0.5, -0.5, 0.5)]),
        ("score", scores),
    ):
        found = credits_of(scores, whole, reward(advantage=advantage, group_size=4))
        assert [each.advantage for each in found] == pytest.approx(expected)
        assert {(each.group_score, round(each.group_deviation, 9)) for each in found} == {
            (mean, round(deviation, 9))
        }
    alike = credits_of([1.0, 1.0], [False, False], reward())
    assert [each.advantage for each in alike] == [0.0, 0.0]


def test_what_the_window_cut_counts_as_the_recipe_says():
    scores, is_cut = [1.0, 0.0, 1.0], [False, False, True]
    found = {
        how: credits_of(scores, is_cut, reward(truncated=how, advantage="mean", group_size=3))
        for how in ("score", "zero", "mask")
    }
    advantages = {how: [each.advantage for each in group] for how, group in found.items()}
    assert advantages["score"] == pytest.approx([1 / 3, -2 / 3, 1 / 3])
    assert advantages["zero"] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert advantages["mask"] == pytest.approx([0.5, -0.5, 0.0])
    assert [each.score for each in found["mask"]] == scores
    nothing = credits_of([1.0, 0.0], [True, True], reward(truncated="mask"))
    assert [each.advantage for each in nothing] == [0.0, 0.0]


class Counts:
    """Scores a response by its length."""

    def grade(self, examples, responses):
        return [Grade(float(len(response)), None) for response in responses]


def test_groups_are_those_that_follow_each_other():
    rollouts = [make_rollout([1, 5], [2]) for _ in range(4)]
    texts = ["a", "bbb", "cc", "cc"]
    credited = with_credit(rollouts, texts, Counts(), reward(advantage="mean"))
    assert [each.credit.advantage for each in credited] == [-1.0, 1.0, 0.0, 0.0]
    sums = reward_sums(credited)
    assert sums == {"reward": 8.0, "reward_squared": 18.0, "groups_with_signal": 2.0}
    assert reward_sums(rollouts) == {}


def test_a_token_without_an_advantage_is_never_clipped():
    """However far the student has gone from the one that wrote."""
    advantage_N = torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0, -1.0])
    ratio_N = torch.tensor([1e3, 1e-3] * 3)
    found_N = is_clipped(ratio_N, advantage_N, (0.2, 0.2))
    assert found_N.tolist() == [True, False, False, False, False, True]


def every_token(student, scores, **fields):
    """One prefix whose next token is each of the vocabulary in turn, with its score as advantage;
    and the student's probability of each."""
    rollouts = [
        dataclasses.replace(make_rollout([1, 5, 6], [token]), credit=credit(score), **fields)
        for token, score in enumerate(scores)
    ]
    (batch,) = make_batches(rollouts, 10_000)
    with torch.no_grad():
        q_N = student.model(input_ids=torch.tensor([[1, 5, 6]])).logits[0, -1].softmax(-1)
    return batch, q_N


def credit(score: float) -> Credit:
    return Credit(score=score, group_score=0.0, group_deviation=1.0, advantage=score)


def gradient(model, value):
    return torch.autograd.grad(value, list(model.parameters()))


def in_expectation(student, teacher, loss, batch, q_N):
    """The gradient of `batch_loss`, each token weighed by the student's probability of it."""
    found = [torch.zeros_like(each) for each in student.parameters()]
    for i, rollout in enumerate(batch.rollouts):
        (single,) = make_batches([rollout], 100)
        signal = teacher_signal(teacher, single, loss)
        loss_sum, _, _ = batch_loss(student, teacher, signal, single, loss, 1 / q_N[i].item())
        for total, part in zip(found, gradient(student, loss_sum), strict=True):
            total += part
    return found


@pytest.mark.parametrize("kl", ["none", "forward", "reverse"])
def test_reward_and_kl_have_the_gradient_of_their_sum(student, teacher, kl):
    """By enumeration of the next token: that of KL - weight * mean score."""
    scores = torch.linspace(-1, 2, NUM_TOKENS)
    batch, q_N = every_token(student, scores.tolist())
    objective = Objective(prefix="student", kl=kl)
    loss = Loss(
        objective=objective, normalize="token", reward=reward(weight=0.7), vocab_size=NUM_TOKENS
    )
    found = in_expectation(student, teacher, loss, batch, q_N)
    logits = student.model(input_ids=torch.tensor([[1, 5, 6]])).logits[0, -1:]
    value = -0.7 * (logits.softmax(-1) * scores).sum()
    if kl != "none":
        with torch.no_grad():
            theirs = teacher.model(input_ids=torch.tensor([[1, 5, 6]])).logits[0, -1:]
        value = value + token_divergence(logits, theirs, kl)[0].sum()
    for a, b in zip(found, gradient(student, value), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6)


def test_a_rollout_that_is_used_again_has_the_clipped_surrogate_s_gradient(student):
    """Against autograd of -min(r A, clip(r) A) with ratios on all sides of the clip."""
    shift = torch.linspace(-0.5, 0.5, NUM_TOKENS)
    scores = [1.0 if i % 2 else -1.0 for i in range(NUM_TOKENS)]
    batch, q_N = every_token(student, scores)
    old_N = q_N.log() - shift
    rollouts = [
        dataclasses.replace(rollout, log_probs=(old.item(),))
        for rollout, old in zip(batch.rollouts, old_N, strict=True)
    ]
    (batch,) = make_batches(rollouts, 10_000)
    loss = Loss(
        objective=Objective(prefix="student", kl="none"),
        normalize="token",
        reward=reward(weight=2.0, clip=(0.1, 0.3)),
    )
    loss_sum, _, _ = batch_loss(student, None, None, batch, loss, NUM_TOKENS)
    found = gradient(student, loss_sum)
    log_q_N = student.model(input_ids=torch.tensor([[1, 5, 6]])).logits[0, -1].log_softmax(-1)
    ratio_N, advantage_N = (log_q_N - old_N).exp(), torch.tensor(scores)
    surrogate_N = torch.minimum(ratio_N * advantage_N, ratio_N.clamp(0.9, 1.3) * advantage_N)
    expected = gradient(student, -2.0 * surrogate_N.mean())
    assert 0 < ((ratio_N < 0.9) | (ratio_N > 1.3)).sum() < NUM_TOKENS
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_kl_to_the_start_is_the_exact_reverse_kl(student, teacher):
    """Any model can be the start: against the definition on whole logits."""
    rollouts = [make_rollout([1, 5, 6], [9, 5, 2]), make_rollout([1, 7], [4, 2])]
    (batch,) = make_batches(rollouts, 10_000)
    loss = Loss(
        objective=Objective(prefix="student", kl="none"),
        normalize="token",
        reward=reward(start_kl=0.3),
    )
    hidden_ND = student(batch.input_ids_BT)[batch.loss_mask_BT]
    loss_sum, kl_N = kl_to_start(hidden_ND, student, teacher, batch, loss, 5)
    found = gradient(student, loss_sum)
    logits = student.model(input_ids=batch.input_ids_BT).logits[batch.loss_mask_BT]
    theirs = teacher.model(input_ids=batch.input_ids_BT).logits[batch.loss_mask_BT].detach()
    expected_N, _ = token_divergence(logits, theirs, "reverse")
    torch.testing.assert_close(kl_N, expected_N.detach(), rtol=1e-4, atol=1e-5)
    for a, b in zip(found, gradient(student, 0.3 * expected_N.sum() / 5), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
