"""Coefficients of the gradient pass: a loss's terms for each row of a group, by what the first pass
found there."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from potstill.kl import tiles
from potstill.kl.inputs import Problem
from potstill.kl.terms import LossTerms, TokenStats, Weight, is_there
from potstill.kl.tiles import Terms


class AskedGradient(NamedTuple):
    """The gradient that is asked for in each row of a group: `factor`, a number or one a row [n],
    times what the coefficients [6, n] say.

    Without coefficients that is the forward KL. `label_weight` [n] is that of the cross-entropy,
    None where it is 0.
    """

    has: Terms
    coefficients: Tensor | None
    factor: Weight
    mixture_weight: float
    label_weight: Tensor | None

    @property
    def shared_factor(self) -> float:
        """The factor as far as all rows have the same."""
        return 1.0 if isinstance(self.factor, Tensor) else self.factor

    def row_weights(self, weights_N: Tensor | None, group: range) -> Tensor | None:
        """The weights [n] of a group's rows in the gradient, with the factor where each row has its
        own."""
        weights_n = None if weights_N is None else weights_N[group.start : group.stop]
        if not isinstance(self.factor, Tensor):
            return weights_n
        return self.factor if weights_n is None else weights_n * self.factor

    def rows(self, here: slice) -> Tensor | None:
        return None if self.coefficients is None else self.coefficients[:, here]


def ask(terms: LossTerms, lse: Weight, found: "RowGroup") -> AskedGradient:
    """The terms of a group's rows, and `lse` times the student's log-sum-exp, as coefficients of
    the gradient."""
    skews, b = (terms.skew_forward, terms.skew_reverse), terms.mixture_weight
    is_skew = any(map(is_there, skews))
    has = Terms(
        forward=is_there(terms.forward),
        reverse=is_there(terms.reverse),
        entropy=is_there(terms.entropy),
        mixture=is_there(terms.jsd) or is_skew,
        skew=is_skew,
    )
    others = (terms.reverse, terms.jsd, *skews, terms.entropy, terms.cross_entropy, lse)
    if has.forward and not any(map(is_there, others)):
        is_by_row = isinstance(terms.forward, Tensor)
        factor = _row(terms.forward, found) if is_by_row else float(terms.forward)
        return AskedGradient(has, None, factor, b, None)
    label_weight = _row(terms.cross_entropy, found)
    f, r, h, e = (_row(w, found) for w in (terms.forward, terms.reverse, terms.entropy, lse))
    moments = found.moments
    # A KL(p || m) + B KL(q || m); of the JSD's own parts nothing is left in d.
    a, s, jsd = (_row(w, found) for w in (*skews, terms.jsd))
    j, d = s + (1 - b) * jsd, (1 - b) * a - b * s
    c = (
        f
        + label_weight
        + e
        - h * moments.student_entropy
        - j * found.mixture[1]
        + d * found.mixture[2]
    )
    # Without a teacher the reverse KL is not a number.
    c = c - r * moments.reverse_kl if has.reverse else c
    coefficients = torch.stack([f, r, h, j, d, c])
    return AskedGradient(
        has, coefficients, 1.0, b, label_weight if is_there(terms.cross_entropy) else None
    )


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """Results of the first pass for a group of rows. Second index of labels and classes: student,
    teacher."""

    rows: range
    moments: tiles.Moments
    log_sums: Tensor
    labels: Tensor
    classes: Tensor
    mixture: Tensor

    def stats(self, problem: Problem) -> TokenStats:
        """The statistics of the group's rows."""
        moments = self.moments
        stats = TokenStats(
            student_entropy_N=moments.student_entropy,
            student_log_sum_exp_N=moments.student_log_sum_exp,
        )
        if problem.teacher is not None:
            stats = dataclasses.replace(
                stats,
                forward_kl_N=moments.forward_kl,
                reverse_kl_N=moments.reverse_kl,
                teacher_entropy_N=moments.teacher_entropy,
                teacher_log_sum_exp_N=moments.teacher_log_sum_exp,
            )
        if problem.labels is not None:
            student_N, teacher_N = self.labels - self.log_sums
            teacher_N = None if problem.teacher is None else teacher_N
            stats = dataclasses.replace(
                stats, student_log_prob_N=student_N, teacher_log_prob_N=teacher_N
            )
        if (b := problem.mixture_weight) is not None:
            skew_forward_N, skew_reverse_N = self.mixture[:2]
            jsd_N = b * skew_forward_N + (1 - b) * skew_reverse_N
            stats = dataclasses.replace(
                stats, jsd_N=jsd_N, skew_forward_N=skew_forward_N, skew_reverse_N=skew_reverse_N
            )
        return stats


def _row(weight: Weight, found: RowGroup) -> Tensor:
    """A term's weight for each row of a group."""
    like = found.log_sums[0]
    if isinstance(weight, Tensor):
        return weight.detach().to(like.dtype)
    return torch.full_like(like, weight)
