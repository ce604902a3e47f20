"""Lessons: batches with the teachers of their completions, each with the batch as it reads it.

The loss of a token is the weighted sum over the teachers of its prompt. With forward KLs its
gradient is that of the KL from their arithmetic mixture, with reverse KLs from their normalised
geometric one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.kl.fused import fused_loss
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms, TokenStats
from potstill.models.batch import Batch
from potstill.models.flops import ModelFlops, training_flops
from potstill.models.language_model import LanguageModel
from potstill.objectives.loss import Loss, known_of_teacher, student_rows, token_weights
from potstill.rollouts.batching import as_the_student_reads, without_teacher_prompt
from potstill.runs.schema import FLOPS_PARTS, Flops, TeacherMeans
from potstill.teachers.protocol import Teacher, Teaching
from potstill.types import Rollout

# Statistics that are summed for each teacher, beside the loss tokens that it taught.
SUMMED = ("forward_kl", "reverse_kl")


@dataclass(frozen=True, eq=False, kw_only=True)
class Lesson:
    """A batch and its teachers: the first of them, the batch as it reads it, the weight of its
    divergence, and those beside it. Without several teachers it has no name."""

    teacher: Teacher | None
    heard: Batch
    weight: float = 1.0
    name: str | None = None
    further: tuple[Teaching, ...] = ()

    def heard_by(self, teacher: Teacher) -> list[Batch]:
        """The batch as a teacher reads it, in a list; an empty one where it teaches another."""
        if teacher is self.teacher:
            return [self.heard]
        is_here = any(each.teacher is teacher for each in self.further)
        return [as_the_student_reads(self.heard)] if is_here else []


def kinds_of(teachings: Sequence[Teaching], rollouts: Sequence[Rollout]) -> list[tuple[str, ...]]:
    """The names of each rollout's teachers. Rollouts of one kind can be in one batch."""
    return [
        tuple(each.name for each in teachings if each.is_for(rollout.prompt))
        for rollout in rollouts
    ]


def lesson_of(teachings: Sequence[Teaching], teacher: Teacher | None, batch: Batch) -> Lesson:
    """The lesson of a batch whose rollouts are of one kind; `teacher` is the first of all."""
    if len(teachings) < 2:
        return Lesson(teacher=teacher, heard=batch)
    first, *further = [each for each in teachings if each.is_for(batch.rollouts[0].prompt)]
    return Lesson(
        teacher=first.teacher,
        heard=batch if first.teacher is teacher else as_the_student_reads(batch),
        weight=first.weight,
        name=first.name,
        further=tuple(further),
    )


def further_losses(
    lesson: Lesson,
    student: LanguageModel,
    hidden_ND: Tensor,
    loss: Loss,
    divisor: float,
) -> tuple[Tensor | float, dict[str, float]]:
    """The part of the loss that is of the teachers beside the first one, and their sums."""
    total: Tensor | float = 0.0
    sums: dict[str, float] = {}
    for each in lesson.further:
        (heard,) = lesson.heard_by(each.teacher)
        weighted = dataclasses.replace(loss, teacher_weight=each.weight)
        loss_sum, stats = _further_loss(hidden_ND, student, each.teacher, heard, weighted, divisor)
        total = total + loss_sum
        sums |= sums_of(each.name, stats)
    return total, sums


def kl_to_start(
    hidden_ND: Tensor,
    student: LanguageModel,
    start: LanguageModel,
    batch: Batch,
    loss: Loss,
    divisor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of KL(student || start) over the loss tokens of a batch, over `divisor`, and
    the KL [N] of each (nats).

    It takes a pass of its own. Only the first carries a gradient.
    """
    with torch.no_grad():
        start_ND = student_rows(start, batch, loss)
    terms = LossTerms(reverse=loss.reward.start_kl)
    mine, theirs = (hidden_ND, student.head), (start_ND, start.head)
    loss_sum, stats = _divergence(mine, theirs, terms, batch, loss, divisor)
    assert stats.reverse_kl_N is not None
    return loss_sum, stats.reverse_kl_N


def _further_loss(
    hidden_ND: Tensor,
    student: LanguageModel,
    teacher: Teacher,
    batch: Batch,
    loss: Loss,
    divisor: float = 1.0,
) -> tuple[Tensor, TokenStats]:
    """The weighted sum of the divergence from one more teacher over the loss tokens of a batch,
    over `divisor`, and its statistics.

    Only the first carries a gradient.
    """
    known = known_of_teacher(teacher, batch, loss)
    assert isinstance(known, Tensor), "the recipe asks for each teacher's whole signal"
    assert teacher.head is not None, "a teacher that is no cache has a head"
    mine, theirs = (hidden_ND, student.head), (known, teacher.head)
    return _divergence(mine, theirs, loss.terms(), batch, loss, divisor)


def _divergence(
    mine: tuple[Tensor, Head],
    theirs: tuple[Tensor, Head],
    terms: LossTerms,
    batch: Batch,
    loss: Loss,
    divisor: float,
) -> tuple[Tensor, TokenStats]:
    dtype = torch.promote_types(mine[0].dtype, torch.float32)
    loss_sum, _, stats = fused_loss(
        *mine,
        *theirs,
        terms,
        weights_N=token_weights(batch, loss, dtype),
        scale=1 / divisor,
        budget=loss.budget,
        **loss.shared_options(),
    )
    return loss_sum, stats


def sums_of(name: str | None, stats: TokenStats) -> dict[str, float]:
    """Sums over the loss tokens of one teacher's lessons; nothing without a name."""
    if name is None:
        return {}
    sums = {f"num_loss_tokens/{name}": float(len(stats.student_entropy_N))}
    for key in SUMMED:
        values_N = getattr(stats, f"{key}_N")
        sums[f"{key}/{name}"] = float(values_N.double().sum())
    return sums


def no_sums(teachings: Sequence[Teaching]) -> dict[str, float]:
    """The same sums of no lesson: ranks add up the same quantities whatever they teach."""
    names = [each.name for each in teachings] if len(teachings) > 1 else []
    return {f"{key}/{name}": 0.0 for name in names for key in ("num_loss_tokens", *SUMMED)}


def means_by_teacher(
    sums: Mapping[str, float], teachings: Sequence[Teaching]
) -> dict[str, TeacherMeans]:
    """Means over the loss tokens that each teacher taught; nothing where there is one teacher."""
    found: dict[str, TeacherMeans] = {}
    for each in teachings if len(teachings) > 1 else ():
        num = sums[f"num_loss_tokens/{each.name}"]
        forward, reverse = (sums[f"{key}/{each.name}"] / num if num else None for key in SUMMED)
        found[each.name] = {
            "num_loss_tokens": int(num),
            "forward_kl": forward,
            "reverse_kl": reverse,
        }
    return found


def lesson_flops(
    teachings: Sequence[Teaching],
    rollouts: Sequence[Rollout],
    student: ModelFlops,
    *,
    looks_ahead: bool,
    has_start: bool,
) -> Flops:
    """The operations of `training_flops`, each rollout with its own teachers."""
    parts = training_flops([], student, None)
    kinds = kinds_of(teachings, rollouts)
    for kind in dict.fromkeys(kinds):
        alike = [rollout for rollout, its in zip(rollouts, kinds, strict=True) if its == kind]
        taught = [each.flops for each in teachings if each.name in kind]
        others = [*taught[1:], *([student] if has_start else [])]
        if teachings and kind[0] != teachings[0].name:
            alike = [without_teacher_prompt(rollout) for rollout in alike]
        first = taught[0] if taught else None
        found = training_flops(alike, student, first, looks_ahead=looks_ahead, others=others)
        for part in FLOPS_PARTS:
            parts[part] += found[part]
    return parts
