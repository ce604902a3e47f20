"""The fused divergence against float64 autograd of the textbook definitions on whole logits."""

import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled import some

from potstill.kl import coefficients, definition, fused
from potstill.kl.definition import log_mixture
from potstill.kl.fused import close_kl, fused_loss, fused_statistics
from potstill.kl.head import Head
from potstill.kl.plan import make_plan
from potstill.kl.terms import LossTerms, TokenStats
from potstill.types import NonFiniteError

MIB = 2**20
ENDS = (2, 40, 100)
STUDENT_STATISTICS = (
    "student_entropy_N",
    "student_log_sum_exp_N",
    "forward_kl_N",
    "reverse_kl_N",
    "jsd_N",
    "student_log_prob_N",
    "skew_forward_N",
    "skew_reverse_N",
)


@dataclasses.dataclass
class Inputs:
    """Random hidden states and heads; the student's require gradients."""

    hidden: torch.Tensor
    head: Head
    teacher_hidden: torch.Tensor
    teacher_head: Head
    labels: torch.Tensor

    @property
    def trained(self) -> list[torch.Tensor]:
        return [t for t in (self.hidden, self.head.weight_VD, self.head.bias_V) if t is not None]

    def to(self, dtype: torch.dtype) -> "Inputs":
        def cast(tensor, trained):
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_(trained)

        def head(h, trained):
            return dataclasses.replace(
                h, weight_VD=cast(h.weight_VD, trained), bias_V=cast(h.bias_V, trained)
            )

        return Inputs(
            cast(self.hidden, True),
            head(self.head, True),
            cast(self.teacher_hidden, False),
            head(self.teacher_head, False),
            self.labels,
        )

    def args(self):
        return self.hidden, self.head, self.teacher_hidden, self.teacher_head


def make_inputs(
    num_rows=37,
    vocab_size=131,
    dims=(16, 24),
    seed=0,
    bias=False,
    scale=1.0,
    softcap=None,
    spread=2.0,
    padding=(0, 0),
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hiddens, heads = [], []
    for dim, pad in zip(dims, padding, strict=True):
        hiddens.append(randn(num_rows, dim))
        weight = spread * randn(vocab_size + pad, dim) / math.sqrt(dim)
        bias_V = randn(vocab_size + pad) if bias else None
        heads.append(Head(weight, bias_V=bias_V, scale=scale, softcap=softcap))
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    labels[: len(ENDS)] = torch.tensor(ENDS)[:num_rows]
    return Inputs(hiddens[0], heads[0], hiddens[1], heads[1], labels).to(torch.float64)


def brute_force(
    inputs: Inputs, temperature=1.0, end_ids=(), mixture_weight=0.3, vocab_size=None
) -> TokenStats:
    """Statistics in float64 from whole distributions whose end tokens are merged by plain
    summation."""

    def distribution(hidden, head):
        logits = hidden @ head.weight_VD[:vocab_size].T
        logits = head.scale * (logits if head.bias_V is None else logits + head.bias_V[:vocab_size])
        logits = logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()
        logits = logits / temperature
        probs = logits.softmax(-1)
        label_probs = probs.gather(1, inputs.labels[:, None]).squeeze(1)
        if end_ids:
            ends = probs[:, list(end_ids)].sum(-1)
            label_probs = torch.where(
                torch.isin(inputs.labels, torch.tensor(end_ids)), ends, label_probs
            )
            keep = [i for i in range(probs.shape[1]) if i not in end_ids]
            probs = torch.cat([probs[:, keep], ends[:, None]], -1)
        return probs, logits.exp().sum(-1).log(), label_probs.log()

    q, student_sum, student_label = distribution(inputs.hidden, inputs.head)
    p, teacher_sum, teacher_label = distribution(inputs.teacher_hidden, inputs.teacher_head)
    m = mixture_weight * p + (1 - mixture_weight) * q
    skew_forward, skew_reverse = (p * (p / m).log()).sum(-1), (q * (q / m).log()).sum(-1)
    return TokenStats(
        student_entropy_N=-(q * q.log()).sum(-1),
        student_log_sum_exp_N=student_sum,
        forward_kl_N=(p * (p / q).log()).sum(-1),
        reverse_kl_N=(q * (q / p).log()).sum(-1),
        jsd_N=mixture_weight * skew_forward + (1 - mixture_weight) * skew_reverse,
        teacher_entropy_N=-(p * p.log()).sum(-1),
        teacher_log_sum_exp_N=teacher_sum,
        student_log_prob_N=student_label,
        teacher_log_prob_N=teacher_label,
        skew_forward_N=skew_forward,
        skew_reverse_N=skew_reverse,
    )


def combined(terms: LossTerms, stats: TokenStats):
    return (
        terms.forward * stats.forward_kl_N
        + terms.reverse * stats.reverse_kl_N
        + terms.skew_forward * stats.skew_forward_N
        + terms.skew_reverse * stats.skew_reverse_N
        + terms.jsd * stats.jsd_N
        + terms.entropy * stats.student_entropy_N
        - terms.cross_entropy * stats.student_log_prob_N
    )


def assert_near(found, exact, tolerance):
    """Largest error over largest value: the measure of kernels.md, which a small entry cannot
    dominate."""
    error = (found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(
        min=1e-30
    )
    assert error <= tolerance, f"relative error {error:.2e}"


TERMS = {
    "forward": LossTerms(forward=1.0),
    "reverse": LossTerms(reverse=1.0),
    "mixed": LossTerms(forward=0.3, reverse=0.7),
    "jsd": LossTerms(jsd=1.0, mixture_weight=0.3),
    "skew forward": LossTerms(skew_forward=1.0, mixture_weight=0.3),
    "skew reverse": LossTerms(skew_reverse=1.0, mixture_weight=0.3),
    "entropy": LossTerms(entropy=1.0),
    "cross_entropy": LossTerms(cross_entropy=1.0),
    "all": LossTerms(
        forward=0.4,
        reverse=-0.5,
        jsd=0.6,
        entropy=-0.7,
        cross_entropy=0.8,
        skew_forward=-0.3,
        skew_reverse=0.9,
        mixture_weight=0.3,
    ),
    "forward by token": LossTerms(forward=torch.linspace(-1, 1, 37)),
    "by token": LossTerms(
        forward=torch.linspace(0, 1, 37),
        reverse=torch.linspace(1, 0, 37),
        cross_entropy=torch.linspace(-1, 1, 37),
    ),
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25, "bias": True},
    "softcap": {"softcap": 3.0, "scale": 1.5, "bias": True},
    "padded": {"padding": (5, 9)},
}


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("end_ids", [(), ENDS], ids=["raw", "merged"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-6)], ids=["64", "32"]
)
def test_loss_and_gradients_equal_float64_autograd(terms, temperature, end_ids, dtype, tolerance):
    exact = make_inputs()
    weights = torch.linspace(0, 2, 37, dtype=torch.float64)
    expected_N = combined(terms, brute_force(exact, temperature, end_ids))
    expected = 0.1 * (weights * expected_N).sum()
    expected.backward()
    inputs = exact.to(dtype)
    loss_sum, loss_N, _ = fused_loss(
        *inputs.args(),
        terms,
        labels_N=inputs.labels,
        weights_N=weights.to(dtype),
        scale=0.1,
        temperature=temperature,
        end_ids=end_ids,
        tile=(16, 40),
    )
    (2 * loss_sum).backward()
    assert_near(loss_N, expected_N, tolerance)
    assert_near(loss_sum, expected, tolerance)
    for found, reference in zip(inputs.trained, exact.trained, strict=True):
        assert found.grad.dtype == dtype
        assert_near(found.grad, 2 * reference.grad, tolerance)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("end_ids", [(), ENDS], ids=["raw", "merged"])
@pytest.mark.parametrize("name", STUDENT_STATISTICS)
def test_each_statistic_is_differentiable_by_itself(head, end_ids, name):
    exact = make_inputs(**head)
    upstream = torch.linspace(-1, 2, 37, dtype=torch.float64)
    expected = brute_force(exact, 1.3, end_ids, vocab_size=131)
    (getattr(expected, name) * upstream).sum().backward()
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 3e-6)):
        inputs = exact.to(dtype)
        stats = fused_statistics(
            *inputs.args(),
            labels_N=inputs.labels,
            vocab_size=131,
            temperature=1.3,
            end_ids=end_ids,
            mixture_weight=0.3,
            tile=(16, 40),
        )
        for statistic in TokenStats.__slots__:
            value = getattr(stats, statistic)
            # Single-pass values of float32 carry a documented 2e-6 nats.
            torch.testing.assert_close(
                value.detach().double(),
                getattr(expected, statistic).detach(),
                rtol=tolerance,
                atol=tolerance,
            )
            assert value.requires_grad == (not statistic.startswith("teacher"))
        (getattr(stats, name) * upstream.to(dtype)).sum().backward()
        # The gradient of KL(q || m) is b times that of a KL or less; the log-sum-exps round as they
        # do there.
        allowed = tolerance / 0.3 if name == "skew_reverse_N" else tolerance
        for found, reference in zip(inputs.trained, exact.trained, strict=True):
            assert_near(found.grad, reference.grad, allowed)
        if head.get("padding"):
            assert inputs.head.weight_VD.grad[131:].eq(0).all()


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("end_ids", [(), ENDS], ids=["raw", "merged"])
def test_loss_of_every_kind_of_head(head, end_ids):
    exact = make_inputs(**head)
    combined(TERMS["all"], brute_force(exact, 1.3, end_ids, vocab_size=131)).sum().backward()
    inputs = exact.to(torch.float32)
    options = {
        "labels_N": inputs.labels,
        "vocab_size": 131,
        "temperature": 1.3,
        "end_ids": end_ids,
        "tile": (16, 40),
    }
    fused_loss(*inputs.args(), TERMS["all"], **options)[0].backward()
    for found, reference in zip(inputs.trained, exact.trained, strict=True):
        assert_near(found.grad, reference.grad, 3e-6)


def test_gradcheck():
    inputs = make_inputs(num_rows=3, vocab_size=103, dims=(3, 4), bias=True)

    def function(hidden, weight, bias):
        head = Head(weight, bias_V=bias, scale=1.5, softcap=4.0)
        stats = fused_statistics(
            hidden,
            head,
            inputs.teacher_hidden,
            inputs.teacher_head,
            labels_N=inputs.labels,
            mixture_weight=0.6,
            end_ids=ENDS,
            tile=(2, 30),
        )
        return tuple(getattr(stats, name) for name in STUDENT_STATISTICS)

    assert torch.autograd.gradcheck(function, inputs.trained)


def in_another_order(order: Sequence[str]) -> type:
    """The class TokenStats with its fields in this order."""
    types = {field.name: field.type for field in dataclasses.fields(TokenStats)}
    fields = [(name, types[name], dataclasses.field(default=None)) for name in order]
    return dataclasses.make_dataclass("TokenStats", fields, frozen=True, slots=True, kw_only=True)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("num_rows", [37, 0])
def test_the_order_of_the_statistics_changes_nothing(monkeypatch, num_rows, with_labels):
    """Statistics are taken by name: with the fields of the class in other orders, every value and
    gradient stays."""

    names = TokenStats.__slots__

    def everything():
        inputs = make_inputs(num_rows=num_rows)
        options = {
            "labels_N": inputs.labels if with_labels else None,
            "end_ids": ENDS,
            "tile": (16, 40),
        }
        loss, loss_N, of_loss = fused_loss(*inputs.args(), TERMS["jsd"], **options)
        kl_N, close = close_kl(*inputs.args(), **options)
        alone = fused_statistics(inputs.hidden, inputs.head, **options)
        both = fused_statistics(*inputs.args(), mixture_weight=0.3, **options)
        # Each statistic counts differently, so that no two can change places.
        used = [name for name in STUDENT_STATISTICS if getattr(both, name) is not None]
        (loss + sum(i * getattr(both, name).sum() for i, name in enumerate(used, 1))).backward()
        values = {"loss_N": loss_N, "kl_N": kl_N}
        values |= {f"gradient {i}": tensor.grad for i, tensor in enumerate(inputs.trained)}
        for which, stats in {"loss": of_loss, "close": close, "alone": alone, "both": both}.items():
            values |= {f"{name} of {which}": getattr(stats, name) for name in names}
        return values

    expected = everything()
    for order in (names[::-1], names[5:] + names[:5], (names[2], names[3], *names[:2], *names[4:])):
        for module in (fused, coefficients, definition):
            monkeypatch.setattr(module, "TokenStats", in_another_order(order))
        for name, value in everything().items():
            assert (value is None) == (expected[name] is None), name
            assert value is None or torch.equal(value, expected[name]), name


def run_loss(inputs: Inputs, terms=TERMS["all"], **options):
    inputs = inputs.to(inputs.hidden.dtype)
    loss_sum, loss_N, stats = fused_loss(*inputs.args(), terms, labels_N=inputs.labels, **options)
    loss_sum.backward()
    statistics = [getattr(stats, name) for name in TokenStats.__slots__]
    return [loss_N, *(t for t in statistics if t is not None), *(t.grad for t in inputs.trained)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_changes_no_bit(dtype):
    """From nothing resident to everything, in one group of rows and in several."""
    inputs = make_inputs(num_rows=300, vocab_size=1003).to(dtype)
    size = 16 * 40 * 4
    runs = [
        run_loss(inputs, budget=budget, tile=(16, 40), end_ids=ENDS)
        for budget in (0, size, 30 * size, 8 * 64 * 1003, 8 * 200 * 1003, 2**30)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    ("kl", "rows"),
    some(itertools.product(["jsd", "skew forward", "skew reverse"], [13, 16]), every=3),
)
def test_the_budget_changes_no_bit_of_a_divergence_from_a_mixture(kl, rows):
    """Whose end class is a column of its own: rounding must not tell how many rows were looked at
    together."""
    for seed in range(4):
        inputs = make_inputs(num_rows=150, vocab_size=203, seed=seed).to(torch.float32)
        cuts = [
            run_loss(inputs, TERMS[kl], budget=budget, tile=(rows, 50), end_ids=ENDS)
            for budget in (0, 8 * rows * 203, 8 * 3 * rows * 203, 2**30)
        ]
        for cut in cuts[1:]:
            assert all(torch.equal(a, b) for a, b in zip(cuts[0], cut, strict=True))


def test_a_log_mixture_is_right_and_does_not_depend_on_how_it_is_cut():
    generator = torch.Generator().manual_seed(0)
    ls, lt = (-30 * torch.rand(5003, generator=generator) for _ in range(2))
    lt[:3] = torch.tensor([-torch.inf, -1e30, ls[2].item()])
    for size in (1, 3, 7, 16, 33):
        parts = [
            log_mixture(*pair, 0.3) for pair in zip(ls.split(size), lt.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), log_mixture(ls, lt, 0.3))
    exact = [x.double().requires_grad_() for x in (ls, lt[3:])]
    expected = torch.logaddexp(exact[1] + math.log(0.3), exact[0][3:] + math.log(0.7))
    inputs = [x.clone().requires_grad_() for x in (ls, lt[3:])]
    found = log_mixture(inputs[0][3:], inputs[1], 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=3e-7)
    for a, b in zip(
        torch.autograd.grad(found.sum(), inputs),
        torch.autograd.grad(expected.sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("end_ids", [(), ENDS], ids=["raw", "merged"])
@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5, 1e-3])
def test_the_kl_of_models_that_nearly_agree_is_right_and_never_negative(gap, end_ids):
    exact = (
        make_inputs(num_rows=200, vocab_size=1003, dims=(32, 32))
        .to(torch.float32)
        .to(torch.float64)
    )
    noise = gap * torch.randn(
        200, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    exact = dataclasses.replace(
        exact, teacher_hidden=exact.hidden.detach() + noise, teacher_head=exact.head
    )
    inputs = exact.to(torch.float32)
    expected_N = brute_force(inputs.to(torch.float64), 1.3, end_ids).forward_kl_N.detach()
    found_N, stats = close_kl(*inputs.args(), temperature=1.3, end_ids=end_ids, tile=(64, 200))
    assert found_N.dtype == torch.float64 and (found_N >= 0).all()
    torch.testing.assert_close(found_N, expected_N, rtol=5e-3, atol=1e-11)
    torch.testing.assert_close(stats.forward_kl_N.double(), expected_N, rtol=1e-5, atol=2e-6)
    if gap == 1e-5:
        assert (stats.forward_kl_N < 0).any(), "a difference of cross-entropies would have done"


@given(
    st.integers(0, 100),
    st.integers(1, 50),
    st.integers(1, 200),
    st.integers(0, 2**17),
    st.integers(0, 20),
    st.integers(101, 140),
)
@settings(max_examples=40, deadline=None)
def test_any_tile_and_budget_give_the_same(seed, rows, columns, budget, num_rows, vocab_size):
    inputs = make_inputs(num_rows, vocab_size, seed=seed)
    whole = run_loss(inputs, end_ids=ENDS)
    cut = run_loss(inputs, end_ids=ENDS, tile=(rows, columns), budget=budget)
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@given(st.integers(0, 1000), st.floats(0.1, 15), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_properties(seed, spread, forward_weight):
    inputs = make_inputs(num_rows=9, seed=seed, spread=spread)

    def loss(terms, given=inputs):
        return fused_loss(*given.args(), terms, labels_N=given.labels, tile=(4, 50))[1]

    forward, reverse = loss(LossTerms(forward=1.0)), loss(LossTerms(reverse=1.0))
    assert (forward > -1e-12).all() and (reverse > -1e-12).all()
    mixed = loss(LossTerms(forward=forward_weight, reverse=1 - forward_weight))
    torch.testing.assert_close(mixed, forward_weight * forward + (1 - forward_weight) * reverse)
    # Logits are defined up to a constant: a bias' gradient, the sum of dz over rows, sums to zero.
    bias = torch.zeros(131, dtype=torch.float64, requires_grad=True)
    with_bias = dataclasses.replace(inputs.head, bias_V=bias)
    fused_loss(inputs.hidden, with_bias, *inputs.args()[2:], TERMS["all"], labels_N=inputs.labels)[
        0
    ].backward()
    assert abs(bias.grad.sum()) < 1e-9
    bias.grad = None
    weights = torch.linspace(-1, 2, 9, dtype=torch.float64)
    stats = fused_statistics(inputs.hidden, with_bias, *inputs.args()[2:])
    (weights * (stats.student_log_sum_exp_N + stats.reverse_kl_N)).sum().backward()
    assert abs(bias.grad.sum() - weights.sum()) < 1e-9
    # An order of the vocabulary means nothing.
    order = torch.randperm(131, generator=torch.Generator().manual_seed(seed))
    shuffled = [
        dataclasses.replace(h, weight_VD=h.weight_VD[order])
        for h in (inputs.head, inputs.teacher_head)
    ]
    moved = dataclasses.replace(
        inputs, head=shuffled[0], teacher_head=shuffled[1], labels=order.argsort()[inputs.labels]
    )
    torch.testing.assert_close(loss(TERMS["all"], moved), loss(TERMS["all"]), rtol=1e-8, atol=1e-10)
    same = dataclasses.replace(inputs, teacher_hidden=inputs.hidden, teacher_head=inputs.head)
    for terms in (LossTerms(forward=1.0), LossTerms(reverse=1.0), LossTerms(jsd=1.0)):
        assert loss(terms, same).abs().max() < 1e-12


@pytest.mark.parametrize(
    "terms", [LossTerms(forward=1.0), LossTerms(reverse=1.0), LossTerms(forward=0.5, reverse=0.5)]
)
def test_a_tiny_divergence_is_right_to_one_percent(terms):
    """The Bregman form: about 2e-6 nats, where a difference of cross-entropies is noise."""
    torch.manual_seed(0)
    exact = make_inputs(num_rows=64, vocab_size=20_000, dims=(32, 32))
    exact.teacher_head = dataclasses.replace(
        exact.head,
        weight_VD=exact.head.weight_VD.detach()
        + 4e-4 * torch.randn(20_000, 32, dtype=torch.float64),
    )
    exact.teacher_hidden = exact.hidden.detach()
    # The divergence of the rounded inputs is all that float32 can know.
    inputs = exact.to(torch.float32)
    expected_N = combined(terms, brute_force(inputs.to(torch.float64))).detach()
    assert 1e-6 < expected_N.mean() < 3e-6
    loss_N = fused_loss(*inputs.args(), terms)[1]
    assert ((loss_N - expected_N).abs() / expected_N).max() < 0.01


def test_peaked_offset_and_underflowing_logits():
    exact = make_inputs(spread=60.0, bias=True)
    with torch.no_grad():
        exact.head.bias_V.add_(1000)
        exact.teacher_head.bias_V.sub_(1000)
    exact = exact.to(torch.float32).to(torch.float64)
    probs = (exact.hidden @ exact.head.weight_VD.T).float().softmax(-1)
    assert (probs == 0).any(), "nothing underflows"
    terms = LossTerms(forward=0.4, reverse=0.6, jsd=0.2, mixture_weight=0.3)
    logits = [
        h @ head.weight_VD.T + head.bias_V for h, head in (exact.args()[:2], exact.args()[2:])
    ]
    ls, lt = (z.log_softmax(-1) for z in logits)
    lm = torch.logaddexp(lt + math.log(0.3), ls + math.log(0.7))
    forward, reverse = (lt.exp() * (lt - ls)).sum(-1), (ls.exp() * (ls - lt)).sum(-1)
    jsd = 0.3 * (lt.exp() * (lt - lm)).sum(-1) + 0.7 * (ls.exp() * (ls - lm)).sum(-1)
    expected = 0.4 * forward + 0.6 * reverse + 0.2 * jsd
    expected.sum().backward()
    inputs = exact.to(torch.float32)
    loss_sum, loss_N, stats = fused_loss(*inputs.args(), terms)
    loss_sum.backward()
    # A logit of 1000 carries an error of 6e-5 in float32 before anything is done with it.
    assert_near(loss_N, expected, 1e-4)
    assert_near(inputs.hidden.grad, exact.hidden.grad, 2e-4)
    assert all(
        torch.isfinite(t).all()
        for t in (stats.forward_kl_N, stats.reverse_kl_N, inputs.head.weight_VD.grad)
    )


def test_sixteen_bit_inputs_lose_one_rounding():
    """Against float64 on the same rounded inputs: the head's gradient is off by its own rounding
    alone."""
    for dtype in (torch.bfloat16, torch.float16):
        inputs = make_inputs(num_rows=400, vocab_size=1001).to(dtype)
        exact = inputs.to(torch.float64)
        combined(TERMS["all"], brute_force(exact)).sum().mul(0.01).backward()
        loss_sum, _, _ = fused_loss(
            *inputs.args(), TERMS["all"], labels_N=inputs.labels, scale=0.01
        )
        loss_sum.backward()
        for found, reference in zip(inputs.trained, exact.trained, strict=True):
            assert found.grad.dtype == dtype
            rounding = (reference.grad.to(dtype).double() - reference.grad).norm()
            assert (found.grad.double() - reference.grad).norm() < 1.2 * rounding


def test_frozen_heads_tied_heads_and_no_gradient():
    inputs = make_inputs().to(torch.float32)
    whole = run_loss(inputs)
    frozen = dataclasses.replace(inputs.head, weight_VD=inputs.head.weight_VD.detach())
    loss_sum, _, _ = fused_loss(
        inputs.hidden, frozen, *inputs.args()[2:], TERMS["all"], labels_N=inputs.labels
    )
    loss_sum.backward()
    assert torch.equal(inputs.hidden.grad, whole[-2]) and frozen.weight_VD.grad is None
    # Tied: the embedding is both what hidden states come from and the head.
    embedding = inputs.head.weight_VD.detach().double().requires_grad_()
    tied = dataclasses.replace(
        inputs.to(torch.float64), hidden=embedding[inputs.labels], head=Head(embedding)
    )
    (expected,) = torch.autograd.grad(brute_force(tied).reverse_kl_N.sum(), embedding)
    tied = dataclasses.replace(tied, hidden=embedding[inputs.labels])
    (found,) = torch.autograd.grad(fused_loss(*tied.args(), LossTerms(reverse=1.0))[0], embedding)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        loss_sum, loss_N, stats = fused_loss(*inputs.args(), TERMS["mixed"])
    assert not loss_sum.requires_grad and not stats.forward_kl_N.requires_grad
    assert_near(
        loss_N,
        combined(
            TERMS["mixed"],
            dataclasses.replace(
                stats, jsd_N=0, student_log_prob_N=0, skew_forward_N=0, skew_reverse_N=0
            ),
        ),
        1e-5,
    )


def test_without_a_teacher():
    exact = make_inputs(bias=True)
    terms = LossTerms(entropy=-0.3, cross_entropy=1.0)
    combined(terms, dataclasses.replace(brute_force(exact, end_ids=ENDS))).sum().backward()
    inputs = exact.to(torch.float32)
    loss_sum, _, stats = fused_loss(
        inputs.hidden,
        inputs.head,
        None,
        None,
        terms,
        labels_N=inputs.labels,
        end_ids=ENDS,
        tile=(8, 30),
    )
    loss_sum.backward()
    assert (
        stats.forward_kl_N is None
        and stats.teacher_entropy_N is None
        and stats.teacher_log_prob_N is None
    )
    for found, reference in zip(inputs.trained, exact.trained, strict=True):
        assert_near(found.grad, reference.grad, 3e-6)


@pytest.mark.parametrize("budget", [0, 2**20])
def test_no_tokens(budget):
    inputs = make_inputs(num_rows=0)
    loss_sum, loss_N, stats = fused_loss(
        *inputs.args(), TERMS["all"], labels_N=inputs.labels, budget=budget
    )
    loss_sum.backward()
    assert loss_sum == 0 and loss_N.shape == stats.forward_kl_N.shape == (0,)
    assert inputs.hidden.grad.shape == (0, 16) and inputs.head.weight_VD.grad.eq(0).all()
    assert fused_statistics(*inputs.args()).reverse_kl_N.shape == (0,)


def test_the_plain_backend_is_the_same_call():
    inputs = make_inputs(bias=True, softcap=3.0)
    for a, b in zip(
        run_loss(inputs, end_ids=ENDS), run_loss(inputs, end_ids=ENDS, backend="plain"), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    plain = fused_statistics(
        *inputs.args(), labels_N=inputs.labels, backend="plain", mixture_weight=0.3
    )
    fused = fused_statistics(*inputs.args(), labels_N=inputs.labels, mixture_weight=0.3)
    for name in TokenStats.__slots__:
        torch.testing.assert_close(getattr(plain, name), getattr(fused, name))


def test_a_second_backward_is_refused():
    inputs = make_inputs()
    loss_sum, _, _ = fused_loss(*inputs.args(), TERMS["forward"])
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call fused_loss again"):
        loss_sum.backward()


def test_masked_vocabularies_are_refused():
    inputs = make_inputs(bias=True).to(torch.float32)
    with torch.no_grad():
        inputs.teacher_head.bias_V[7] = -math.inf
    with pytest.raises(
        NonFiniteError, match=r"the teacher's logits are NaN or infinite in rows \[0, 1, 2, 3, 4\]"
    ):
        fused_loss(*inputs.args(), TERMS["forward"])
    inputs = make_inputs().to(torch.float32)
    with torch.no_grad():
        inputs.hidden[20] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"the student's logits are NaN or infinite in rows \[20\]"
    ):
        fused_statistics(*inputs.args())


@pytest.mark.parametrize("backend", ["eager", "plain"])
@pytest.mark.parametrize(
    "terms", [LossTerms(forward=1.0), LossTerms(entropy=1.0), LossTerms(cross_entropy=1.0)]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_is_not_finite_is_named_whatever_is_asked(value, terms, backend):
    """A teacher that no term looks at included: its statistics are returned."""
    for who in ("student", "teacher"):
        inputs = make_inputs(num_rows=4, bias=True)
        head = inputs.head if who == "student" else inputs.teacher_head
        with torch.no_grad():
            head.bias_V[7] = value
        message = rf"the {who}'s logits are NaN or infinite in rows \[0, 1, 2, 3\]"
        with pytest.raises(NonFiniteError, match=message):
            fused_loss(*inputs.args(), terms, labels_N=inputs.labels[:4], backend=backend)
        with pytest.raises(NonFiniteError, match=message):
            fused_statistics(*inputs.args(), backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": LossTerms()}, "every term of the loss has weight 0"),
        ({"terms": LossTerms(forward=torch.ones(3))}, r"forward is a tensor \[3\]; give \[37\]"),
        ({"terms": LossTerms(cross_entropy=1.0), "labels_N": None}, "cross_entropy needs labels_N"),
        ({"labels_N": torch.full((37,), 131)}, "a label is 131; it must be between 0 and 130"),
        ({"labels_N": torch.zeros(37)}, r"labels are torch.float32 \[37\]; give int64"),
        ({"end_ids": (1, 200)}, "an end id is 200; it must be between 0 and 130"),
        ({"end_ids": (1, 1)}, "name an id twice"),
        ({"vocab_size": 500}, "vocab_size is 500; the heads have"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"budget": -1}, "memory budget is -1"),
        ({"tile": (0, 5)}, "at least one row"),
        ({"backend": "cuda"}, "choose auto, eager, compiled, triton or plain"),
        ({"weights_N": torch.ones(36)}, r"weights_N is a tensor \[36\]"),
        ({"weights_N": torch.full((37,), math.nan)}, "weights_N holds nan; give finite numbers"),
        ({"terms": LossTerms(forward=math.nan)}, "forward is nan; give a finite number"),
        (
            {"terms": LossTerms(entropy=torch.full((37,), -math.inf))},
            "entropy holds -inf; give finite numbers",
        ),
        ({"scale": math.inf}, "scale is inf; give a finite number"),
    ],
)
def test_bad_input_is_refused(change, message):
    inputs = make_inputs()
    options = {"terms": TERMS["mixed"], "labels_N": inputs.labels} | change
    with pytest.raises(ValueError, match=message):
        fused_loss(*inputs.args(), options.pop("terms"), **options)


def test_sides_that_do_not_fit_are_refused():
    inputs = make_inputs(padding=(0, 3))
    with pytest.raises(ValueError, match="heads of 131 and 134 rows; give vocab_size"):
        fused_loss(*inputs.args(), TERMS["mixed"])
    with pytest.raises(ValueError, match="both the teacher's hidden states and its head"):
        fused_loss(inputs.hidden, inputs.head, None, inputs.teacher_head, TERMS["mixed"])
    with pytest.raises(ValueError, match="forward needs a teacher"):
        fused_loss(inputs.hidden, inputs.head, None, None, TERMS["mixed"])
    with pytest.raises(ValueError, match="37 student rows and 36 teacher rows"):
        fused_loss(
            inputs.hidden,
            inputs.head,
            inputs.teacher_hidden[1:],
            inputs.teacher_head,
            TERMS["mixed"],
        )
    with pytest.raises(
        ValueError, match=r"student: hidden states are \[37, 24\] and the head \[131, 16\]"
    ):
        fused_loss(
            inputs.teacher_hidden,
            inputs.head,
            inputs.teacher_hidden,
            inputs.teacher_head,
            TERMS["mixed"],
        )
    with pytest.raises(
        ValueError, match=r"mixture_weight is 1\.0; it must be strictly between 0 and 1"
    ):
        fused_loss(*make_inputs().args(), LossTerms(jsd=1.0, mixture_weight=1.0))


def test_plans_follow_the_budget_and_the_shapes():
    for budget in (0, 10 * MIB, 64 * MIB, 256 * MIB, 2**33):
        for num_rows in (0, 256, 1024, 8192):
            plan = make_plan(num_rows, 151_936, budget)
            assert plan.rows * plan.columns * 4 <= 4 * MIB
            assert plan.num_resident * plan.rows * plan.columns * 4 <= budget
    # All rows at once when little stays, as many as stay whole otherwise, and no fewer than a tile
    # has.
    assert make_plan(1024, 151_936, 0).group_rows == 1024
    assert make_plan(1024, 151_936, 256 * MIB).group_rows == 256
    assert make_plan(1024, 151_936, 1024 * MIB).group_rows == 768
    # A small vocabulary leaves room for more rows in a tile; a fixed tile stays as it is.
    assert make_plan(10**6, 23, 0)[:2] == (256 * (3072 // 23), 23)
    assert make_plan(1024, 151_936, 2**30, tile=(16, 40))[:2] == (16, 40)


def test_extra_memory_does_not_grow_with_the_rows():
    """High-water mark of a process, without what goes in and the gradients that come out."""
    script = Path(__file__).parents[1] / "support" / "memory_probe.py"
    extra = {}
    for num_rows in (512, 4096):
        done = subprocess.run(
            [sys.executable, str(script), str(num_rows)], capture_output=True, text=True, check=True
        )
        extra[num_rows] = float(done.stdout)
    # One [N, V] tensor of float32 would be 33 and 262 MB.
    assert extra[512] < 12 and extra[4096] < extra[512] + 3, extra
