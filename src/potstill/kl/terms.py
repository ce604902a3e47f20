"""Terms of a loss, statistics of both models at each token, and a shard of the vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """Statistics [N] of the loss tokens, in nats; None where there is no teacher, no label or no
    mixture asked for.

    This class is the one place that knows their order; everything else takes them by name. With m =
    b p + (1 - b) q, `skew_forward_N` is KL(p || m), `skew_reverse_N` KL(q || m) and `jsd_N` b of
    the one and 1 - b of the other.
    """

    student_entropy_N: Tensor
    student_log_sum_exp_N: Tensor
    forward_kl_N: Tensor | None = None
    reverse_kl_N: Tensor | None = None
    jsd_N: Tensor | None = None
    teacher_entropy_N: Tensor | None = None
    teacher_log_sum_exp_N: Tensor | None = None
    student_log_prob_N: Tensor | None = None
    teacher_log_prob_N: Tensor | None = None
    skew_forward_N: Tensor | None = None
    skew_reverse_N: Tensor | None = None


# The weight of a term in the loss: one number, or one a token [N].
Weight = Union[float, "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """The loss of a token as a sum of terms. Each weight is a number or a tensor [N], so that it
    can differ by token.

    `forward` weighs KL(p || q), `reverse` KL(q || p), `entropy` the student's entropy (negative: a
    bonus) and `cross_entropy` minus the log-probability of the label. With m = b p + (1 - b) q and
    b = `mixture_weight` strictly between 0 and 1, `skew_forward` weighs KL(p || m), `skew_reverse`
    KL(q || m), and `jsd` the generalised Jensen-Shannon divergence b KL(p || m) + (1 - b) KL(q ||
    m).
    """

    forward: Weight = 0.0
    reverse: Weight = 0.0
    jsd: Weight = 0.0
    entropy: Weight = 0.0
    cross_entropy: Weight = 0.0
    skew_forward: Weight = 0.0
    skew_reverse: Weight = 0.0
    mixture_weight: float = 0.5

    @property
    def weights(self) -> dict[str, Weight]:
        """The weight of each term by its name, absent ones included."""
        return {name: getattr(self, name) for name in TERM_NAMES}

    @property
    def has_mixture(self) -> bool:
        """Whether a term is a divergence from the mixture m."""
        return any(is_there(self.weights[name]) for name in MIXTURE_TERMS)

    def scaled(self, weight: Weight) -> LossTerms:
        """These terms with each weight times another, a number or a tensor [N]; absent ones stay
        absent."""
        changed = {name: each * weight for name, each in self.weights.items() if is_there(each)}
        return dataclasses.replace(self, **changed)

    def of_rows(self, rows: slice) -> LossTerms:
        """The terms of some rows: weights by token are cut to theirs."""
        cut = {name: each[rows] for name, each in self.weights.items() if isinstance(each, Tensor)}
        return dataclasses.replace(self, **cut)


MIXTURE_TERMS = ("jsd", "skew_forward", "skew_reverse")
TEACHER_TERMS = ("forward", "reverse", *MIXTURE_TERMS)
TERM_NAMES = (*TEACHER_TERMS, "entropy", "cross_entropy")


def is_there(weight: Weight) -> bool:
    """Whether a term takes part: a tensor does whatever it holds, a number where it is not 0."""
    return isinstance(weight, Tensor) or weight != 0


TermsFunction = Callable[[TokenStats, slice], LossTerms]
"""The terms of some rows by what the first pass found there.

It is given the statistics [n] of n rows, as constants, and the slice of the N rows that these are;
the memory budget decides how many come together. It gives terms whose weights are numbers or
tensors [n]: constants of the gradient, without one of their own. They may all be 0. It must treat
each row by itself, leave the statistics as they are, and give the same on every rank of a sharded
vocabulary. Terms that need a teacher, `labels_N` or a `mixture_weight` are refused without it.
"""


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The rows of both heads that this rank holds: those from `start` on. Ids of labels and end
    tokens stay global."""

    start: int
    group: ProcessGroup | None = None
