"""Batch to loss: hidden states of both models at the loss tokens, both heads, the divergence, and its statistics.

Losses are sums. The one division, by a count over the whole optimiser step, is in the training loop.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from potstill.config import Objective
from potstill.divergence import entropy, token_divergence
from potstill.models import LanguageModel
from potstill.types import Batch, Rollout, TokenStats


@dataclass(frozen=True)
class Loss:
    """What the loss of a run is, fixed before the first step.

    `vocab_size` is the number of rows both heads share. `end_class` holds the ids that count as one class in the
    divergence; it is empty where both models end alike or the recipe keeps them apart.
    """

    objective: Objective
    normalize: str
    compute_dtype: str = "float32"
    vocab_size: int | None = None
    end_class: tuple[int, ...] = ()

    def divisor(self, rollouts: list[Rollout]) -> int:
        """This rank's part of the step's one divisor: its loss tokens, or its sequences that have any."""
        counts = [sum(rollout.trained) for rollout in rollouts]
        return sum(counts) if self.normalize == "token" else sum(count > 0 for count in counts)


@torch.no_grad()
def teacher_logits(teacher: LanguageModel | None, batch: Batch, loss: Loss) -> Tensor | None:
    """The teacher's logits [N, V] at the loss tokens of a batch; None where the written tokens are the signal."""
    if loss.objective.signal == "labels":
        return None
    assert teacher is not None, "prepare loads a teacher for every other signal"
    return teacher.head(teacher(batch.input_ids_BT)[batch.loss_mask_BT], loss.vocab_size)


def batch_loss(student: LanguageModel, teacher_logits_NV: Tensor | None, batch: Batch, loss: Loss):
    """The weighted sum of the loss over the N loss tokens of a batch, the loss of each token, and statistics.

    Returns `(loss_sum, loss_N, stats)`; only the first carries a gradient. `teacher_logits_NV` is None for
    `signal = "labels"`, whose loss is the cross-entropy of the written token.
    """
    objective = loss.objective
    device_type = batch.input_ids_BT.device.type
    # Only the backbone computes in the lower type: bfloat16 logits would bias the gradient and the entropy.
    with torch.autocast(device_type, torch.bfloat16, enabled=loss.compute_dtype == "bfloat16"):
        hidden_ND = student(batch.input_ids_BT)[batch.loss_mask_BT]
    student_logits_NV = student.head(hidden_ND, loss.vocab_size)
    if teacher_logits_NV is None:
        labels_N = batch.target_ids_BT[batch.loss_mask_BT]
        loss_N = nn.functional.cross_entropy(student_logits_NV, labels_N, reduction="none")
        stats = TokenStats(student_entropy_N=entropy(student_logits_NV.detach().log_softmax(-1)))
    else:
        loss_N, stats = token_divergence(
            student_logits_NV,
            teacher_logits_NV,
            objective.kl,
            forward_weight=objective.forward_weight,
            temperature=objective.temperature,
            end_ids=loss.end_class,
        )
    if loss.normalize == "token":
        return loss_N.sum(), loss_N.detach(), stats
    num_tokens_B1 = batch.loss_mask_BT.sum(1, keepdim=True).expand_as(batch.loss_mask_BT)
    return (loss_N / num_tokens_B1[batch.loss_mask_BT]).sum(), loss_N.detach(), stats
