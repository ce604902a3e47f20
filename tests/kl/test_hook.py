"""Terms by a function of each token's statistics: against float64 autograd of the definition with
the same weights frozen."""

import dataclasses
import math
import shutil

import pytest
import torch
import torch.distributed as dist
from forked import name_of
from safetensors.torch import load_file, save_file
from test_fused import ENDS, assert_near, brute_force, combined, make_inputs
from test_fused_backends import HEAD, rows_of_rank
from test_topk import coarse_statistics

from potstill.kl import tiles
from potstill.kl.definition import token_statistics
from potstill.kl.fused import detached, fused_loss
from potstill.kl.terms import LossTerms, TokenStats, VocabShard
from potstill.kl.topk import top_k_loss, top_k_of

NUM = 37
SIGNS = torch.randint(2, (300,), generator=torch.Generator().manual_seed(1)) * 2 - 1.0
# All of a row's tiles stay, or those of so many rows do.
TILE = (8, 40)
BUDGETS = {"none": 0, "two groups": 2 * 4 * 2 * 8 * 131, "everything": 2**30}


def mixing(stats: TokenStats, rows: slice) -> LossTerms:
    """Every term, each with a weight of its own: by entropy, by log-ratio, by place, and by a
    number."""
    is_above = (stats.teacher_entropy_N > 3.45).to(stats.teacher_entropy_N.dtype)
    log_ratio = stats.student_log_prob_N - stats.teacher_log_prob_N
    return LossTerms(
        forward=is_above,
        # torch.sigmoid rounds an element by its place in a vector.
        reverse=1 / (1 + (-log_ratio).exp()) - is_above,
        entropy=0.1 * (stats.student_entropy_N - stats.teacher_entropy_N),
        cross_entropy=SIGNS[rows] * stats.teacher_log_prob_N.exp(),
        jsd=stats.jsd_N,
        skew_forward=-0.3,
        skew_reverse=stats.skew_reverse_N - stats.skew_forward_N,
        mixture_weight=0.3,
    )


def frozen(function, inputs, temperature=1.0, end_ids=()):
    """The loss [N] by the definition in float64, whose weights are constants."""
    stats = brute_force(inputs, temperature, end_ids)
    return combined(function(detached(stats), slice(0, len(inputs.hidden))), stats)


def run(inputs, function, **options):
    inputs = inputs.to(inputs.hidden.dtype)
    options = {"labels_N": inputs.labels, "mixture_weight": 0.3, "tile": TILE} | options
    loss_sum, loss_N, _ = fused_loss(*inputs.args(), function, **options)
    loss_sum.backward()
    return [loss_N, *(t.grad for t in inputs.trained)]


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("end_ids", [(), ENDS], ids=["raw", "merged"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-6)], ids=["64", "32"]
)
def test_value_and_gradients_equal_float64_autograd(budget, end_ids, dtype, tolerance):
    exact = make_inputs(**HEAD)
    weights = torch.linspace(0, 2, NUM, dtype=torch.float64)
    expected_N = frozen(mixing, exact, 1.3, end_ids)
    (0.1 * weights * expected_N).sum().backward()
    options = {"weights_N": weights.to(dtype), "scale": 0.1, "temperature": 1.3}
    found = run(exact.to(dtype), mixing, end_ids=end_ids, budget=budget, **options)
    for a, b in zip(found, [expected_N, *(t.grad for t in exact.trained)], strict=True):
        assert_near(a, b.detach(), tolerance)


@pytest.mark.parametrize(
    "backend",
    [
        "plain",
        pytest.param("triton", marks=pytest.mark.slow),
        pytest.param(
            "compiled",
            marks=[
                pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
                pytest.mark.slow,
            ],
        ),
    ],
)
def test_every_backend_gives_the_same(backend):
    if backend == "triton":
        reason = "Triton is not installed; pip install 'potstill[peers]'"
        pytest.importorskip("triton", reason=reason, exc_type=ImportError)
    inputs = make_inputs(**HEAD).to(torch.float32)
    expected = run(inputs, mixing, end_ids=ENDS)
    found = run(inputs, mixing, end_ids=ENDS, backend=backend, budget=BUDGETS["two groups"])
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_changes_no_bit(dtype):
    inputs = make_inputs(num_rows=300, vocab_size=1003).to(dtype)
    calls, runs = [], []

    def counted(stats, rows):
        calls[-1].append((rows.start, rows.stop, len(stats.jsd_N)))
        return mixing(stats, rows)

    for budget in (0, 30 * 4 * 16 * 40, 8 * 64 * 1003, 8 * 200 * 1003, 2**30):
        calls.append([])
        runs.append(run(inputs, counted, budget=budget, tile=(16, 40), end_ids=ENDS))
    for found in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], found, strict=True))
    # Whatever the groups are, each row is asked for once, and its statistics alone are there.
    for call in calls:
        assert [row for start, stop, _ in call for row in range(start, stop)] == list(range(300))
        assert all(number == stop - start for start, stop, number in call)
    # The gradient of a 16-bit head takes all rows at once.
    assert max(map(len, calls)) > 3 or dtype != torch.float32


def test_a_function_of_constants_is_the_constants():
    """To the bit: the same terms by a function and as they are, by number and by token."""
    inputs = make_inputs(num_rows=150, **HEAD).to(torch.float32)
    terms = LossTerms(
        forward=0.4,
        reverse=torch.linspace(-1, 1, 150),
        jsd=0.6,
        entropy=-0.7,
        cross_entropy=SIGNS[:150],
        skew_reverse=0.9,
        mixture_weight=0.3,
    )
    mixed = LossTerms(forward=0.3, reverse=0.7)
    for fixed, mixture_weight in ((terms, 0.3), (mixed, None), (LossTerms(forward=1.0), None)):
        options = {"end_ids": ENDS, "budget": BUDGETS["two groups"], "mixture_weight": None}
        expected = run(inputs, fixed, **options)
        options |= {"mixture_weight": mixture_weight}
        found = run(inputs, lambda stats, rows, terms=fixed: terms.of_rows(rows), **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["eager", "plain"])
def test_without_gradients_the_value_is_the_same(backend):
    exact = make_inputs(**HEAD)
    expected_N = frozen(mixing, exact).detach()
    options = {"labels_N": exact.labels, "mixture_weight": 0.3, "tile": TILE, "backend": backend}
    with torch.no_grad():
        loss_sum, loss_N, _ = fused_loss(*exact.args(), mixing, **options)
    assert_near(loss_N, expected_N, 1e-10)
    assert not loss_sum.requires_grad
    loss_sum, loss_N, _ = fused_loss(*make_inputs(num_rows=0).args(), mixing, backend="eager")
    assert loss_sum == 0 and loss_N.shape == (0,)


def test_a_group_may_have_no_term_at_all():
    """Rows from 16 on have none, and rows before it are groups of their own."""

    def first_rows(stats, rows):
        return LossTerms(reverse=1.0) if rows.start < 16 else LossTerms()

    exact = make_inputs()
    brute_force(exact).reverse_kl_N[:16].sum().backward()
    found = run(exact.to(torch.float64), first_rows, budget=BUDGETS["two groups"])
    assert found[0][16:].eq(0).all() and found[0][:16].gt(0).all()
    for a, b in zip(found[1:], exact.trained, strict=True):
        assert_near(a, b.grad, 1e-10)
    for backend in ("eager", "plain"):
        nothing = run(exact, lambda stats, rows: LossTerms(), backend=backend)
        assert all(value.eq(0).all() for value in nothing)


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize(
    "terms", [LossTerms(forward=0.3, reverse=0.7), LossTerms(jsd=1.0, mixture_weight=0.3)]
)
def test_no_pass_is_added(monkeypatch, budget, terms):
    """The functions of a tile are called as often as for the same terms without a function."""
    calls: list[str] = []

    def counting(name):
        function = getattr(eager, name)
        return lambda *arguments: (calls.append(name), function(*arguments))[1]

    eager = tiles.EAGER
    names = ("statistics", "mixture", "gradient")
    counted = eager._replace(**{name: counting(name) for name in names})
    monkeypatch.setattr(tiles, "EAGER", counted)
    inputs = make_inputs().to(torch.float32)
    b = 0.3 if terms.has_mixture else None
    run(inputs, terms, budget=budget, mixture_weight=b)
    fixed, calls[:] = list(calls), []
    run(inputs, lambda stats, rows: terms.of_rows(rows), budget=budget, mixture_weight=b)
    assert calls == fixed and ("mixture" in calls) == terms.has_mixture
    assert calls.count("statistics") == calls.count("gradient") == 5 * 4


def on_a_rank(cut: int) -> None:
    """One rank's rows of both vocabularies; its results are left in a file."""
    dist.init_process_group("gloo")
    inputs = make_inputs(**HEAD).to(torch.float32)
    mine, start = rows_of_rank(inputs, cut)
    options = {"labels_N": inputs.labels, "end_ids": ENDS, "temperature": 1.3, "tile": (16, 20)}
    loss_sum, loss_N, _ = fused_loss(
        *mine.args(), mixing, mixture_weight=0.3, shard=VocabShard(start), **options
    )
    loss_sum.backward()
    values = [loss_N, *(t.grad for t in mine.trained)]
    save_file(
        {str(i): t.contiguous() for i, t in enumerate(values)}, f"{dist.get_rank()}.safetensors"
    )
    dist.destroy_process_group()


def test_two_ranks_with_uneven_shards_equal_float64(tmp_path, forks):
    ended = forks.run_ranks(tmp_path, [name_of(on_a_rank), 60], num_ranks=2)
    assert ended.code == 0, ended.err
    exact = make_inputs(**HEAD)
    loss_N = frozen(mixing, exact, 1.3, ENDS)
    hidden, weight, bias = torch.autograd.grad(loss_N.sum(), exact.trained)
    for rank, rows in enumerate((slice(0, 60), slice(60, None))):
        saved = load_file(tmp_path / f"{rank}.safetensors")
        for i, expected in enumerate((loss_N.detach(), hidden, weight[rows], bias[rows])):
            assert_near(saved[str(i)], expected, 5e-6)


def of_coarse(stats: TokenStats, rows: slice) -> LossTerms:
    """Terms by what is known of a teacher's likeliest tokens."""
    return LossTerms(
        forward=torch.sigmoid(stats.teacher_entropy_N - 3.45),
        reverse=stats.reverse_kl_N,
        jsd=-0.5,
        skew_reverse=stats.skew_forward_N,
        entropy=0.1 * stats.student_entropy_N,
        cross_entropy=SIGNS[rows],
        mixture_weight=0.3,
    )


@pytest.mark.parametrize("end_ids", [(), ENDS], ids=["raw", "merged"])
def test_the_likeliest_tokens_take_a_function_too(end_ids):
    exact = make_inputs(**HEAD)
    options = {"temperature": 1.3, "end_ids": end_ids}
    teacher = top_k_of(*exact.args()[2:], 8, **options)
    coarse = coarse_statistics(exact, teacher.token_ids_NK, 1.3, end_ids, teacher.entropy_N)
    own = token_statistics(exact.head(exact.hidden, 131), labels_N=exact.labels, **options)
    names = ("student_entropy_N", "student_log_prob_N")
    stats = dataclasses.replace(coarse, **{name: getattr(own, name) for name in names})
    given = of_coarse(detached(stats), slice(0, NUM))
    expected_N = combined(given, stats)
    upstream = torch.linspace(-1, 2, NUM, dtype=torch.float64)
    gradients = torch.autograd.grad((expected_N * upstream).sum(), exact.trained)
    options |= {"labels_N": exact.labels}
    for terms, mixture_weight in ((of_coarse, 0.3), (given, None)):
        inputs = exact.to(torch.float64)
        loss_N, _ = top_k_loss(
            *inputs.args()[:2], teacher, terms, mixture_weight=mixture_weight, **options
        )
        assert_near(loss_N.detach(), expected_N.detach(), 1e-10)
        found = torch.autograd.grad((loss_N * upstream).sum(), inputs.trained)
        for a, b in zip(found, gradients, strict=True):
            assert_near(a, b, 1e-10)


BAD = {
    "no number": (
        lambda stats, rows: LossTerms(reverse=[1.0]),
        "reverse is a list; give a number or a tensor",
    ),
    "flags": (
        lambda stats, rows: LossTerms(reverse=stats.reverse_kl_N > 1),
        "reverse is a tensor of torch.bool; give floating-point numbers",
    ),
    "not terms": (lambda stats, rows: stats.reverse_kl_N, "it returned Tensor; return LossTerms"),
    "of all rows": (
        lambda stats, rows: LossTerms(forward=SIGNS[:NUM]),
        r"forward is a tensor \[37\]; give \[16\], one number a row",
    ),
    "not finite": (
        lambda stats, rows: LossTerms(reverse=stats.reverse_kl_N / 0),
        "reverse holds inf; give finite numbers",
    ),
    "not a number": (
        lambda stats, rows: LossTerms(entropy=math.nan),
        "entropy is nan; give a finite number",
    ),
    "with a gradient": (
        lambda stats, rows: LossTerms(reverse=torch.ones((), requires_grad=True) * SIGNS[rows]),
        "reverse is a tensor with a gradient; weights are constants: detach it",
    ),
    "without labels": (
        lambda stats, rows: LossTerms(forward=1.0, cross_entropy=SIGNS[rows]),
        "the term cross_entropy needs labels_N",
    ),
    "another mixture": (
        lambda stats, rows: LossTerms(jsd=1.0),
        "the term jsd has mixture_weight 0.5 and the call None; give both the same",
    ),
}


@pytest.mark.parametrize(("function", "message"), BAD.values(), ids=BAD)
def test_bad_terms_are_refused(function, message):
    inputs = make_inputs().to(torch.float32)
    who = "^the function of terms, for rows 0 to"
    with pytest.raises(ValueError, match=f"{who} 16: {message}$"):
        fused_loss(*inputs.args(), function, tile=TILE, budget=BUDGETS["two groups"])
    if function is BAD["of all rows"][0]:
        return
    message = f"{who} 37: {message}$"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        fused_loss(*inputs.args(), function)
    with pytest.raises(ValueError, match=message):
        fused_loss(*inputs.args(), function, backend="plain")
    teacher = top_k_of(*inputs.args()[2:], 8)
    with pytest.raises(ValueError, match=message):
        top_k_loss(*inputs.args()[:2], teacher, function)


def test_fixed_terms_are_refused_as_a_function_s_are():
    inputs = make_inputs().to(torch.float32)
    weight = torch.ones(NUM, requires_grad=True)
    teacher = top_k_of(*inputs.args()[2:], 8)
    for terms, options, message in (
        (LossTerms(forward=weight), {}, "^forward is a tensor with a gradient; weights are"),
        (LossTerms(jsd=1.0), {"mixture_weight": 0.3}, r"^the term jsd has mixture_weight 0\.5 and"),
        (LossTerms(forward=1.0, cross_entropy=1.0), {}, "^the term cross_entropy needs labels_N$"),
        (LossTerms(), {}, "^every term of the loss has weight 0; give at least one"),
        (LossTerms(jsd=1.0, mixture_weight=1.0), {}, r"^mixture_weight is 1\.0; it must be strict"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_loss(*inputs.args(), terms, **options)
        with pytest.raises(ValueError, match=message):
            top_k_loss(*inputs.args()[:2], teacher, terms, **options)


def test_terms_are_scaled_and_cut():
    weights = torch.linspace(0, 1, 5)
    terms = LossTerms(forward=0.5, reverse=weights, jsd=-1, mixture_weight=0.3)
    doubled = terms.scaled(2.0)
    assert doubled.forward == 1 and doubled.jsd == -2 and doubled.mixture_weight == 0.3
    assert torch.equal(doubled.reverse, 2 * weights)
    by_token = terms.scaled(weights)
    assert torch.equal(by_token.forward, 0.5 * weights)
    assert torch.equal(by_token.reverse, weights * weights)
    # An absent term stays absent, so that no statistics are taken for it.
    assert by_token.entropy == by_token.cross_entropy == by_token.skew_forward == 0
    cut = terms.of_rows(slice(1, 3))
    assert torch.equal(cut.reverse, weights[1:3]) and cut.forward == 0.5
