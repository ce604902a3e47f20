"""Values and gradients against float64 autograd of the textbook definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.kl.definition import DIVERGENCES, merge_end_class, token_divergence

N, V = 7, 13
ENDS = [2, 5, 11]


def random_logits(seed: int, scale: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2)]


def brute_force(student, teacher, kl, weight, temperature, end_ids):
    """KLs of probabilities that are merged by plain summation, differentiable by autograd."""
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    if end_ids:
        rest = [i for i in range(V) if i not in end_ids]
        q, p = (torch.cat([x[:, rest], x[:, end_ids].sum(-1, keepdim=True)], -1) for x in (q, p))

    def divergence(a, b):
        return (a * (a / b).log()).sum(-1)

    forward, reverse = divergence(p, q), divergence(q, p)
    m = weight * p + (1 - weight) * q
    return {
        "forward": forward,
        "reverse": reverse,
        "mixed": weight * forward + (1 - weight) * reverse,
        "jsd": weight * divergence(p, m) + (1 - weight) * divergence(q, m),
        "skew-forward": divergence(p, m),
        "skew-reverse": divergence(q, weight * q + (1 - weight) * p),
    }[kl]


@pytest.mark.parametrize("kl", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("end_ids", [[], ENDS])
def test_value_and_gradient_equal_float64_autograd(kl, temperature, end_ids):
    student, teacher = random_logits(0)
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    student.requires_grad_()
    expected = brute_force(student, teacher, kl, 0.3, temperature, end_ids)
    (expected_grad,) = torch.autograd.grad((expected * upstream).sum(), student)
    value, _ = token_divergence(
        student, teacher, kl, weight=0.3, temperature=temperature, end_ids=end_ids
    )
    (grad,) = torch.autograd.grad((value * upstream).sum(), student)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


def test_gradients_are_the_closed_forms():
    student, teacher = random_logits(1)
    q, p = student.softmax(-1), teacher.softmax(-1)
    log_ratio = q.log() - p.log()
    closed = {"forward": q - p, "reverse": q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True))}
    closed["mixed"] = 0.2 * closed["forward"] + 0.8 * closed["reverse"]
    for kl, expected in closed.items():
        logits = student.clone().requires_grad_()
        token_divergence(logits, teacher, kl, weight=0.2)[0].sum().backward()
        torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-12)


@given(st.integers(0, 1000), st.floats(0.1, 20), st.sampled_from(["forward", "reverse", "mixed"]))
@settings(max_examples=50, deadline=None)
def test_properties(seed, scale, kl):
    student, teacher = random_logits(seed, scale)
    value, stats = token_divergence(student, teacher, kl)
    assert (value >= -1e-12).all()
    assert (token_divergence(student, student, kl)[0].abs() < 1e-12).all()
    # Merging classes is a coarser partition, which cannot raise a KL.
    assert (token_divergence(student, teacher, kl, end_ids=ENDS)[0] <= value + 1e-9).all()
    logits = student.clone().requires_grad_()
    token_divergence(logits, teacher, kl)[0].sum().backward()
    # Logits are defined up to a constant, so a row of the gradient sums to zero.
    assert (logits.grad.sum(-1).abs() < 1e-9).all()
    assert ((stats.student_entropy_N >= 0) & (stats.student_entropy_N <= math.log(V) + 1e-6)).all()


def test_mixture_is_linear_and_meets_both_ends():
    student, teacher = random_logits(2)
    forward, reverse = (token_divergence(student, teacher, kl)[0] for kl in ("forward", "reverse"))
    for weight in (0.0, 0.25, 1.0):
        mixed = token_divergence(student, teacher, "mixed", weight=weight)[0]
        torch.testing.assert_close(mixed, weight * forward + (1 - weight) * reverse)


def test_statistics_are_all_there_whichever_is_trained():
    student, teacher = random_logits(3)
    _, stats = token_divergence(student, teacher, "forward")
    torch.testing.assert_close(
        stats.forward_kl_N, brute_force(student, teacher, "forward", 0, 1, [])
    )
    torch.testing.assert_close(
        stats.reverse_kl_N, brute_force(student, teacher, "reverse", 0, 1, [])
    )
    q = student.softmax(-1)
    torch.testing.assert_close(
        stats.student_entropy_N, torch.distributions.Categorical(probs=q).entropy()
    )


def test_one_end_id_changes_nothing():
    student, _ = random_logits(4)
    assert merge_end_class(student, [3]) is student


def test_float32_is_close_to_float64_for_peaked_and_offset_logits():
    student, teacher = random_logits(5, scale=15.0)
    exact = token_divergence(student, teacher, "reverse")[0]
    rounded = token_divergence((student + 100).float(), (teacher - 100).float(), "reverse")[0]
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-4)


def test_no_tokens():
    empty = torch.zeros(0, V, requires_grad=True)
    value, _ = token_divergence(empty, torch.zeros(0, V), "reverse", end_ids=ENDS)
    value.sum().backward()
    assert value.shape == (0,) and empty.grad.shape == (0, V)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"cut the heads to the shared rows"):
        token_divergence(torch.zeros(2, 5), torch.zeros(2, 6), "forward")
    with pytest.raises(ValueError, match=r"'jsdd'; choose one of"):
        token_divergence(torch.zeros(2, 5), torch.zeros(2, 5), "jsdd")
