"""Every divergence in plain PyTorch: the value per token and its gradient with respect to the
student's logits.

Works on tensors alone and knows nothing of models, batches or masks. This is the definition that
faster versions are tested against. Notation: p teacher, q student, z student logits, w the forward
weight, m a mixture of p and q.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from potstill.kl.terms import TokenStats


def forward_kl(student_log_probs_NV: Tensor, teacher_log_probs_NV: Tensor, weight: float = 1.0):
    """KL(p || q), whose gradient is dL/dz = q - p."""
    p_NV, q_NV = teacher_log_probs_NV.exp(), student_log_probs_NV.exp()
    value_N = (p_NV * (teacher_log_probs_NV - student_log_probs_NV)).sum(-1)
    return value_N, q_NV - p_NV


def reverse_kl(student_log_probs_NV: Tensor, teacher_log_probs_NV: Tensor, weight: float = 0.0):
    """KL(q || p), whose gradient is dL/dz = q (log q - log p - KL(q || p))."""
    q_NV = student_log_probs_NV.exp()
    log_ratio_NV = student_log_probs_NV - teacher_log_probs_NV
    value_N = (q_NV * log_ratio_NV).sum(-1)
    return value_N, q_NV * (log_ratio_NV - value_N[:, None])


def mixed_kl(student_log_probs_NV: Tensor, teacher_log_probs_NV: Tensor, weight: float):
    """w KL(p || q) + (1 - w) KL(q || p), the exact linear mixture (not a JSD), and its gradient."""
    forward_N, forward_grad_NV = forward_kl(student_log_probs_NV, teacher_log_probs_NV)
    reverse_N, reverse_grad_NV = reverse_kl(student_log_probs_NV, teacher_log_probs_NV)
    value_N = weight * forward_N + (1 - weight) * reverse_N
    return value_N, weight * forward_grad_NV + (1 - weight) * reverse_grad_NV


def jsd(student_log_probs_NV: Tensor, teacher_log_probs_NV: Tensor, weight: float):
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q; dL/dz = (1 - b) q (log q - log m
    - KL(q || m)).

    It vanishes at both ends of b and is no mixture of the two KLs (Agarwal et al., arXiv
    2306.13649).
    """
    p_NV, q_NV = teacher_log_probs_NV.exp(), student_log_probs_NV.exp()
    lm_NV = log_mixture(student_log_probs_NV, teacher_log_probs_NV, weight)
    of_student_NV = student_log_probs_NV - lm_NV
    reverse_N = (q_NV * of_student_NV).sum(-1)
    value_N = weight * (p_NV * (teacher_log_probs_NV - lm_NV)).sum(-1) + (1 - weight) * reverse_N
    return value_N, (1 - weight) * q_NV * (of_student_NV - reverse_N[:, None])


def skew_forward(student_log_probs_NV: Tensor, teacher_log_probs_NV: Tensor, weight: float):
    """KL(p || m) with m = a p + (1 - a) q; dL/dz = (1 - a) q (sum q p / m - p / m). DistiLLM, arXiv
    2402.03898."""
    p_NV, q_NV = teacher_log_probs_NV.exp(), student_log_probs_NV.exp()
    lm_NV = log_mixture(student_log_probs_NV, teacher_log_probs_NV, weight)
    ratio_NV = (teacher_log_probs_NV - lm_NV).exp()
    value_N = (p_NV * (teacher_log_probs_NV - lm_NV)).sum(-1)
    return value_N, (1 - weight) * q_NV * ((q_NV * ratio_NV).sum(-1, keepdim=True) - ratio_NV)


def skew_reverse(student_log_probs_NV: Tensor, teacher_log_probs_NV: Tensor, weight: float):
    """KL(q || m) with m = a q + (1 - a) p; dL/dz = q (f - sum q f), f = log q - log m - a q / m.
    DistiLLM."""
    q_NV = student_log_probs_NV.exp()
    lm_NV = log_mixture(student_log_probs_NV, teacher_log_probs_NV, 1 - weight)
    of_student_NV = student_log_probs_NV - lm_NV
    f_NV = of_student_NV - weight * of_student_NV.exp()
    return (q_NV * of_student_NV).sum(-1), q_NV * (f_NV - (q_NV * f_NV).sum(-1, keepdim=True))


# Each takes (student_log_probs_NV, teacher_log_probs_NV, weight) and gives (value_N, dL/dz_NV).
DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "mixed": mixed_kl,
    "jsd": jsd,
    "skew-forward": skew_forward,
    "skew-reverse": skew_reverse,
}


def token_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    kl: str,
    *,
    weight: float = 0.5,
    temperature: float = 1.0,
    end_ids: Sequence[int] = (),
) -> tuple[Tensor, TokenStats]:
    """The divergence at each of N positions, differentiable in the student's logits, and all
    statistics.

    `kl` is one of DIVERGENCES; `weight` is that of the forward KL in "mixed", b of "jsd" (the
    teacher's in the mixture) and a of the skew KLs (that of the KL's first model in it), strictly
    between 0 and 1 but for "mixed". `temperature` divides both models' logits. With two or more
    `end_ids`, these ids count as one class on both sides: the exact divergence of the coarser
    distributions. Arithmetic is in float32, or float64 for float64 logits. The statistics are those
    of the tempered, merged distributions. Raises ValueError for shapes that differ or an unknown
    `kl`.
    """
    if student_logits_NV.shape != teacher_logits_NV.shape:
        raise ValueError(
            f"student logits are {tuple(student_logits_NV.shape)} and teacher logits "
            f"{tuple(teacher_logits_NV.shape)}: both must be [N, V] over the same vocabulary; "
            "cut the heads to the shared rows first"
        )
    if kl not in DIVERGENCES:
        raise ValueError(f"kl is {kl!r}; choose one of {sorted(DIVERGENCES)}")
    student_NV = merge_end_class(_at_least_float32(student_logits_NV) / temperature, end_ids)
    with torch.no_grad():
        teacher_NV = merge_end_class(_at_least_float32(teacher_logits_NV) / temperature, end_ids)
        student_log_probs_NV = student_NV.log_softmax(-1)
        teacher_log_probs_NV = teacher_NV.log_softmax(-1)
        value_N, grad_NV = DIVERGENCES[kl](student_log_probs_NV, teacher_log_probs_NV, weight)
        stats = token_statistics(student_NV, teacher_NV)
    return _WithGradient.apply(student_NV, value_N, grad_NV), stats


def token_statistics(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor | None = None,
    *,
    labels_N: Tensor | None = None,
    temperature: float = 1.0,
    end_ids: Sequence[int] = (),
    mixture_weight: float | None = None,
) -> TokenStats:
    """Every statistic of N positions from whole logits, by their definitions and differentiable by
    autograd.

    `mixture_weight` b asks for the divergences from m = b p + (1 - b) q: KL(p || m), KL(q || m) and
    the JSD, b of the first and 1 - b of the second. The other arguments are those of
    `token_divergence`; the log-sum-exps are those of the tempered logits.
    """

    def log_prob(logits_NV: Tensor, log_sum_exp_N: Tensor) -> Tensor | None:
        if labels_N is None:
            return None
        picked_N = logits_NV.gather(1, labels_N[:, None]).squeeze(1)
        if len(end_ids) > 1:
            is_end_N = torch.isin(labels_N, torch.tensor(end_ids, device=labels_N.device))
            picked_N = torch.where(is_end_N, logits_NV[:, list(end_ids)].logsumexp(-1), picked_N)
        return picked_N - log_sum_exp_N

    z_NV = _at_least_float32(student_logits_NV) / temperature
    z_sum_N, ls_NV = z_NV.logsumexp(-1), merge_end_class(z_NV, end_ids).log_softmax(-1)
    stats = TokenStats(
        student_entropy_N=entropy(ls_NV),
        student_log_sum_exp_N=z_sum_N,
        student_log_prob_N=log_prob(z_NV, z_sum_N),
    )
    if teacher_logits_NV is None:
        return stats
    y_NV = _at_least_float32(teacher_logits_NV) / temperature
    y_sum_N, lt_NV = y_NV.logsumexp(-1), merge_end_class(y_NV, end_ids).log_softmax(-1)
    p_NV, q_NV = lt_NV.exp(), ls_NV.exp()
    jsd_N = skew_forward_N = skew_reverse_N = None
    if mixture_weight is not None:
        lm_NV = log_mixture(ls_NV, lt_NV, mixture_weight)
        skew_forward_N, skew_reverse_N = (
            (p_NV * (lt_NV - lm_NV)).sum(-1),
            (q_NV * (ls_NV - lm_NV)).sum(-1),
        )
        jsd_N = mixture_weight * skew_forward_N + (1 - mixture_weight) * skew_reverse_N
    return dataclasses.replace(
        stats,
        forward_kl_N=(p_NV * (lt_NV - ls_NV)).sum(-1),
        reverse_kl_N=(q_NV * (ls_NV - lt_NV)).sum(-1),
        jsd_N=jsd_N,
        teacher_entropy_N=entropy(lt_NV),
        teacher_log_sum_exp_N=y_sum_N,
        teacher_log_prob_N=log_prob(y_NV, y_sum_N),
        skew_forward_N=skew_forward_N,
        skew_reverse_N=skew_reverse_N,
    )


def merge_end_class(logits_NV: Tensor, end_ids: Sequence[int]) -> Tensor:
    """Logits in which the end ids are one class: the rest in their order, then the log-sum-exp of
    the end ids."""
    if len(end_ids) < 2:
        return logits_NV
    is_end_V = torch.zeros(logits_NV.shape[-1], dtype=torch.bool, device=logits_NV.device)
    is_end_V[list(end_ids)] = True
    end_N1 = logits_NV[:, is_end_V].logsumexp(-1, keepdim=True)
    return torch.cat([logits_NV[:, ~is_end_V], end_N1], dim=-1)


def entropy(log_probs_NV: Tensor) -> Tensor:
    """Token entropy in nats, [N]."""
    return -(log_probs_NV.exp() * log_probs_NV).sum(-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _WithGradient(torch.autograd.Function):
    """`value_N` as a function of the logits whose gradient is the given closed form."""

    @staticmethod
    def forward(ctx, logits_NV, value_N, grad_NV):
        ctx.save_for_backward(grad_NV)
        return value_N

    @staticmethod
    def backward(ctx, upstream_N):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_NV,) = ctx.saved_tensors
        return grad_NV * upstream_N[:, None], None, None


def log_mixture(
    student_log_probs: Tensor, teacher_log_probs: Tensor, mixture_weight: float
) -> Tensor:
    """log m by log-add-exp: the log of a sum of probabilities would be -inf where both underflow.

    Not by `torch.logaddexp`, which on a CPU rounds an element by where it lies: in a vector, or in
    the rest after them.
    """
    of_teacher = teacher_log_probs + math.log(mixture_weight)
    of_student = student_log_probs + math.log1p(-mixture_weight)
    gap = (of_teacher - of_student).abs()
    return torch.maximum(of_teacher, of_student) + torch.exp(-gap).log1p()
