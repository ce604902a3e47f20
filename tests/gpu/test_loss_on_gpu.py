"""The loss on a GPU, in every backend, against float64 autograd of the definition on the CPU."""

import dataclasses
import math

import pytest
import torch
from test_fused import ENDS, TERMS, assert_near, brute_force, combined, make_inputs
from test_hook import frozen, mixing

from potstill.kl.fused import fused_loss
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms

pytestmark = pytest.mark.gpu

HEAD = {"bias": True, "softcap": 3.0, "scale": 1.5}
# Of the largest entry of a gradient. In 16 bits the inputs are rounded alike on both sides.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
BACKENDS = ("triton", "eager", "compiled", "plain")


def moved(value, device):
    """The tensors of a value on a device, as leaves of their own."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if not dataclasses.is_dataclass(value):
        return value
    fields = dataclasses.fields(value)
    parts = {field.name: moved(getattr(value, field.name), device) for field in fields}
    return dataclasses.replace(value, **parts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("end_ids", [(), ENDS], ids=["raw", "merged"])
@pytest.mark.parametrize("name", TERMS)
def test_gradients_equal_float64_autograd(cuda, name, end_ids, dtype, backend):
    rounded = make_inputs(**HEAD).to(dtype)
    exact, inputs = rounded.to(torch.float64), moved(rounded, cuda)
    terms = TERMS[name]
    combined(terms, brute_force(exact, 1.3, end_ids)).sum().backward()
    options = {"labels_N": inputs.labels, "temperature": 1.3, "end_ids": end_ids}
    loss_sum, _, _ = fused_loss(*inputs.args(), moved(terms, cuda), backend=backend, **options)
    loss_sum.backward()
    for found, reference in zip(inputs.trained, exact.trained, strict=True):
        assert_near(found.grad.cpu(), reference.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_by_a_function_equal_float64_autograd(cuda, backend):
    exact = make_inputs(**HEAD)
    inputs = moved(exact.to(torch.float32), cuda)
    frozen(mixing, exact, 1.3, ENDS).sum().backward()

    def on_gpu(stats, rows):
        terms = mixing(moved(stats, "cpu"), rows)
        return moved(terms, cuda)

    options = {"labels_N": inputs.labels, "temperature": 1.3, "end_ids": ENDS}
    loss_sum, _, _ = fused_loss(
        *inputs.args(), on_gpu, mixture_weight=0.3, backend=backend, **options
    )
    loss_sum.backward()
    for found, reference in zip(inputs.trained, exact.trained, strict=True):
        assert_near(found.grad.cpu(), reference.grad, 5e-6)


def peak_bytes(num_rows: int) -> int:
    """The memory of a loss and its gradient beyond its inputs and gradients, without a budget."""
    vocab_size, dims = 151_936, (256, 512)
    made = [torch.randn(num_rows, dim, device="cuda") for dim in dims]
    heads = [torch.randn(vocab_size, dim, device="cuda") / math.sqrt(dim) for dim in dims]
    made[0].requires_grad_()
    heads[0].requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    terms = LossTerms(forward=0.3, reverse=0.7)
    loss_sum, _, _ = fused_loss(made[0], Head(heads[0]), made[1], Head(heads[1]), terms, budget=0)
    loss_sum.backward()
    gradients = 4 * (made[0].numel() + heads[0].numel())
    return torch.cuda.max_memory_allocated() - before - gradients


def test_memory_does_not_grow_with_the_rows(cuda):
    peak_bytes(64)
    few, many = peak_bytes(1024), peak_bytes(8192)
    # A few numbers a row stay.
    assert many - few < 8192 * 1024, (few, many)
