"""Top-k with a tail: the exact KL of coarser distributions, against float64 autograd and against
the whole KL."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import ENDS, HEADS, TERMS, assert_near, combined, make_inputs

from potstill.kl import topk
from potstill.kl.fused import fused_loss
from potstill.kl.terms import LossTerms, TokenStats
from potstill.kl.topk import top_k_loss, top_k_of
from potstill.types import NonFiniteError


def coarse_statistics(
    inputs, ids_NK, temperature, end_ids, teacher_entropy_N, vocab_size=131
) -> TokenStats:
    """Divergences in float64 from probabilities summed over the classes: k tokens, the end class,
    the tail."""

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
        student_entropy_N=zero_N,
        student_log_sum_exp_N=zero_N,
        forward_kl_N=forward,
        reverse_kl_N=reverse,
        jsd_N=0.3 * skew_forward + 0.7 * skew_reverse,
        teacher_entropy_N=teacher_entropy_N,
        student_log_prob_N=zero_N,
        skew_forward_N=skew_forward,
        skew_reverse_N=skew_reverse,
    )


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("end_ids", [(), ENDS], ids=["raw", "merged"])
@pytest.mark.parametrize(
    "kl", ["forward", "reverse", "mixed", "jsd", "skew forward", "skew reverse"]
)
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
        for a, b in zip(
            torch.autograd.grad((loss_N * upstream.to(dtype)).sum(), inputs.trained),
            grads,
            strict=True,
        ):
            assert_near(a, b, tolerance)


@given(
    st.integers(0, 1000), st.floats(0.5, 4), st.sampled_from(["forward", "reverse"]), st.booleans()
)
@settings(max_examples=25, deadline=None)
def test_a_lower_bound_that_grows_with_k_and_is_equal_at_the_whole_vocabulary(
    seed, spread, kl, merged
):
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


@given(
    st.integers(0, 1000),
    st.sampled_from([(4, 7), (3, 40), (64, 16), (256, 3072)]),
    st.integers(1, 150),
    st.sampled_from(["as it comes", "rising", "falling"]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_top_k_equals_a_sort_of_the_whole_logits(seed, tile, k, order, merged):
    """Whatever the tiles, and where each strip of columns is likelier than the one before."""
    inputs = make_inputs(num_rows=9, seed=seed, bias=True, softcap=30.0)
    steps = {"as it comes": 0, "rising": 8, "falling": -8}[order] * torch.linspace(
        0, 1, 131, dtype=torch.float64
    )
    head = dataclasses.replace(inputs.teacher_head, bias_V=inputs.teacher_head.bias_V + steps)
    end_ids = ENDS if merged else ()
    lp = (head(inputs.teacher_hidden) / 1.3).log_softmax(-1)
    ends = lp[:, list(end_ids)].logsumexp(-1)
    lp[:, list(end_ids)] = -torch.inf
    kept, ids = lp.topk(min(k, 131 - len(end_ids)))
    rest = lp.scatter(1, ids, -torch.inf).logsumexp(-1)
    merged_lp = torch.cat([lp, ends[:, None]], 1) if merged else lp
    entropy = torch.special.entr(merged_lp.exp()).sum(-1)
    found = top_k_of(inputs.teacher_hidden, head, k, temperature=1.3, end_ids=end_ids, tile=tile)
    assert torch.equal(found.token_ids_NK, ids)
    pairs = [
        (found.log_probs_NK, kept),
        (found.entropy_N, entropy),
        (found.end_log_prob_N, ends if merged else None),
    ]
    pairs.append((found.tail_log_prob_N, rest if kept.shape[1] + len(end_ids) < 131 else None))
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_tail_far_below_rounding_is_right():
    inputs = make_inputs(spread=40.0)
    exact = top_k_of(*inputs.args()[2:], 20)
    assert exact.tail_log_prob_N.max() < -20, "1 minus what is kept would be 0 in float32"
    found = top_k_of(*inputs.to(torch.float32).args()[2:], 20, tile=(16, 40))
    torch.testing.assert_close(
        found.tail_log_prob_N.double(), exact.tail_log_prob_N, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 2, 130])
def test_logits_that_are_not_finite_are_refused(value, column):
    if column in ENDS and value == -math.inf:
        pytest.skip("a model may give one member of the end class nothing")
    inputs = make_inputs(bias=True)
    inputs.teacher_head.bias_V[column] = value
    with pytest.raises(
        NonFiniteError, match=r"the model's logits are NaN or infinite in rows \[0, 1, 2, 3, 4\]"
    ):
        top_k_of(*inputs.args()[2:], 3, end_ids=ENDS, tile=(16, 40))


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
