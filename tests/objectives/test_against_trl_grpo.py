"""The reward's gradient against that of TRL's GRPOTrainer, on the same responses and scores."""

import dataclasses
import random

import pytest
import torch
from conftest import make_model, make_rollout
from torch import Tensor
from trl_grpo import grpo_trainer, padded, trl_inputs, trl_loss

from potstill.answers.grading import Grade
from potstill.config import Objective, Reward
from potstill.objectives.lessons import kl_to_start
from potstill.objectives.loss import Loss, batch_loss
from potstill.objectives.reward import with_credit
from potstill.rollouts.batching import make_batches

pytest.importorskip("trl", reason="TRL is not installed: pip install 'potstill[peers]'")
# TRL's own: of what it calls in transformers, and that `rollout_func` may change.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func'"),
]

NUM_TOKENS, END, GROUP_SIZE, WINDOW = 23, 2, 4, 9
# Responses without their ends; of nine tokens the window cut one.
LENGTHS = [3, 1, 9, 5, 2, 2, 4, 7, 1, 6, 3, 8]
# The second group is of one mind; the first has scores between 0 and 1.
SCORES = [1.0, 0.0, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
# TRL's scaling by the name of our advantage.
SCALES = {"std": "group", "mean": "none"}
# Our normalisation by the name of TRL's loss. That of "dr_grpo" is by the longest length there
# could be, a constant.
NORMALIZE = {"grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "token"}


class Given:
    """Scores that are known."""

    def grade(self, examples, responses):
        return [Grade(score, None) for score in SCORES]


@pytest.fixture
def rollouts():
    drawn = random.Random(0)
    prompts = [[1, 5], [1, 7, 8, 9], [1, 6, 6]]
    found = []
    for place, length in enumerate(LENGTHS):
        ids = [drawn.randrange(3, NUM_TOKENS) for _ in range(length)]
        is_cut = length == WINDOW
        prompt, stop = prompts[place // GROUP_SIZE], "length" if is_cut else "end"
        found.append(make_rollout(prompt, ids + ([] if is_cut else [END]), stop=stop))
    return found


def our_gradient(student, rollouts, loss: Loss) -> list[Tensor]:
    """That of a step, over several batches and one divisor."""
    batches = make_batches(rollouts, 40)
    assert len(batches) > 2
    divisor = loss.divisor(rollouts)
    total = torch.zeros(())
    for batch in batches:
        loss_sum, _, _ = batch_loss(student, None, None, batch, loss, divisor)
        total = total + loss_sum
    return gradient(student, total)


def gradient(student, value) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(student.parameters())))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert max(each.abs().max() for each in expected) > 1e-3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def loss_of(advantage: str, loss_type: str, **fields) -> Loss:
    reward = Reward.model_validate(
        {"weight": 1.0, "group_size": GROUP_SIZE, "advantage": advantage} | fields
    )
    objective = Objective(prefix="student", kl="none")
    return Loss(objective=objective, normalize=NORMALIZE[loss_type], reward=reward)


def share_of_longest(rollouts) -> float:
    """Loss tokens as a share of what the window has room for, the constant of "dr_grpo"."""
    num_tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    return num_tokens / (len(rollouts) * WINDOW)


@pytest.mark.parametrize("is_used_again", [False, True], ids=["new", "used again"])
@pytest.mark.parametrize("advantage", SCALES)
@pytest.mark.parametrize("loss_type", NORMALIZE)
def test_a_step_has_the_gradient_of_trl_s(
    student, rollouts, tmp_path, loss_type, advantage, is_used_again
):
    """Also where responses are used again, with ratios on all sides of the clip."""
    loss = loss_of(advantage, loss_type, clip=(0.1, 0.3))
    credited = with_credit(rollouts, [""] * len(rollouts), Given(), loss.reward)
    drawn = random.Random(1)
    if is_used_again:
        credited = [used_again(student, rollout, drawn) for rollout in credited]
    found = our_gradient(student, credited, loss)
    trainer = grpo_trainer(
        student,
        rollouts,
        SCORES,
        str(tmp_path),
        loss_type=loss_type,
        scale_rewards=SCALES[advantage],
        num_generations=GROUP_SIZE,
        max_completion_length=WINDOW,
        epsilon=0.1,
        epsilon_high=0.3,
    )
    inputs = trl_inputs(trainer)
    advantages = [rollout.credit.advantage for rollout in credited]
    assert inputs["advantages"].tolist() == pytest.approx(advantages, abs=1e-6)
    if is_used_again:
        inputs["old_per_token_logps"] = padded([rollout.log_probs for rollout in credited])
    expected = gradient(student, trl_loss(trainer, inputs))
    if loss_type == "dr_grpo":
        found = [each * share_of_longest(rollouts) for each in found]
    assert_close(found, expected)


def used_again(student, rollout, drawn):
    """The rollout as if a student had written it that gave each token up to 1.6 times, or down to
    0.6 times, as much."""
    prompt, ids = rollout.prompt.token_ids, rollout.completion_ids
    with torch.no_grad():
        logits = student.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    now = logits.log_softmax(-1)[range(len(ids)), list(ids)]
    then = [value + drawn.uniform(-0.5, 0.5) for value in now.tolist()]
    return dataclasses.replace(rollout, log_probs=tuple(then))


@pytest.mark.parametrize("is_corrected", [True, False])
def test_the_kl_to_the_start_is_what_trl_s_is_in_expectation(student, tmp_path, is_corrected):
    """By enumeration of the next token. The value is the reverse KL. So is the gradient where TRL
    corrects its bias; without, TRL's default, the gradient is that of the forward KL."""
    start = make_model(hidden_size=24, seed=1)
    prompt = [1, 5, 6]
    rollouts = [make_rollout(prompt, [token]) for token in range(NUM_TOKENS)]
    trainer = grpo_trainer(
        student,
        rollouts,
        [0.0] * NUM_TOKENS,
        str(tmp_path),
        loss_type="grpo",
        num_generations=NUM_TOKENS,
        use_bias_correction_kl=is_corrected,
    )
    inputs = trl_inputs(trainer)
    # Not before: a trainer that is made with a weight looks for the start by its name.
    trainer.beta = 0.3
    logits = student.model(torch.tensor([prompt])).logits[0, -1]
    with torch.no_grad():
        start_log_V = start.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    log_V = logits.log_softmax(-1)
    value = 0.0
    expected = [torch.zeros_like(each) for each in student.parameters()]
    for token, probability in enumerate(log_V.exp().tolist()):
        one = {name: each[token : token + 1] for name, each in inputs.items() if each.dim()}
        one["ref_per_token_logps"] = start_log_V[token].view(1, 1)
        loss = trl_loss(trainer, one)
        value += probability * loss.item()
        for total, part in zip(expected, gradient(student, loss), strict=True):
            total += probability * part
    (batch,) = make_batches(rollouts[:1], 100)
    ours = loss_of("std", "grpo", start_kl=0.3)
    hidden_ND = student(batch.input_ids_BT)[batch.loss_mask_BT]
    loss_sum, kl_N = kl_to_start(hidden_ND, student, start, batch, ours)
    assert value == pytest.approx(0.3 * kl_N.item(), rel=1e-4)
    if not is_corrected:
        forward = 0.3 * (start_log_V.exp() * (start_log_V - log_V)).sum()
        assert_close(gradient(student, forward), expected)
        return
    assert_close(gradient(student, loss_sum), expected)
