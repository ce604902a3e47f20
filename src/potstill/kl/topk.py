"""The divergence from a teacher of which only the k likeliest tokens of each position are known.

The rest of the vocabulary is one more class, the tail, on both sides. What is minimised is then the
exact KL between two distributions over k + 1 classes, which is at most the whole one and grows with
k up to it. A sum over the k tokens alone would be no KL: its gradient pushes mass into the tail for
nothing. Shapes: N loss tokens, K kept tokens.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.kl import tiles
from potstill.kl.definition import log_mixture
from potstill.kl.fused import detached, fused_statistics, token_loss
from potstill.kl.head import Head
from potstill.kl.inputs import Problem, check_settings
from potstill.kl.plan import Tile
from potstill.kl.terms import LossTerms, TermsFunction, TokenStats
from potstill.kl.tiles import MASKED
from potstill.kl.walk import Walk, check_finite
from potstill.kl.weights import KnownInputs, asked_mixture, check_terms, terms_of_rows

# Rows of a head that are gathered at a time, in elements.
GATHERED_ELEMENTS = 2**22
# Columns of a tile that are looked at as one, in search of the likeliest.
CHUNK = 8


@dataclass(frozen=True, kw_only=True)
class TopK:
    """A teacher's likeliest tokens, how likely they are, and how likely are the rest.

    `end_log_prob_N` is that of the end class where the end ids are one (else None),
    `tail_log_prob_N` that of all other tokens (None where there are none), `entropy_N` (nats) that
    of the whole distribution, end ids merged, where it is known.
    """

    token_ids_NK: Tensor
    log_probs_NK: Tensor
    end_log_prob_N: Tensor | None
    tail_log_prob_N: Tensor | None
    entropy_N: Tensor | None

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
    tile: tuple[int, int] | None = None,
) -> TopK:
    """The `k` likeliest tokens (all, when there are fewer), the members of an end class of two or
    more ids left out.

    The vocabulary is walked in tiles, as for the loss; `tile` fixes a tile's (rows, columns). What
    is not kept is summed as such, not as 1 minus what is kept, which would round a small tail away.
    Raises NonFiniteError for logits that are NaN or infinite.
    """
    problem = Problem(
        hidden_NE, head, None, None, None, vocab_size, temperature, tuple(end_ids), None, None
    )
    num_kept = min(k, problem.vocab_size - len(problem.members))
    walk, everything = Walk(problem, 0, "eager", tile, trains_head=False), range(problem.num_rows)
    kept = hidden_NE.new_full((problem.num_rows, num_kept), MASKED, dtype=problem.dtype)
    ids = torch.zeros_like(kept, dtype=torch.long)
    tail = tiles.empty_state(problem.num_rows, kept)
    for part in walk.tiles(everything):
        block = part.block
        kept[block], ids[block], dropped = _keep(part, kept[block], ids[block])
        rest = walk.backend.statistics(part.z, None, walk.scratch)
        tail[..., block] = tiles.merge(tail[..., block], tiles.tile_statistics(dropped, None), rest)
    kept, order = kept.sort(descending=True)
    ids = ids.gather(1, order)
    whole = tiles.merge(tail, tiles.tile_statistics(kept, None))
    ends = kept.new_zeros(problem.num_rows)
    if problem.merges_ends:
        for block in walk.blocks(everything):
            ends[block] = walk.member_logits(problem.student, block).logsumexp(-1)
        whole = tiles.merge(whole, tiles.tile_statistics(ends[:, None], None))
    check_finite(whole, everything, problem)
    # The maximum goes first: a log-sum-exp, rounded as a large number, would bring an error of its
    # size.
    (top_N, sum_N, *_), (tail_top_N, tail_sum_N, *_) = whole[0], tail[0]
    log_sum_N, has_tail = sum_N.log(), num_kept + len(problem.members) < problem.vocab_size
    return TopK(
        token_ids_NK=ids,
        log_probs_NK=kept - top_N[:, None] - log_sum_N[:, None],
        end_log_prob_N=ends - top_N - log_sum_N if problem.merges_ends else None,
        tail_log_prob_N=tail_top_N - top_N + tail_sum_N.log() - log_sum_N if has_tail else None,
        entropy_N=tiles.moments_of(whole).student_entropy,
    )


def _keep(tile: Tile, kept_NK: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest K of those kept so far and of a tile, their ids, and what is kept no longer
    (else MASKED).

    What is kept now is masked in the tile.
    """
    columns = _candidates(tile.z, kept_NK)
    logits = torch.cat([kept_NK, tile.z.gather(1, columns)], 1)
    ids = torch.cat([ids_NK, columns + tile.columns.start], 1)
    kept, places = logits.topk(kept_NK.shape[1], sorted=False)
    logits.scatter_(1, places, MASKED)
    dropped, left = logits.tensor_split([kept_NK.shape[1]], 1)
    tile.z.scatter_(1, columns, left)
    return kept, ids.gather(1, places), dropped


def _candidates(z_NC: Tensor, kept_NK: Tensor) -> Tensor:
    """Columns of a tile among which each row's likeliest K are, if they are likelier than what is
    kept.

    The columns are cut into chunks. Only in those is one of the likeliest whose own likeliest is
    among the first K, and above the least of the kept; few are, after the first tiles.
    """
    num = z_NC.shape[1] // CHUNK
    chunks_NLC = z_NC[:, : CHUNK * num].unflatten(1, (CHUNK, num))
    best_NC = chunks_NLC.amax(1)
    num_above = int((best_NC > kept_NK.amin(1, keepdim=True)).sum(1).amax())
    chosen_NC = best_NC.topk(min(num_above, kept_NK.shape[1]), sorted=False).indices
    steps_L1 = num * torch.arange(CHUNK, device=z_NC.device)[:, None]
    columns = (chosen_NC[:, None] + steps_L1).flatten(1)
    rest = torch.arange(CHUNK * num, z_NC.shape[1], device=z_NC.device).expand(len(z_NC), -1)
    return torch.cat([columns, rest], 1)


def top_k_loss(
    hidden_ND: Tensor,
    head: Head,
    teacher: TopK,
    terms: LossTerms | TermsFunction,
    *,
    labels_N: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    end_ids: Sequence[int] = (),
    mixture_weight: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, TokenStats]:
    """The divergence of each token between teacher and student over the kept tokens, the end class
    and the tail.

    `terms` are those of `fused_loss`; a function is called once, with all rows. The divergences are
    of the coarse distributions, entropy and cross-entropy the student's own over the whole
    vocabulary. Returns `(loss_N, stats)`: the first is differentiable in the student; the
    statistics are those that the terms may weigh, and the teacher's entropy. The student's tail is
    what the kept tokens leave of 1; below the resolution of the type (1e-7 in float32) it counts as
    that. Other arguments and errors are those of `fused_loss`.
    """
    mixture_weight = asked_mixture(terms, mixture_weight)
    check_settings(temperature, mixture_weight, has_teacher=True)
    check_terms(terms, KnownInputs(True, labels_N is not None, mixture_weight), len(hidden_ND))
    stats = fused_statistics(
        hidden_ND,
        head,
        labels_N=labels_N,
        vocab_size=vocab_size,
        temperature=temperature,
        end_ids=end_ids,
        backend=backend,
    )
    ls, lt = _coarse_log_probs(
        hidden_ND, head, teacher, stats.student_log_sum_exp_N, tuple(end_ids), temperature
    )
    stats = dataclasses.replace(
        stats,
        teacher_entropy_N=teacher.entropy_N,
        forward_kl_N=_kl(lt, ls),
        reverse_kl_N=_kl(ls, lt),
        **({} if mixture_weight is None else _from_mixture(ls, lt, mixture_weight)),
    )
    rows = slice(0, len(hidden_ND))
    given = terms_of_rows(terms, detached(stats), rows, mixture_weight)
    return token_loss(given, stats), detached(stats)


def _coarse_log_probs(
    hidden_ND: Tensor,
    head: Head,
    teacher: TopK,
    log_sum_exp_N: Tensor,
    end_ids: tuple[int, ...],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the student and of the teacher for the kept tokens, the end class and
    the tail."""

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
    return torch.cat(students, -1), torch.cat(teachers, -1).to(log_sum_exp_N.dtype)


def _from_mixture(ls_NK: Tensor, lt_NK: Tensor, mixture_weight: float) -> dict[str, Tensor]:
    """The statistics of divergences from the mixture of two distributions over classes."""
    lm_NK = log_mixture(ls_NK, lt_NK, mixture_weight)
    of_teacher_N, of_student_N = _kl(lt_NK, lm_NK), _kl(ls_NK, lm_NK)
    return {
        "jsd_N": mixture_weight * of_teacher_N + (1 - mixture_weight) * of_student_N,
        "skew_forward_N": of_teacher_N,
        "skew_reverse_N": of_student_N,
    }


def _kl(a_log_probs_NK: Tensor, b_log_probs_NK: Tensor) -> Tensor:
    """KL(a || b) [N] as the sum of a (log a - log b) - a + b, in which rounding of the log-sum-exps
    cancels."""
    a_NK, b_NK = a_log_probs_NK.exp(), b_log_probs_NK.exp()
    # A class that a gives nothing at all adds nothing to a KL from a; one that is NaN does.
    is_none_NK = a_log_probs_NK == -torch.inf
    terms_NK = torch.where(is_none_NK, 0.0, a_NK * (a_log_probs_NK - b_log_probs_NK))
    return (terms_NK + (b_NK - a_NK)).sum(-1)


def picked_log_probs(
    hidden_ND: Tensor, head: Head, ids_NK: Tensor, log_sum_exp_N: Tensor, temperature: float
) -> Tensor:
    """The log-probabilities [N, K] of K tokens a row, differentiable, from the log-sum-exp of the
    tempered logits."""
    logits = _Picked.apply(hidden_ND, head.weight_VD, ids_NK)
    logits = head.scale * (
        logits if head.bias_V is None else logits + head.bias_V[ids_NK].to(logits.dtype)
    )
    logits = logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap
    return logits / temperature - log_sum_exp_N[:, None]


class _Picked(torch.autograd.Function):
    """h W' at K columns of each row, [N, K]; neither way holds more than a few rows' gathered
    columns."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, ids_NK):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK)
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        out = hidden_ND.new_empty(ids_NK.shape, dtype=dtype)
        for rows in _row_slices(ids_NK, weight_VD):
            out[rows] = torch.einsum(
                "nd,nkd->nk", hidden_ND[rows].to(dtype), weight_VD[ids_NK[rows]].to(dtype)
            )
        return out

    @staticmethod
    def backward(ctx, g_NK):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_ND, weight_VD, ids_NK = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        weight_grad = (
            torch.zeros_like(weight_VD, dtype=g_NK.dtype) if ctx.needs_input_grad[1] else None
        )
        for rows in _row_slices(ids_NK, weight_VD):
            ids, g = ids_NK[rows], g_NK[rows]
            if hidden_grad is not None:
                hidden_grad[rows] = torch.einsum("nk,nkd->nd", g, weight_VD[ids].to(g.dtype)).to(
                    hidden_grad.dtype
                )
            if weight_grad is not None:
                outer = g[:, :, None] * hidden_ND[rows].to(g.dtype)[:, None]
                weight_grad.index_add_(0, ids.flatten(), outer.flatten(0, 1))
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight_VD.dtype), None


def _row_slices(ids_NK: Tensor, weight_VD: Tensor) -> list[slice]:
    step = max(GATHERED_ELEMENTS // max(ids_NK.shape[1] * weight_VD.shape[1], 1), 1)
    return [slice(start, start + step) for start in range(0, len(ids_NK), step)]
