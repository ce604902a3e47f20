"""A trial of a weighting of the user's own on made-up tokens, before any work is done."""

from typing import Any

import torch
from torch import Tensor

from potstill.kl.fused import fused_loss
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms, TokenStats
from potstill.kl.topk import top_k_loss, top_k_of
from potstill.objectives.loss import Loss
from potstill.objectives.tokens import KnownBefore
from potstill.tasks.own import own_task


def try_weighting(loss: Loss, is_scored: bool) -> None:
    """Ask a weighting of the user's own for the terms of five tokens of two rollouts, as training
    does; `is_scored` says whether it scores responses.

    Raises DataError for whatever the loss would refuse.
    """
    if own_task(loss.objective.weights) is None:
        return
    generator = torch.Generator().manual_seed(0)

    def made_up(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    known = KnownBefore(
        position_N=torch.tensor([0, 1, 2, 0, 1]),
        rollout_N=torch.tensor([0, 0, 0, 1, 1]),
        is_student_N=torch.tensor([True] * 5),
        is_last_N=torch.tensor([False, False, True, False, True]),
        sampling_log_prob_N=None,
        score_N=torch.tensor([1.0, 1, 1, 0, 0]) if is_scored else None,
        group_score_N=torch.full((5,), 0.5) if is_scored else None,
        advantage_N=torch.tensor([0.5, 0.5, 0.5, -0.5, -0.5]) if is_scored else None,
    )

    def terms(stats: TokenStats, rows: slice) -> LossTerms:
        return loss.terms_at(known.at(rows), stats)

    rows, (student, teacher) = made_up(5, 3), (Head(made_up(7, 3)), Head(made_up(7, 3)))
    options: dict[str, Any] = {"mixture_weight": loss.mixture_weight}
    if loss.objective.signal == "topk":
        top_k_loss(rows, student, top_k_of(rows, teacher, k=4), terms, **options)
        return
    labels_N = torch.arange(5)
    fused_loss(rows, student, rows, teacher, terms, labels_N=labels_N, **options)
