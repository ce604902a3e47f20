"""Batch to loss: sums that do not depend on how rollouts are batched, and the cells' meaning."""

import dataclasses

import pytest
import torch
from conftest import make_model, make_rollout

from potstill.config import Objective
from potstill.kl.definition import token_divergence
from potstill.kl.fused import fused_loss
from potstill.kl.terms import LossTerms
from potstill.objectives.estimators import estimate, log_ratio, token_slope
from potstill.objectives.loss import Loss, batch_loss, teacher_signal
from potstill.rollouts.batching import make_batches
from potstill.types import NonFiniteError

ROLLOUTS = [
    make_rollout([1, 5, 6], [9, 5, 2]),
    make_rollout([1, 7], [4, 4, 8, 9, 6, 2], trained=[True, False, False, True, True, True]),
    make_rollout([1, 5, 6, 8], [3] * 11, stop="length"),
    make_rollout([1], [2]),
]


def gradients(student, teacher, loss: Loss, tokens_per_batch: int, rollouts=ROLLOUTS):
    """Loss and gradients of one optimiser step over the rollouts, cut into batches."""
    student.zero_grad()
    divisor, total = loss.divisor(rollouts), 0.0
    for batch in make_batches(rollouts, tokens_per_batch):
        loss_sum, _, _ = batch_loss(
            student, teacher, teacher_signal(teacher, batch, loss), batch, loss, divisor
        )
        loss_sum.backward()
        total += loss_sum.item()
    return total, [parameter.grad.clone() for parameter in student.parameters()]


@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize("signal", ["full", "topk", "sampled", "labels"])
def test_one_batch_equals_four(student, teacher, normalize, signal):
    loss = Loss(
        objective=Objective(kl="reverse", signal=signal, top_k=5),
        normalize=normalize,
        vocab_size=23,
    )
    whole = gradients(student, teacher, loss, tokens_per_batch=10_000)
    parts = gradients(student, teacher, loss, tokens_per_batch=1)
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    for a, b in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "plain"])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("signal", ["full", "topk", "sampled"])
def test_a_teacher_that_is_nan_is_refused(student, teacher, signal, kl, backend):
    """Also where its tokens are told apart by comparisons, which NaN fails without a word."""
    if signal == "sampled" and kl == "forward":
        pytest.skip("the sampled signal is of the reverse KL")
    with torch.no_grad():
        teacher.model.model.norm.weight.fill_(torch.nan)
    loss = Loss(
        objective=Objective(kl=kl, signal=signal, top_k=5),
        normalize="token",
        vocab_size=23,
        backend=backend,
    )
    (batch,) = make_batches(ROLLOUTS, 10_000)
    with pytest.raises(NonFiniteError, match=r"the (model|teacher)'s logits are NaN"):
        batch_loss(student, teacher, teacher_signal(teacher, batch, loss), batch, loss)


def test_normalisation_weighs_tokens_or_sequences(student, teacher):
    """Against the two definitions written out from per-rollout losses."""
    objective = Objective(kl="forward")
    token_losses = []
    for rollout in ROLLOUTS:
        (batch,) = make_batches([rollout], 10_000)
        loss = Loss(objective=objective, normalize="token", vocab_size=23)
        token_losses.append(
            batch_loss(student, teacher, teacher_signal(teacher, batch, loss), batch, loss)[1]
        )
    by_token = torch.cat(token_losses).mean().item()
    by_sequence = torch.stack([loss_N.mean() for loss_N in token_losses]).mean().item()
    assert gradients(
        student, teacher, Loss(objective=objective, normalize="token", compute_dtype=23), 40
    )[0] == pytest.approx(by_token, rel=1e-5)
    assert gradients(
        student, teacher, Loss(objective=objective, normalize="sequence", compute_dtype=23), 40
    )[0] == pytest.approx(by_sequence, rel=1e-5)
    assert by_token != pytest.approx(by_sequence, rel=1e-2)


@pytest.mark.parametrize("kl", ["forward", "reverse", "mixed"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(student, kl):
    loss_value, grads = gradients(
        student, student, Loss(objective=Objective(kl=kl), normalize="token", compute_dtype=23), 100
    )
    assert abs(loss_value) < 1e-6
    assert all(grad.abs().max() < 1e-6 for grad in grads)


def test_labels_are_the_models_own_language_model_loss(student):
    rollout = ROLLOUTS[0]
    value, grads = gradients(
        student, None, Loss(objective=Objective(signal="labels"), normalize="token"), 100, [rollout]
    )
    ids = torch.tensor([rollout.prompt.token_ids + rollout.completion_ids])
    labels = ids.clone()
    labels[:, : len(rollout.prompt.token_ids)] = -100
    student.zero_grad()
    expected = student.model(input_ids=ids, labels=labels).loss
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    for grad, parameter in zip(grads, student.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_rows_are_the_models_own_logits_at_the_loss_tokens(student, teacher):
    (batch,) = make_batches([ROLLOUTS[1]], 100)
    ids = torch.tensor([ROLLOUTS[1].prompt.token_ids + ROLLOUTS[1].completion_ids])
    own = teacher.model(input_ids=ids).logits[0]
    # The trained completion tokens sit at 2, 5, 6, 7 of the sequence, so the rows are those just
    # before.
    rows = teacher.head(
        teacher_signal(
            teacher, batch, Loss(objective=Objective(), normalize="token", vocab_size=23)
        )
    )
    torch.testing.assert_close(rows, own[[1, 4, 5, 6]], rtol=1e-4, atol=1e-4)


def test_padded_vocabularies_are_cut_to_the_shared_rows(teacher):
    wide, narrow = make_model(seed=3, vocab_size=31), make_model(seed=3, vocab_size=23)
    narrow.model.load_state_dict(
        {
            name: value[:23] if value.shape[0] == 31 else value
            for name, value in wide.model.state_dict().items()
        }
    )
    loss = Loss(objective=Objective(kl="reverse"), normalize="token", vocab_size=23)
    assert gradients(wide, teacher, loss, 100)[0] == pytest.approx(
        gradients(narrow, teacher, loss, 100)[0], rel=1e-6
    )


def test_the_end_class_forgives_another_end_token_and_raw_does_not(student):
    """A teacher that is the student with two end tokens swapped: equal once they are one class."""
    swapped = make_model(hidden_size=16, seed=0)
    order = list(range(23))
    order[2], order[22] = 22, 2
    head = torch.nn.Linear(16, 23, bias=False)
    with torch.no_grad():
        head.weight.copy_(student.head.weight_VD[order])
    swapped.model.lm_head = head
    loss = Loss(
        objective=Objective(kl="reverse"), normalize="token", vocab_size=23, end_class=(2, 22)
    )
    assert abs(gradients(student, swapped, loss, 100)[0]) < 1e-6
    assert gradients(student, swapped, dataclasses.replace(loss, end_class=()), 100)[0] > 1e-3


def test_bfloat16_compute_leaves_logits_and_loss_in_float32(student, teacher):
    """The loss equals that of float32 heads on bfloat16 hidden states, and not that of rounded
    logits."""
    (batch,) = make_batches(ROLLOUTS, 10_000)
    loss = Loss(
        objective=Objective(kl="reverse"),
        normalize="token",
        compute_dtype="bfloat16",
        vocab_size=23,
    )
    teacher_NE = teacher_signal(teacher, batch, loss)
    teacher_NV = teacher.head(teacher_NE)
    value, _, _ = batch_loss(student, teacher, teacher_NE, batch, loss)
    with torch.autocast("cpu", torch.bfloat16):
        hidden_ND = student(batch.input_ids_BT)[batch.loss_mask_BT].float()
    logits_NV = hidden_ND @ student.head.weight_VD.T
    expected, rounded = (
        token_divergence(z, teacher_NV, "reverse")[0].sum()
        for z in (logits_NV, logits_NV.bfloat16())
    )
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert (rounded - expected).abs() > 1e-3
    value.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in student.parameters())


def every_token(student, teacher):
    """One prefix whose next token is each of the vocabulary in turn, as a batch; the student's
    probability of each."""
    rollouts = [make_rollout([1, 5, 6], [token]) for token in range(23)]
    (batch,) = make_batches(rollouts, 10_000)
    with torch.no_grad():
        q_N = student.model(input_ids=torch.tensor([[1, 5, 6]])).logits[0, -1].softmax(-1)
    return batch, q_N


def sampled_loss(hidden, student, rows, teacher, labels_N, loss, weights_N=None):
    """The estimator's terms through the fused loss, as `batch_loss` asks for them."""

    def terms(stats, rows):
        return LossTerms(cross_entropy=-token_slope(stats, loss.objective))

    sides = (hidden, student.head, rows, teacher.head)
    options = loss.shared_options()
    return fused_loss(*sides, terms, labels_N=labels_N, weights_N=weights_N, **options)


@pytest.mark.parametrize("end_class", [(), (2, 7)], ids=["raw", "merged"])
@pytest.mark.parametrize(
    ("estimator", "baseline", "kl"),
    [
        ("k1", "none", "reverse"),
        ("k1", "exact", "reverse"),
        ("k2", "none", "reverse"),
        ("k3", "none", "forward"),
    ],
)
def test_sampled_estimators_have_the_gradient_they_are_named_for(
    student, teacher, estimator, baseline, kl, end_class
):
    """By enumeration: the mean over all tokens under the student's probabilities, against the exact
    KL's gradient."""
    batch, q_N = every_token(student, teacher)
    hidden = student(batch.input_ids_BT)[batch.loss_mask_BT]
    objective = Objective(
        prefix="student", kl=kl, signal="sampled", estimator=estimator, baseline=baseline
    )
    loss = Loss(objective=objective, normalize="token", vocab_size=23, end_class=end_class)
    rows = teacher_signal(teacher, batch, loss)
    labels = batch.target_ids_BT[batch.loss_mask_BT]
    value, _, stats = sampled_loss(hidden, student, rows, teacher, labels, loss, q_N)
    found = torch.autograd.grad(value, list(student.parameters()))
    z, y = student.head(student(batch.input_ids_BT[:1])[0, -1:]), teacher.head(rows[:1])
    exact, _ = token_divergence(z, y, kl, end_ids=end_class)
    for a, b in zip(
        found, torch.autograd.grad(exact.sum(), list(student.parameters())), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6)
    if estimator != "k2":
        reverse_kl = token_divergence(z, y, "reverse", end_ids=end_class)[0].item()
        assert (
            q_N * estimate(log_ratio(stats), objective.estimator)
        ).sum().item() == pytest.approx(reverse_kl, rel=1e-3)


def test_the_exact_baseline_lowers_the_variance(student, teacher):
    batch, q_N = every_token(student, teacher)
    spread = {}
    for baseline in ("none", "exact"):
        objective = Objective(prefix="student", kl="reverse", signal="sampled", baseline=baseline)
        loss = Loss(objective=objective, normalize="token", vocab_size=23)
        spread[baseline] = 0.0
        for i in range(23):
            hidden = student(batch.input_ids_BT[i : i + 1])[:, -1].detach().requires_grad_()
            rows = teacher_signal(teacher, batch, loss)[i : i + 1]
            value, _, _ = sampled_loss(hidden, student, rows, teacher, torch.tensor([i]), loss)
            (grad,) = torch.autograd.grad(value, hidden)
            spread[baseline] += (q_N[i] * grad.square().sum()).item()
    assert spread["exact"] < 0.9 * spread["none"]


def test_every_token_kept_is_the_whole_signal(student, teacher):
    whole = gradients(
        student,
        teacher,
        Loss(objective=Objective(kl="mixed"), normalize="token", vocab_size=23, end_class=(2, 7)),
        100,
    )
    objective = Objective(kl="mixed", signal="topk", top_k=23)
    kept = gradients(
        student,
        teacher,
        Loss(objective=objective, normalize="token", vocab_size=23, end_class=(2, 7)),
        100,
    )
    assert whole[0] == pytest.approx(kept[0], rel=1e-5)
    for a, b in zip(whole[1], kept[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_stop_token_is_learnt_when_pad_is_eos(student, teacher):
    """Masks come from lengths: the end token counts, and padding of the same id does not."""
    student.tokenizer.pad_token = student.tokenizer.eos_token
    student.model.config.pad_token_id = student.tokenizer.pad_token_id
    assert student.tokenizer.pad_token_id == student.tokenizer.eos_token_id == 2
    (batch,) = make_batches(ROLLOUTS, 10_000)
    assert batch.target_ids_BT[batch.loss_mask_BT].tolist().count(2) == 3
    assert batch.loss_mask_BT.sum() == sum(sum(rollout.trained) for rollout in ROLLOUTS)
    loss = Loss(objective=Objective(kl="forward"), normalize="token", vocab_size=23)
    together = gradients(student, teacher, loss, 10_000)
    alone = gradients(student, teacher, loss, 1)
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    only_stop = gradients(student, teacher, loss, 100, [make_rollout([1, 5], [2])])
    assert only_stop[0] > 0 and max(grad.abs().max() for grad in only_stop[1]) > 0
