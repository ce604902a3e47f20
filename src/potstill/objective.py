"""Batch to loss: hidden states of both models at the loss tokens, both heads, the divergence, and its statistics.

Losses are sums. The one divisor, a count over the whole optimiser step, comes from the training loop.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.config import Objective
from potstill.fused import DEFAULT_BUDGET, fused_loss
from potstill.models import LanguageModel
from potstill.types import Batch, LossTerms, Rollout, TokenStats


@dataclass(frozen=True)
class Loss:
    """What the loss of a run is, fixed before the first step.

    `vocab_size` is the number of rows both heads share. `end_class` holds the ids that count as one class in the
    divergence; it is empty where both models end alike or the recipe keeps them apart. `budget` (bytes) and `backend`
    are those of `fused_loss` and change no result.
    """

    objective: Objective
    normalize: str
    compute_dtype: str = "float32"
    vocab_size: int | None = None
    end_class: tuple[int, ...] = ()
    budget: int = DEFAULT_BUDGET
    backend: str = "auto"

    def divisor(self, rollouts: list[Rollout]) -> int:
        """This rank's part of the step's one divisor: its loss tokens, or its sequences that have any."""
        counts = [sum(rollout.trained) for rollout in rollouts]
        return sum(counts) if self.normalize == "token" else sum(count > 0 for count in counts)

    def terms(self) -> LossTerms:
        """The weight of each term in a token's loss."""
        if self.objective.signal == "labels":
            return LossTerms(cross_entropy=1.0)
        forward_weight = {"forward": 1.0, "reverse": 0.0, "mixed": self.objective.forward_weight}[self.objective.kl]
        return LossTerms(forward=forward_weight, reverse=1 - forward_weight)


@torch.no_grad()
def teacher_rows(teacher: LanguageModel | None, batch: Batch, loss: Loss) -> Tensor | None:
    """The teacher's hidden states [N, E] at a batch's loss tokens; None where the written tokens are the signal."""
    if loss.objective.signal == "labels":
        return None
    assert teacher is not None, "prepare loads a teacher for every other signal"
    return teacher(batch.input_ids_BT)[batch.loss_mask_BT]


def batch_loss(
    student: LanguageModel,
    teacher: LanguageModel | None,
    teacher_hidden_NE: Tensor | None,
    batch: Batch,
    loss: Loss,
    divisor: float = 1.0,
) -> tuple[Tensor, Tensor, TokenStats]:
    """The weighted sum of the loss over the N loss tokens of a batch, over `divisor`; the loss of each; statistics.

    Returns `(loss_sum, loss_N, stats)`; only the first carries a gradient. `teacher_hidden_NE` is None for
    `signal = "labels"`, whose loss is the cross-entropy of the written token. Raises NonFiniteError for logits that are
    not finite.
    """
    device_type = batch.input_ids_BT.device.type
    # Only the backbone computes in the lower type: bfloat16 logits would bias the gradient and the entropy.
    with torch.autocast(device_type, torch.bfloat16, enabled=loss.compute_dtype == "bfloat16"):
        hidden_ND = student(batch.input_ids_BT)[batch.loss_mask_BT]
    weights_N = None
    if loss.normalize == "sequence":
        num_tokens_B1 = batch.loss_mask_BT.sum(1, keepdim=True).expand_as(batch.loss_mask_BT)
        weights_N = 1 / num_tokens_B1[batch.loss_mask_BT]
    return fused_loss(
        hidden_ND,
        student.head,
        teacher_hidden_NE,
        None if teacher_hidden_NE is None or teacher is None else teacher.head,
        loss.terms(),
        labels_N=batch.target_ids_BT[batch.loss_mask_BT],
        weights_N=weights_N,
        scale=1 / divisor,
        vocab_size=loss.vocab_size,
        temperature=loss.objective.temperature,
        end_ids=loss.end_class,
        budget=loss.budget,
        backend=loss.backend,
    )
