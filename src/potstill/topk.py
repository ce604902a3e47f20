"""The divergence from a teacher of which only the k likeliest tokens of each position are known.

The rest of the vocabulary is one more class, the tail, on both sides. What is minimised is then the exact KL between
two distributions over k + 1 classes, which is at most the whole one and grows with k up to it. A sum over the k tokens
alone would be no KL: its gradient pushes mass into the tail for nothing. Shapes: N loss tokens, K kept tokens.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.divergence import entropy, merge_end_class
from potstill.fused import detached, fused_statistics, token_loss
from potstill.heads import Head
from potstill.tiles import log_mixture
from potstill.types import LossTerms, TokenStats

# Rows of a head that are gathered at a time, in elements.
GATHERED_ELEMENTS = 2**22


@dataclass(frozen=True)
class TopK:
    """What is known of a teacher: its likeliest tokens, how likely, and what is left.

    `end_log_prob_N` is that of the end class where the end ids are one (else None), `tail_log_prob_N` that of all other
    tokens (None where there are none), `entropy_N` (nats) that of the whole distribution, end ids merged.
    """

    token_ids_NK: Tensor
    log_probs_NK: Tensor
    end_log_prob_N: Tensor | None
    tail_log_prob_N: Tensor | None
    entropy_N: Tensor

    def cut(self, k: int) -> "TopK":
        """The `k` likeliest alone; the others go to the tail."""
        if k >= self.token_ids_NK.shape[1]:
            return self
        rest = self.log_probs_NK[:, k:]
        if self.tail_log_prob_N is not None:
            rest = torch.cat([rest, self.tail_log_prob_N[:, None]], -1)
        cut = {"token_ids_NK": self.token_ids_NK[:, :k], "log_probs_NK": self.log_probs_NK[:, :k]}
        return dataclasses.replace(self, **cut, tail_log_prob_N=rest.logsumexp(-1))


@torch.no_grad()
def top_k_of(
    hidden_NE: Tensor,
    head: Head,
    k: int,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    end_ids: Sequence[int] = (),
) -> TopK:
    """The `k` likeliest tokens (all, when there are fewer), the members of an end class of two or more ids left out.

    Logits are held for a few rows at a time.
    """
    vocab_size = vocab_size or len(head.weight_VD)
    members = list(end_ids) if len(end_ids) > 1 else []
    num_kept = min(k, vocab_size - len(members))
    step = max(GATHERED_ELEMENTS // vocab_size, 1)
    parts: list[list[Tensor]] = []
    for start in range(0, max(len(hidden_NE), 1), step):
        log_probs = (head(hidden_NE[start : start + step], vocab_size) / temperature).log_softmax(-1)
        entropies = entropy(merge_end_class(log_probs, members))
        ends = log_probs[:, members].logsumexp(-1)
        log_probs[:, members] = -torch.inf
        kept, ids = log_probs.topk(num_kept, dim=-1)
        # Summed from what is left, not as 1 minus what is kept, which would round a small tail away.
        tail = log_probs.scatter(1, ids, -torch.inf).logsumexp(-1)
        parts.append([ids, kept, ends, tail, entropies])
    ids, kept, ends, tail, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
    has_tail = num_kept + len(members) < vocab_size
    return TopK(ids, kept, ends if members else None, tail if has_tail else None, entropies)


def top_k_loss(
    hidden_ND: Tensor,
    head: Head,
    teacher: TopK,
    terms: LossTerms,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    end_ids: Sequence[int] = (),
    backend: str = "auto",
) -> tuple[Tensor, TokenStats]:
    """The divergence of each token between teacher and student over the kept tokens, the end class and the tail.

    `terms` weighs divergences alone. Returns `(loss_N, stats)`: the first is differentiable in the student; the
    statistics are the student's own, the teacher's entropy, and both KLs of the coarse distributions. The student's
    tail is what the kept tokens leave of 1; below the resolution of the type (1e-7 in float32) it counts as that.
    """
    stats = fused_statistics(
        hidden_ND,
        head,
        vocab_size=vocab_size,
        temperature=temperature,
        end_ids=end_ids,
        backend=backend,
    )
    log_sum_exp_N = stats.student_log_sum_exp_N

    def log_probs(ids: Tensor) -> Tensor:
        return picked_log_probs(hidden_ND, head, ids, log_sum_exp_N, temperature)

    students, teachers = [log_probs(teacher.token_ids_NK)], [teacher.log_probs_NK]
    if teacher.end_log_prob_N is not None:
        members = torch.tensor(end_ids, device=hidden_ND.device).expand(len(hidden_ND), -1)
        students.append(log_probs(members).logsumexp(-1, keepdim=True))
        teachers.append(teacher.end_log_prob_N[:, None])
    if teacher.tail_log_prob_N is not None:
        mass_N1 = 1 - torch.cat(students, -1).double().exp().sum(-1, keepdim=True)
        resolution = torch.finfo(log_sum_exp_N.dtype).eps
        students.append(mass_N1.clamp(min=resolution).log().to(log_sum_exp_N.dtype))
        teachers.append(teacher.tail_log_prob_N[:, None])
    ls, lt = torch.cat(students, -1), torch.cat(teachers, -1).to(log_sum_exp_N.dtype)
    # A class that the teacher gives nothing at all adds nothing to a KL from the teacher.
    is_known = lt > -torch.inf
    lm = log_mixture(ls, lt, terms.mixture_weight)
    skew_forward_N = torch.where(is_known, lt.exp() * (lt - lm), 0.0).sum(-1)
    skew_reverse_N = (ls.exp() * (ls - lm)).sum(-1)
    known = {
        "forward_kl_N": torch.where(is_known, lt.exp() * (lt - ls), 0.0).sum(-1),
        "reverse_kl_N": (ls.exp() * (ls - lt)).sum(-1),
        "jsd_N": terms.mixture_weight * skew_forward_N + (1 - terms.mixture_weight) * skew_reverse_N,
        "teacher_entropy_N": teacher.entropy_N,
        "skew_forward_N": skew_forward_N,
        "skew_reverse_N": skew_reverse_N,
    }
    stats = dataclasses.replace(stats, **known)
    return token_loss(terms, stats), detached(stats)


def picked_log_probs(
    hidden_ND: Tensor, head: Head, ids_NK: Tensor, log_sum_exp_N: Tensor, temperature: float
) -> Tensor:
    """The log-probabilities [N, K] of K tokens a row, differentiable, from the log-sum-exp of the tempered logits."""
    logits = _Picked.apply(hidden_ND, head.weight_VD, ids_NK)
    logits = head.scale * (logits if head.bias_V is None else logits + head.bias_V[ids_NK].to(logits.dtype))
    logits = logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap
    return logits / temperature - log_sum_exp_N[:, None]


class _Picked(torch.autograd.Function):
    """h W' at K columns of each row, [N, K]; neither way holds more than a few rows' gathered columns."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, ids_NK):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK)
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        out = hidden_ND.new_empty(ids_NK.shape, dtype=dtype)
        for rows in _row_slices(ids_NK, weight_VD):
            out[rows] = torch.einsum("nd,nkd->nk", hidden_ND[rows].to(dtype), weight_VD[ids_NK[rows]].to(dtype))
        return out

    @staticmethod
    def backward(ctx, g_NK):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_ND, weight_VD, ids_NK = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight_VD, dtype=g_NK.dtype) if ctx.needs_input_grad[1] else None
        for rows in _row_slices(ids_NK, weight_VD):
            ids, g = ids_NK[rows], g_NK[rows]
            if hidden_grad is not None:
                hidden_grad[rows] = torch.einsum("nk,nkd->nd", g, weight_VD[ids].to(g.dtype)).to(hidden_grad.dtype)
            if weight_grad is not None:
                outer = g[:, :, None] * hidden_ND[rows].to(g.dtype)[:, None]
                weight_grad.index_add_(0, ids.flatten(), outer.flatten(0, 1))
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight_VD.dtype), None


def _row_slices(ids_NK: Tensor, weight_VD: Tensor) -> list[slice]:
    step = max(GATHERED_ELEMENTS // max(ids_NK.shape[1] * weight_VD.shape[1], 1), 1)
    return [slice(start, start + step) for start in range(0, len(ids_NK), step)]
