"""The entropy of a student at a stationary point of the forward KL (arXiv 2610.03529).

The hidden states of both models are fixed. The student's have fewer dimensions than the vocabulary
has tokens, so that it cannot become the teacher. Training's fused loss moves the student's head.

Shapes: N loss tokens, V vocabulary, D hidden.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.kl.fused import fused_loss
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms, TokenStats
from potstill.theory.check import DISTANCE, Check
from potstill.theory.enumeration import apart

NUM_TOKENS, VOCAB_SIZE, HIDDEN_SIZE = 12, 5, 3
# The largest component of a gradient that counts as zero, and the most steps towards it.
STATIONARY, MAX_STEPS = 1e-10, 500


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Fixed hidden states [N, D] of a student, logits [N, V] of a teacher, and a loss.

    `weights_N` sum to 1. Half of `decay` times the squared norm of what is trained is added.
    """

    hidden_ND: Tensor
    teacher_NV: Tensor
    weights_N: Tensor
    terms: LossTerms
    temperature: float = 1.0
    decay: float = 0.0
    end_ids: tuple[int, ...] = ()

    def divergence(self, weight_VD: Tensor) -> tuple[Tensor, TokenStats]:
        """The weighted mean divergence under a student's head, and statistics of each token."""
        loss_sum, _, stats = fused_loss(
            self.hidden_ND,
            Head(weight_VD),
            self.teacher_NV,
            Head(torch.eye(VOCAB_SIZE, dtype=torch.float64)),
            self.terms,
            weights_N=self.weights_N,
            temperature=self.temperature,
            end_ids=self.end_ids,
        )
        return loss_sum, stats

    def excess(self, stats: TokenStats) -> float:
        """Mean student entropy minus the sum of mean teacher entropy and mean forward KL (nats)."""
        assert stats.teacher_entropy_N is not None and stats.forward_kl_N is not None
        predicted_N = stats.teacher_entropy_N + stats.forward_kl_N
        return float((self.weights_N * (stats.student_entropy_N - predicted_N)).sum())

    def stationary(
        self, start: Tensor, head: Callable[[Tensor], Tensor] = torch.clone
    ) -> tuple[Tensor, TokenStats]:
        """The trained weights at a stationary point, and statistics there; `head` makes a head of
        them.

        Where the gradient does not vanish in MAX_STEPS, the identities show it.
        """
        x = start.clone().requires_grad_()
        size, before = 1.0, None
        for _ in range(MAX_STEPS):
            loss_sum, _ = self.divergence(head(x))
            (gradient,) = torch.autograd.grad(loss_sum + self.decay / 2 * (x**2).sum(), x)
            if gradient.abs().max() < STATIONARY:
                break
            if before is not None:
                # Barzilai and Borwein: the last step tells how long the next one may be.
                moved, turned = x.detach() - before[0], gradient - before[1]
                size = float((moved * moved).sum() / (moved * turned).sum().abs())
            before = x.detach().clone(), gradient
            with torch.no_grad():
                x -= size * gradient
        return x.detach(), self.divergence(head(x.detach()))[1]


def _setting() -> tuple[Setting, Tensor]:
    """A setting, and a head [V, D] at which nothing is stationary."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    equal_N = torch.full((NUM_TOKENS,), 1 / NUM_TOKENS, dtype=torch.float64)
    setting = Setting(
        hidden_ND=normal(NUM_TOKENS, HIDDEN_SIZE),
        teacher_NV=2 * normal(NUM_TOKENS, VOCAB_SIZE),
        weights_N=equal_N,
        terms=LossTerms(forward=1.0),
    )
    return setting, normal(VOCAB_SIZE, HIDDEN_SIZE)


def entropy_identities() -> Iterator[Check]:
    """Check section 10 of docs/theory.md."""
    setting, head_VD = _setting()
    identity, zero_VD = "H(student) = H(teacher) + forward KL", torch.zeros_like(head_VD)
    tempered = replace(setting, temperature=2.0)
    uneven = replace(setting, weights_N=setting.hidden_ND[:, 0].softmax(0))
    for what, each in (
        ("trained head", setting),
        ("trained head, tokens that count unequally, weighted means", uneven),
        ("trained head at temperature 2, entropies at 2", tempered),
    ):
        trained_VD, stats = each.stationary(zero_VD)
        yield Check(name=f"{what}: {identity}", error=abs(each.excess(stats)))
    _, stats = replace(each, temperature=1.0).divergence(trained_VD)
    name = "trained head at temperature 2, entropies at 1: no such identity"
    yield Check(name=name, error=abs(setting.excess(stats)), bound=DISTANCE, differs=True)

    def scaled(gain_D: Tensor) -> Tensor:
        return head_VD * gain_D

    _, stats = setting.stationary(torch.ones(HIDDEN_SIZE, dtype=torch.float64), scaled)
    name = f"fixed head, trained gain of the norm before it: {identity}"
    yield Check(name=name, error=abs(setting.excess(stats)))
    yield from _excesses(setting, head_VD)


def _excesses(setting: Setting, head_VD: Tensor) -> Iterator[Check]:
    """How far off the identity is where a condition fails."""
    head_VD = head_VD.clone().requires_grad_()
    loss_sum, stats = setting.divergence(head_VD)
    (gradient_VD,) = torch.autograd.grad(loss_sum, head_VD)
    slope = (head_VD.detach() * gradient_VD).sum()
    yield Check(
        name="any head: the excess = -(derivative of the loss along the logits' scale)",
        error=apart(setting.excess(stats), -slope),
    )
    zero_VD = torch.zeros_like(gradient_VD)
    decayed = replace(setting, decay=0.05)
    trained_VD, stats = decayed.stationary(zero_VD)
    yield Check(
        name="weight decay: the excess = decay times the head's squared norm",
        error=apart(setting.excess(stats), decayed.decay * (trained_VD**2).sum()),
    )
    ends = replace(setting, end_ids=(1, 3))
    trained_VD, stats = ends.stationary(zero_VD)
    q_NE, p_NE = (
        logits_NV.softmax(-1)[:, list(ends.end_ids)]
        for logits_NV in (setting.hidden_ND @ trained_VD.T, setting.teacher_NV)
    )
    share_NE = q_NE / q_NE.sum(1, keepdim=True)
    inner_N = -(share_NE * share_NE.log()).sum(1)
    expected = (setting.weights_N * (p_NE.sum(1) - q_NE.sum(1)) * inner_N).sum()
    yield Check(
        name="one end class: the excess = mean (p(ends) - q(ends)) H(which end, student)",
        error=apart(setting.excess(stats), expected),
    )
    _, stats = replace(setting, terms=LossTerms(reverse=1.0)).stationary(zero_VD)
    name = "head trained by the reverse KL: no such identity, and an entropy below it"
    yield Check(name=name, error=-setting.excess(stats), bound=DISTANCE, differs=True)
