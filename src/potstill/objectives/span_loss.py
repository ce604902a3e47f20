"""The loss of spans: both models' probabilities of what stands between two places where both
tokenizers cut a text.

k = log q(span) - log p(span), each the sum of a model's log-probabilities of its own tokens. The
estimators are those of single tokens (docs/theory.md, section 11).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.kl.fused import fused_loss, fused_statistics
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms, TokenStats
from potstill.models.batch import Batch
from potstill.objectives.estimators import Estimator, estimate, slope
from potstill.rollouts.spans import Spelling
from potstill.types import Rollout


@dataclass(frozen=True, kw_only=True)
class SpanSignal:
    """The teacher's log-probability [S] of each span of a batch, and the span that each of the
    student's N loss tokens is in."""

    teacher_log_prob_S: Tensor
    span_N: Tensor

    def sums(self, values_N: Tensor) -> Tensor:
        """The sum [S] over the student's tokens of each span."""
        zeros_S = values_N.new_zeros(len(self.teacher_log_prob_S))
        return zeros_S.index_add(0, self.span_N, values_N)

    def log_ratio(self, stats: TokenStats) -> Tensor:
        """k [S] = log q - log p of each span."""
        assert stats.student_log_prob_N is not None, "labels are given"
        return self.sums(stats.student_log_prob_N) - self.teacher_log_prob_S


def own_log_probs(
    hidden_ME: Tensor, head: Head, batch: Batch, spelling: Spelling, *, options: dict[str, Any]
) -> Tensor:
    """A teacher's log-probabilities [M] of its own M loss tokens from its hidden states there.
    `options` are those of the divergence, of which the vocabulary and the end tokens are its
    own."""
    read = [rollout.read_by("teacher") for rollout in batch.rollouts]
    labels = [i for ids, trained in read for i, is_in in zip(ids, trained, strict=True) if is_in]
    own = {"vocab_size": spelling.vocab_size, "end_ids": spelling.class_ids}
    labels_M = torch.tensor(labels, dtype=torch.long, device=hidden_ME.device)
    stats = fused_statistics(hidden_ME, head, labels_N=labels_M, **options | own)
    assert stats.student_log_prob_N is not None, "labels are given"
    return stats.student_log_prob_N


def span_signal(log_prob_M: Tensor, batch: Batch) -> SpanSignal:
    """The signal of a teacher from its log-probabilities of its own M loss tokens."""
    given: dict[str, Any] = {"dtype": torch.long, "device": log_prob_M.device}
    student_spans, teacher_spans, num = _numbered(batch.rollouts)
    span_M = torch.tensor(teacher_spans, **given)
    return SpanSignal(
        teacher_log_prob_S=log_prob_M.new_zeros(num).index_add(0, span_M, log_prob_M),
        span_N=torch.tensor(student_spans, **given),
    )


def _numbered(rollouts: Sequence[Rollout]) -> tuple[list[int], list[int], int]:
    """The spans of the student's loss tokens and of the teacher's, numbered over all rollouts, and
    how many there are."""
    mine: list[int] = []
    theirs: list[int] = []
    num = 0
    for rollout in rollouts:
        assert rollout.reading is not None, "rollouts are read when they are written"
        mine += [num + span for span in rollout.reading.student_spans]
        theirs += [num + span for span in rollout.reading.teacher_spans]
        num += rollout.reading.num_spans
    return mine, theirs, num


def span_loss(
    hidden_ND: Tensor,
    head: Head,
    signal: SpanSignal,
    labels_N: Tensor,
    estimator: Estimator,
    *,
    weights_N: Tensor | None,
    scale: float,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, TokenStats]:
    """The weighted sum of the estimates over spans, times `scale`; of each token its share of its
    span's; and the student's statistics.

    Only the first carries a gradient: that of the log-probability of each token, times the constant
    slope of its span. Arguments are those of `fused_loss`.
    """

    def terms(stats: TokenStats, rows: slice) -> LossTerms:
        # All rows come together, as a span may be in any of them.
        slope_S = slope(signal.log_ratio(stats), estimator)
        return LossTerms(cross_entropy=-slope_S[signal.span_N])

    loss_sum, _, stats = fused_loss(
        hidden_ND,
        head,
        None,
        None,
        terms,
        labels_N=labels_N,
        weights_N=weights_N,
        scale=scale,
        together=True,
        **options,
    )
    num_S = signal.sums(torch.ones_like(stats.student_entropy_N))
    loss_N = (estimate(signal.log_ratio(stats), estimator) / num_S)[signal.span_N]
    value = scale * (loss_N if weights_N is None else loss_N * weights_N).sum()
    return loss_sum + (value - loss_sum.detach()), loss_N, stats


def span_sums(signal: SpanSignal, stats: TokenStats, batch: Batch) -> dict[str, float]:
    """Sums of a batch: how many spans, their k, and how many completion tokens are in none."""
    flags = [is_in for rollout in batch.rollouts for is_in in rollout.trained]
    return {
        "num_spans": float(len(signal.teacher_log_prob_S)),
        "span_log_ratio": float(signal.log_ratio(stats).double().sum()),
        "num_left_out": float(len(flags) - sum(flags)),
    }
