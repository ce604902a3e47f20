"""A trial of a weighting of the user's own on made-up tokens, before any work is done."""

import torch
from torch import Tensor

from potstill.kl.fused import fused_loss
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms, TokenStats
from potstill.objectives.loss import Loss
from potstill.objectives.tokens import KnownBefore
from potstill.tasks.own import own_task


def try_weighting(loss: Loss) -> None:
    """Ask a weighting of the user's own for the terms of five tokens of two rollouts, as training
    does.

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
        score_N=torch.tensor([1.0, 1, 1, 0, 0]),
        group_score_N=torch.full((5,), 0.5),
        advantage_N=torch.tensor([0.5, 0.5, 0.5, -0.5, -0.5]),
    )

    def terms(stats: TokenStats, rows: slice) -> LossTerms:
        return loss.terms_at(known.at(rows), stats)

    student, teacher = Head(made_up(7, 3)), Head(made_up(7, 3))
    fused_loss(
        made_up(5, 3),
        student,
        made_up(5, 3),
        teacher,
        terms,
        labels_N=torch.arange(5),
        mixture_weight=loss.mixture_weight,
    )
