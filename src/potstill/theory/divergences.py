"""Identities of the divergences at one prefix, on random logits: each by its definition, their
mixtures and limits, and the coarser one with a single end class.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from potstill.config import Objective
from potstill.kl.definition import DIVERGENCES, merge_end_class, token_divergence
from potstill.kl.fused import fused_loss
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms
from potstill.objectives.loss import Loss
from potstill.theory.check import Check
from potstill.theory.enumeration import apart


def _logits(
    seed: int, scale: float = 1.5, num_rows: int = 5, num_columns: int = 7
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(2, num_rows, num_columns, generator=generator, dtype=torch.float64) * scale
    )
    return student.requires_grad_(), teacher


def definition(kind: str, student: Tensor, teacher: Tensor, weight: float) -> Tensor:
    """A divergence [N] from probabilities, differentiable by autograd."""
    q, p = student.softmax(-1), teacher.softmax(-1)

    def of(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m, other = weight * p + (1 - weight) * q, weight * q + (1 - weight) * p
    return {
        "forward": lambda: of(p, q),
        "reverse": lambda: of(q, p),
        "mixed": lambda: weight * of(p, q) + (1 - weight) * of(q, p),
        "jsd": lambda: weight * of(p, m) + (1 - weight) * of(q, m),
        "skew-forward": lambda: of(p, m),
        "skew-reverse": lambda: of(q, other),
    }[kind]()


def plain_terms(kind: str, weight: float) -> LossTerms:
    """The terms that training has for a kind of KL."""
    settings = {
        "mixed": "forward_weight",
        "jsd": "jsd_weight",
        "skew-forward": "skew",
        "skew-reverse": "skew",
    }
    fields: dict[str, Any] = {"kl": kind} | ({settings[kind]: weight} if kind in settings else {})
    return Loss(objective=Objective(**fields), normalize="token").terms()


def _both_ways(
    student: Tensor, teacher: Tensor, kind: str, weight: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Value [N] and gradient of a divergence as the plain and as the fused code compute it."""
    value_N, _ = token_divergence(student, teacher, kind, weight=weight)
    (gradient,) = torch.autograd.grad(value_N.sum(), student)
    head = Head(torch.eye(student.shape[1], dtype=torch.float64))
    loss_sum, loss_N, _ = fused_loss(student, head, teacher, head, plain_terms(kind, weight))
    (fused,) = torch.autograd.grad(loss_sum, student)
    return {"closed form": (value_N.detach(), gradient), "fused": (loss_N, fused)}


def divergences() -> Iterator[Check]:
    student, teacher = _logits(3)
    found = {}
    for kind in DIVERGENCES:
        exact = definition(kind, student, teacher, 0.3)
        (gradient,) = torch.autograd.grad(exact.sum(), student)
        for way, (value, its) in _both_ways(student, teacher, kind, 0.3).items():
            error = max(apart(value, exact.detach()), apart(its, gradient))
            found[kind, way] = value, its
            yield Check(name=f"{kind}: value and gradient by definition ({way})", error=error)
    for way in ("closed form", "fused"):
        parts = [
            apart(
                found["mixed", way][i],
                0.3 * found["forward", way][i] + 0.7 * found["reverse", way][i],
            )
            for i in (0, 1)
        ]
        yield Check(
            name=f"mixed = w forward + (1 - w) reverse, value and gradient ({way})",
            error=max(parts),
        )
        for weight, kind in ((0.0, "reverse"), (1.0, "forward")):
            ends = _both_ways(student, teacher, "mixed", weight)[way]
            error = max(apart(a, b) for a, b in zip(ends, found[kind, way], strict=True))
            yield Check(name=f"mixed at w = {weight:g} = {kind} ({way})", error=error)
    # Nearer to each other, as the series in b ends where a ratio of probabilities does.
    student, teacher = _logits(3, scale=0.4)
    nodes = [1e-4 * i for i in range(1, 7)]
    for name, kind, of_b, end in (
        ("JSD(b) / b -> forward KL as b -> 0", "forward", lambda b: (b, b), 0.0),
        ("JSD(b) / (1 - b) -> reverse KL as b -> 1", "reverse", lambda b: (1 - b, b), 1.0),
    ):
        for way in ("closed form", "fused"):
            values = []
            for b in nodes:
                weight, divisor = of_b(b)
                values.append(_both_ways(student, teacher, "jsd", weight)[way][0] / divisor)
            exact = definition(kind, student, teacher, 0.5)
            yield Check(name=f"{name} ({way})", error=apart(_at_zero(nodes, values), exact))
        almost = _both_ways(student, teacher, "jsd", abs(end - 1e-10))["closed form"][0]
        yield Check(
            name=f"JSD(b) = 0 at b = {end:g}, where it is no KL",
            error=apart(almost, torch.zeros_like(almost)),
        )


def _at_zero(nodes: list[float], values: list[Tensor]) -> Tensor:
    """The polynomial through some points, at 0."""
    total = torch.zeros_like(values[0])
    for i, value in enumerate(values):
        factors = [-x / (nodes[i] - x) for j, x in enumerate(nodes) if j != i]
        total = total + math.prod(factors) * value
    return total


def coarse() -> Iterator[Check]:
    student, teacher = _logits(4)
    ends = [1, 4, 5]
    for kind in ("forward", "reverse"):
        exact = definition(
            kind, merge_end_class(student, ends), merge_end_class(teacher, ends), 0.5
        )
        (gradient,) = torch.autograd.grad(exact.sum(), student)
        head = Head(torch.eye(student.shape[1], dtype=torch.float64))
        loss_sum, loss_N, _ = fused_loss(
            student, head, teacher, head, plain_terms(kind, 0.5), end_ids=ends
        )
        (fused,) = torch.autograd.grad(loss_sum, student)
        error = max(apart(loss_N, exact.detach()), apart(fused, gradient))
        yield Check(
            name=f"one end class, {kind} KL: that of the coarser distributions", error=error
        )
        gap = (definition(kind, student, teacher, 0.5) - exact).detach()
        yield Check(
            name=f"one end class, {kind} KL: at most the whole one",
            error=float((-gap).clamp(min=0).max()),
        )
