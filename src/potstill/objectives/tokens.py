"""Everything that is known of loss tokens between the two passes of the loss, for whoever says what
each counts for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.engines.mismatch import told_log_probs
from potstill.kl.terms import LossTerms, TokenStats
from potstill.models.batch import Batch


@dataclass(frozen=True, kw_only=True)
class KnownBefore:
    """Everything that is known of N loss tokens before the loss has seen a logit; fields are those
    of `Tokens`, but that `sampling_log_prob_N` is None while a rollout is new."""

    position_N: Tensor
    rollout_N: Tensor
    is_student_N: Tensor
    is_last_N: Tensor
    sampling_log_prob_N: Tensor | None
    score_N: Tensor | None
    group_score_N: Tensor | None
    advantage_N: Tensor | None
    return_N: Tensor | None = None
    head_share_N: Tensor | None = None
    engine_log_prob_N: Tensor | None = None

    def at(self, rows: slice) -> KnownBefore:
        """The same of some of the tokens."""
        there = {name: each for name, each in vars(self).items() if each is not None}
        return replace(self, **{name: each[rows] for name, each in there.items()})

    def tokens(self, terms: LossTerms, stats: TokenStats) -> Tokens:
        """These tokens with their terms and statistics. A rollout that is new was written by the
        student as it is."""
        known = dict(vars(self))
        if self.sampling_log_prob_N is None:
            known["sampling_log_prob_N"] = stats.student_log_prob_N
        return Tokens(terms=terms, stats=stats, **known)


@dataclass(frozen=True, kw_only=True)
class Tokens(KnownBefore):
    """Everything that is known of N loss tokens between the two passes of the loss, all constants
    of the gradient. Tensors are [N], in the order of the rollouts.

    `terms` are those of the recipe. `stats` are the statistics of both models (nats), in which
    log-probabilities are those of the written token. `position_N` is the place in the completion,
    from 0, `rollout_N` the number of the rollout in the batch. `is_student_N` says whether the
    student wrote the token, `is_last_N` is true for the last loss token of a rollout.
    `sampling_log_prob_N` is the student's log-probability of the token when the rollout was new.
    `score_N` and `advantage_N` are those of the rollout and `group_score_N` the mean of its group;
    None where nothing scores. `return_N` is what later tokens cost (nats), None where that does not
    count. `head_share_N` is `kl.head_share`, None for all weightings but "akl".
    `engine_log_prob_N` is the log-probability that an engine in another process told of the token,
    NaN where it told none; None where this process wrote.
    """

    terms: LossTerms
    stats: TokenStats


def known_before(
    batch: Batch,
    dtype: torch.dtype,
    return_N: Tensor | None = None,
    merged_ids: Sequence[int] = (),
) -> KnownBefore:
    """All that a batch says of its loss tokens. Numbers are of `dtype`, that of the statistics;
    `merged_ids` are one class in them."""
    device, rollouts = batch.loss_mask_BT.device, batch.rollouts
    counts = torch.tensor([sum(rollout.trained) for rollout in rollouts], device=device)
    rollout_N = torch.arange(len(rollouts), device=device).repeat_interleave(counts)
    is_last_N = torch.zeros(len(rollout_N), dtype=torch.bool, device=device)
    is_last_N[(counts.cumsum(0) - 1)[counts > 0]] = True
    writers = [
        who
        for rollout in rollouts
        for who, is_trained in zip(rollout.writers, rollout.trained, strict=True)
        if is_trained
    ]

    def of_rollouts(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[rollout_N]

    credits = [rollout.credit for rollout in rollouts if rollout.credit is not None]
    is_scored = len(credits) == len(rollouts)
    return KnownBefore(
        position_N=positions(batch),
        rollout_N=rollout_N,
        is_student_N=torch.tensor([who == "student" for who in writers], device=device),
        is_last_N=is_last_N,
        sampling_log_prob_N=_sampling_log_probs(batch, dtype),
        score_N=of_rollouts([each.score for each in credits]) if is_scored else None,
        group_score_N=of_rollouts([each.group_score for each in credits]) if is_scored else None,
        advantage_N=of_rollouts([each.advantage for each in credits]) if is_scored else None,
        return_N=return_N,
        engine_log_prob_N=told_log_probs(
            rollouts, merged_ids, torch.empty(0, dtype=dtype, device=device)
        ),
    )


def positions(batch: Batch) -> Tensor:
    """The place [N] of each loss token in its completion, from 0."""
    places = [
        i
        for rollout in batch.rollouts
        for i, is_trained in enumerate(rollout.trained)
        if is_trained
    ]
    return torch.tensor(places, device=batch.loss_mask_BT.device)


def _sampling_log_probs(batch: Batch, dtype: torch.dtype) -> Tensor | None:
    """Log-probabilities [N] of rollouts that are used again, None for new ones."""
    if any(rollout.log_probs is None for rollout in batch.rollouts):
        return None
    values = [value for rollout in batch.rollouts for value in rollout.log_probs or ()]
    return torch.tensor(values, dtype=dtype, device=batch.loss_mask_BT.device)
