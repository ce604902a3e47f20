"""Terms of a loss, statistics of both models at each token, and a shard of the vocabulary."""

from __future__ import annotations

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
    m). Where the teacher's entropy (nats) is not above `forward_above`, the weight of the forward
    KL goes to the reverse.
    """

    forward: Weight = 0.0
    reverse: Weight = 0.0
    jsd: Weight = 0.0
    entropy: Weight = 0.0
    cross_entropy: Weight = 0.0
    skew_forward: Weight = 0.0
    skew_reverse: Weight = 0.0
    mixture_weight: float = 0.5
    forward_above: float | None = None


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The rows of both heads that this rank holds: those from `start` on. Ids of labels and end
    tokens stay global."""

    start: int
    group: ProcessGroup | None = None
