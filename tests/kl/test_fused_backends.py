"""Other implementations of the same call: Triton, torch.compile, several ranks, and two peers."""

import dataclasses
import shutil

import pytest
import torch
import torch.distributed as dist
from forked import name_of
from safetensors.torch import load_file, save_file
from test_fused import ENDS, TERMS, assert_near, brute_force, combined, make_inputs, run_loss

from potstill.kl.fused import fused_loss, fused_statistics
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms, VocabShard

HEAD = {"bias": True, "softcap": 3.0, "scale": 1.5}


@pytest.fixture(scope="module")
def triton_kernels():
    pytest.importorskip(
        "triton",
        reason="Triton is not installed; pip install 'potstill[peers]'",
        exc_type=ImportError,
    )
    from potstill.kl import triton_tiles

    return triton_tiles


def of_rows(terms: LossTerms, num_rows: int) -> LossTerms:
    """Terms whose weights by token are those of the first rows."""
    weights = {name: getattr(terms, name) for name in LossTerms.__slots__}
    cut = {
        name: weight[:num_rows]
        for name, weight in weights.items()
        if isinstance(weight, torch.Tensor)
    }
    return dataclasses.replace(terms, **cut)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("end_ids", [(), ENDS], ids=["raw", "merged"])
def test_triton_equals_float64_autograd(triton_kernels, monkeypatch, name, end_ids):
    """Rows and columns that no tile divides, columns that no block divides, and several blocks a
    row."""
    monkeypatch.setattr(triton_kernels, "BLOCK", 32)
    exact = make_inputs(num_rows=11, **HEAD)
    terms = of_rows(TERMS[name], 11)
    combined(terms, brute_force(exact, 1.3, end_ids)).sum().backward()
    inputs = exact.to(torch.float32)
    options = {"labels_N": inputs.labels, "temperature": 1.3, "end_ids": end_ids, "tile": (8, 70)}
    fused_loss(*inputs.args(), terms, backend="triton", **options)[0].backward()
    for found, reference in zip(inputs.trained, exact.trained, strict=True):
        assert_near(found.grad, reference.grad, 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_equals_eager(triton_kernels, dtype):
    inputs = make_inputs(num_rows=19, vocab_size=1003, dims=(40, 56)).to(dtype)
    runs = [run_loss(inputs, end_ids=ENDS, backend=backend) for backend in ("eager", "triton")]
    for a, b in zip(*runs, strict=True):
        assert_near(b, a, 3e-6 if a.dtype == torch.float32 else 2**-7)


def test_triton_without_a_teacher(triton_kernels):
    inputs = make_inputs().to(torch.float32)
    grads = []
    for backend in ("eager", "triton"):
        given = inputs.to(torch.float32)
        terms = LossTerms(entropy=0.5, cross_entropy=1.0)
        fused_loss(
            given.hidden, given.head, None, None, terms, labels_N=given.labels, backend=backend
        )[0].backward()
        grads.append([t.grad for t in given.trained])
    for a, b in zip(*grads, strict=True):
        assert_near(b, a, 3e-6)


def test_triton_is_refused_where_it_cannot_run(triton_kernels, monkeypatch):
    with pytest.raises(ValueError, match="computes in float32"):
        run_loss(make_inputs(), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_kernels.triton_backend.cache_clear()
    with pytest.raises(ValueError, match="choose eager or compiled"):
        run_loss(make_inputs().to(torch.float32), backend="triton")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["mixed", "forward"])
def test_compiled_equals_float64_autograd(name):
    exact = make_inputs()
    combined(TERMS[name], brute_force(exact)).sum().backward()
    inputs = exact.to(torch.float32)
    fused_loss(*inputs.args(), TERMS[name], backend="compiled", tile=(16, 70))[0].backward()
    for found, reference in zip(inputs.trained, exact.trained, strict=True):
        assert_near(found.grad, reference.grad, 3e-6)


def rows_of_rank(inputs, cut: int):
    """The inputs of one of two ranks, with its rows of both vocabularies, and the first of them."""
    rows = slice(0, cut) if dist.get_rank() == 0 else slice(cut, None)

    def part(head, trained):
        weight, bias = (
            t.detach()[rows].clone().requires_grad_(trained) for t in (head.weight_VD, head.bias_V)
        )
        return Head(weight, bias_V=bias, scale=head.scale, softcap=head.softcap)

    mine = {"head": part(inputs.head, True), "teacher_head": part(inputs.teacher_head, False)}
    return dataclasses.replace(inputs, **mine), rows.start


def on_a_rank(cut: int) -> None:
    """One rank's rows of both vocabularies; its results are left in a file."""
    dist.init_process_group("gloo")
    inputs = make_inputs(**HEAD).to(torch.float32)
    mine, start = rows_of_rank(inputs, cut)
    head, teacher_head, rank = mine.head, mine.teacher_head, dist.get_rank()
    options = {"labels_N": inputs.labels, "end_ids": ENDS, "temperature": 1.3, "tile": (16, 20)}
    shard = VocabShard(start)
    loss_sum, _, _ = fused_loss(
        inputs.hidden,
        head,
        inputs.teacher_hidden,
        teacher_head,
        TERMS["all"],
        shard=shard,
        **options,
    )
    loss_sum.backward()
    loss = [loss_sum.detach(), inputs.hidden.grad, head.weight_VD.grad, head.bias_V.grad]
    inputs.hidden.grad = head.weight_VD.grad = head.bias_V.grad = None
    stats = fused_statistics(
        inputs.hidden,
        head,
        inputs.teacher_hidden,
        teacher_head,
        mixture_weight=0.3,
        shard=shard,
        **options,
    )
    upstream = torch.linspace(-1, 2, 37)
    ((stats.reverse_kl_N + stats.student_log_prob_N + stats.jsd_N) * upstream).sum().backward()
    values = [
        stats.forward_kl_N.detach(),
        stats.teacher_log_prob_N,
        inputs.hidden.grad,
        head.weight_VD.grad,
    ]
    save_file(
        {str(i): t.contiguous() for i, t in enumerate([*loss, *values])}, f"{rank}.safetensors"
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("cut", [60, 41])
def test_two_ranks_with_uneven_shards_equal_float64(tmp_path, forks, cut):
    """End ids 2, 40 and 100: on both ranks."""
    ended = forks.run_ranks(tmp_path, [name_of(on_a_rank), cut], num_ranks=2)
    assert ended.code == 0, ended.err
    exact = make_inputs(**HEAD)
    stats = brute_force(exact, 1.3, ENDS)
    loss = combined(TERMS["all"], stats).sum()
    upstream = torch.linspace(-1, 2, 37, dtype=torch.float64)
    other = ((stats.reverse_kl_N + stats.student_log_prob_N + stats.jsd_N) * upstream).sum()
    grads = torch.autograd.grad(loss, exact.trained, retain_graph=True)
    other_grads = torch.autograd.grad(other, exact.trained)
    for rank, rows in enumerate((slice(0, cut), slice(cut, None))):
        saved = load_file(tmp_path / f"{rank}.safetensors")
        found, values = [saved[str(i)] for i in range(4)], [saved[str(i)] for i in range(4, 8)]
        for a, b in zip(found, (loss, grads[0], grads[1][rows], grads[2][rows]), strict=True):
            assert_near(a, b.detach(), 3e-6)
        expected = (
            stats.forward_kl_N,
            stats.teacher_log_prob_N,
            other_grads[0],
            other_grads[1][rows],
        )
        for a, b in zip(values, expected, strict=True):
            assert_near(a, b.detach(), 3e-6)


@pytest.mark.parametrize("kl", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_trl_gives_the_same(kl, temperature):
    reason = "TRL is not installed; pip install 'potstill[peers]'"
    peer = pytest.importorskip(
        "trl.kernels.chunked_divergence", reason=reason, exc_type=ImportError
    )
    function = peer.ChunkedDivergenceFunction
    theirs, ours = make_inputs().to(torch.float32), make_inputs().to(torch.float32)
    # Its mixture is (1 - beta) student + beta teacher; beta 0 is the forward and 1 the reverse KL.
    beta = {"forward": 0.0, "reverse": 1.0, "jsd": 0.3}[kl]
    value_N, _ = function.apply(
        theirs.hidden, theirs.head.weight_VD, None,
        theirs.teacher_hidden, theirs.teacher_head.weight_VD, None,
        beta, temperature,
    )  # fmt: skip
    value_N.sum().backward()
    terms = LossTerms(**{kl: 1.0}, mixture_weight=0.3)
    loss_sum, loss_N, _ = fused_loss(*ours.args(), terms, temperature=temperature)
    loss_sum.backward()
    torch.testing.assert_close(loss_N, value_N.detach(), rtol=1e-5, atol=1e-5)
    for a, b in zip(ours.trained, theirs.trained, strict=True):
        assert_near(a.grad, b.grad, 1e-5)


@pytest.mark.parametrize("kl", ["forward", "reverse", "jsd"])
def test_liger_gives_the_same(kl):
    reason = "Liger-Kernel is not installed; pip install 'potstill[peers]'"
    peer = pytest.importorskip(
        "liger_kernel.chunked_loss.jsd_loss", reason=reason, exc_type=ImportError
    )
    theirs, ours = make_inputs().to(torch.float32), make_inputs().to(torch.float32)
    beta = {"forward": 0.0, "reverse": 1.0, "jsd": 0.3}[kl]
    liger = peer.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False
    )
    value = liger(
        theirs.hidden,
        theirs.head.weight_VD,
        theirs.teacher_hidden,
        theirs.teacher_head.weight_VD,
        theirs.labels,
    )
    value.backward()
    terms = LossTerms(**{kl: 1.0}, mixture_weight=0.3)
    # Its mean is over the tokens.
    loss_sum, _, _ = fused_loss(*ours.args(), terms, scale=1 / 37)
    loss_sum.backward()
    torch.testing.assert_close(loss_sum, value, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours.trained, theirs.trained, strict=True):
        assert_near(a.grad, b.grad, 1e-5)


def test_sixteen_bit_gradients_are_much_better_than_rounded_logits():
    """Relative error of the head's gradient against float64 on the same bfloat16 inputs."""
    inputs = make_inputs(num_rows=256, vocab_size=20_000, dims=(64, 96), spread=4.0).to(
        torch.bfloat16
    )
    exact = inputs.to(torch.float64)
    (exact_grad,) = torch.autograd.grad(brute_force(exact).forward_kl_N.sum(), exact.head.weight_VD)

    def error(loss):
        (grad,) = torch.autograd.grad(loss, inputs.head.weight_VD)
        return ((grad.double() - exact_grad).norm() / exact_grad.norm()).item()

    ours = error(fused_loss(*inputs.args(), LossTerms(forward=1.0))[0])
    rounding = (
        (exact_grad.to(torch.bfloat16).double() - exact_grad).norm() / exact_grad.norm()
    ).item()
    assert ours < 1.2 * rounding
    student, teacher = (
        (h @ head.weight_VD.T).float().log_softmax(-1)
        for h, head in (inputs.args()[:2], inputs.args()[2:])
    )
    assert (
        error(torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True))
        > 8 * ours
    )
    peer = pytest.importorskip(
        "liger_kernel.chunked_loss.jsd_loss", reason="Liger-Kernel is not installed"
    )
    liger = peer.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False
    )
    weights = (inputs.head.weight_VD, inputs.teacher_hidden, inputs.teacher_head.weight_VD)
    assert error(liger(inputs.hidden, *weights, inputs.labels) * 256) > 8 * ours
