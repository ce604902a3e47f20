"""Top-k with a tail: the exact KL of coarser distributions, against float64 autograd and against the whole KL."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import ENDS, HEADS, TERMS, assert_near, combined, make_inputs

from potstill import topk
from potstill.fused import fused_loss
from potstill.topk import top_k_loss, top_k_of
from potstill.types import LossTerms, TokenStats


def coarse_statistics(inputs, ids_NK, temperature, end_ids, teacher_entropy_N, vocab_size=131) -> TokenStats:
    """Divergences in float64 from probabilities summed over the classes: k tokens, the end class, the tail."""

    def classes(hidden, head):
        p = (head(hidden, vocab_size) / temperature).softmax(-1)
        parts = [p.gather(1, ids_NK)]
        if end_ids:
            parts.append(p[:, list(end_ids)].sum(-1, keepdim=True))
        is_rest = torch.ones_like(p, dtype=torch.bool).scatter(1, ids_NK, False)
        is_rest[:, list(end_ids)] = False
        tail = (p * is_rest).sum(-1, keepdim=True)
        return torch.cat([*parts, tail] if is_rest.any() else parts, -1)

    q, p = classes(inputs.hidden, inputs.head), classes(inputs.teacher_hidden, inputs.teacher_head)
    m = 0.3 * p + 0.7 * q
    (forward, reverse, skew_forward, skew_reverse) = (
        (a * (a / b).log()).sum(-1) for a, b in ((p, q), (q, p), (p, m), (q, m))
    )
    zero_N = torch.zeros(len(p))
    return TokenStats(
        zero_N,
        zero_N,
        forward,
        reverse,
        0.3 * skew_forward + 0.7 * skew_reverse,
        teacher_entropy_N,
        student_log_prob_N=zero_N,
        skew_forward_N=skew_forward,
        skew_reverse_N=skew_reverse,
    )


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("end_ids", [(), ENDS], ids=["raw", "merged"])
@pytest.mark.parametrize("kl", ["forward", "reverse", "mixed", "jsd", "skew forward", "skew reverse", "gated"])
def test_value_and_gradient_equal_float64_autograd(monkeypatch, head, end_ids, kl):
    # Several slices of rows.
    monkeypatch.setattr(topk, "GATHERED_ELEMENTS", 1000)
    exact = make_inputs(**head)
    options = {"vocab_size": 131, "temperature": 1.3, "end_ids": end_ids}
    teacher = top_k_of(*exact.args()[2:], 8, **options)
    coarse = coarse_statistics(exact, teacher.token_ids_NK, 1.3, end_ids, teacher.entropy_N)
    expected = combined(TERMS[kl], coarse)
    upstream = torch.linspace(-1, 2, 37, dtype=torch.float64)
    grads = torch.autograd.grad((expected * upstream).sum(), exact.trained)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 5e-6)):
        inputs = exact.to(dtype)
        # A divergence from the mixture is that much smaller than a KL, and rounding is not.
        tolerance = tolerance / 0.3 if kl.startswith("skew") else tolerance
        teacher = top_k_of(*inputs.args()[2:], 8, **options)
        loss_N, stats = top_k_loss(*inputs.args()[:2], teacher, TERMS[kl], **options)
        assert_near(loss_N.detach(), expected.detach(), tolerance)
        assert_near(stats.forward_kl_N, coarse.forward_kl_N.detach(), tolerance)
        assert_near(stats.reverse_kl_N, coarse.reverse_kl_N.detach(), tolerance)
        for a, b in zip(torch.autograd.grad((loss_N * upstream.to(dtype)).sum(), inputs.trained), grads, strict=True):
            assert_near(a, b, tolerance)


@given(st.integers(0, 1000), st.floats(0.5, 4), st.sampled_from(["forward", "reverse"]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_lower_bound_that_grows_with_k_and_is_equal_at_the_whole_vocabulary(seed, spread, kl, merged):
    inputs = make_inputs(num_rows=5, seed=seed, spread=spread)
    end_ids = ENDS if merged else ()
    exact_N = fused_loss(*inputs.args(), LossTerms(**{kl: 1.0}), end_ids=end_ids)[1]
    before_N = torch.full_like(exact_N, -1e-9)
    for k in (1, 4, 16, 64, 127, 131, 500):
        teacher = top_k_of(*inputs.args()[2:], k, end_ids=end_ids)
        value_N, _ = top_k_loss(*inputs.args()[:2], teacher, TERMS[kl], end_ids=end_ids)
        assert (value_N >= before_N - 1e-7).all() and (value_N <= exact_N + 1e-6).all()
        before_N = value_N.detach()
    torch.testing.assert_close(before_N, exact_N.detach(), rtol=1e-8, atol=1e-10)


def test_a_sum_without_the_tail_would_not_be_zero_for_equal_models():
    inputs = make_inputs()
    teacher = top_k_of(inputs.hidden.detach(), inputs.head, 5)
    loss_N, _ = top_k_loss(inputs.hidden, inputs.head, teacher, TERMS["mixed"])
    grads = torch.autograd.grad(loss_N.sum(), inputs.trained)
    assert loss_N.abs().max() < 1e-10 and all(grad.abs().max() < 1e-10 for grad in grads)


def test_no_tokens():
    inputs = make_inputs(num_rows=0)
    teacher = top_k_of(*inputs.args()[2:], 5)
    loss_N, _ = top_k_loss(*inputs.args()[:2], teacher, TERMS["reverse"])
    loss_N.sum().backward()
    assert loss_N.shape == (0,) and inputs.head.weight_VD.grad.eq(0).all()
