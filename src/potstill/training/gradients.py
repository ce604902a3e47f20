"""The gradient of one step: batch by batch, with one division by a count over all ranks."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.config import Train
from potstill.engines.mismatch import gaps, told_log_probs
from potstill.kl.fused import fused_statistics, token_loss
from potstill.kl.terms import TokenStats
from potstill.models import distributed
from potstill.models.batch import Batch
from potstill.models.distributed import World
from potstill.objectives.habits import habit_sums
from potstill.objectives.lessons import (
    Lesson,
    further_losses,
    kinds_of,
    kl_to_start,
    lesson_of,
    no_sums,
    sums_of,
)
from potstill.objectives.loss import (
    Loss,
    Signal,
    batch_loss,
    known_of_teacher,
    later_costs,
    signal_of,
    student_rows,
    without_baseline,
)
from potstill.objectives.reward import num_clipped, reward_sums
from potstill.objectives.span_loss import SpanSignal, span_sums
from potstill.objectives.tokens import known_before
from potstill.rollouts.batching import batch_places, make_batch
from potstill.rollouts.text import responses
from potstill.runs.schema import Sample
from potstill.teachers.remote.reach import expect
from potstill.training.metrics import Stopwatch, before_answer, rollout_sums, token_sums
from potstill.training.rollout_log import Scored, logged_sample, of_students_tokens
from potstill.training.setup import Setup
from potstill.training.step import naming_the_step
from potstill.types import DataError, Rollout, Writer


@dataclass(frozen=True, kw_only=True)
class Accumulated:
    """Results of a step beside its gradient: summed statistics over all ranks, this rank's first
    rollouts as they are logged, and the student's log-probabilities of new rollouts that are used
    again."""

    sums: dict[str, float]
    samples: list[Sample]
    log_probs: dict[int, tuple[float, ...]]


def accumulate_gradients(
    setup: Setup,
    loss: Loss,
    rollouts: list[Rollout],
    *,
    settings: Train,
    step: int,
    world: World,
    clock: Stopwatch,
    split_by: Sequence[Writer] = (),
    num_samples: int = 0,
    reuse: int = 1,
) -> Accumulated:
    """Add this rank's part of the step's gradient, batch by batch; the only division is by one
    count over all ranks. Of rollouts that serve several steps, `reuse`, log-probabilities are
    kept."""
    student = setup.student
    kinds = kinds_of(setup.teachings, rollouts)
    groups = _even_groups(rollouts, kinds, settings, world)
    batches = [
        make_batch([rollouts[i] for i in places], world.device, is_packed=settings.packing)
        for places in groups
    ]
    divisor = _divisor(loss, rollouts, step, world)
    lessons = [lesson_of(setup.teachings, setup.teacher, batch) for batch in batches]
    _announce(setup, lessons)
    texts = responses(rollouts, student.tokenizer)
    sums: Counter[str] = Counter(rollout_sums(rollouts, texts, split_by) | reward_sums(rollouts))
    sums.update(no_sums(setup.teachings))
    returns = _returns(setup, loss, batches, world, clock)
    samples: dict[int, Sample] = {}
    log_probs: dict[int, tuple[float, ...]] = {}
    gap_values: list[float] = []
    for number, (places, batch) in enumerate(zip(groups, batches, strict=True), 1):
        return_N, of_all = returns[number - 1], f"batch {number} of {len(batches)}"
        lesson = lessons[number - 1]
        clock.doing(f"teacher, {of_all}")
        with clock("teacher_seconds"):
            known = known_of_teacher(lesson.teacher, lesson.heard, loss)
            signal = signal_of(known, lesson.teacher, lesson.heard, loss)
        clock.doing(f"student, {of_all}")
        with clock("student_seconds"):
            hidden_ND = student_rows(student, batch, loss)
            given = (signal, batch, loss, divisor, return_N, hidden_ND)
            with naming_the_step(step, [rollout.prompt for rollout in batch.rollouts]):
                loss_sum, loss_N, stats, its_sums = _loss_of_all(setup, lesson, *given)
            habits = _habits(setup, lesson, loss, stats, hidden_ND, signal)
            sums.update(its_sums | habits | _clipped(batch, stats, loss))
            gap_values += _engine_gaps(setup, loss, batch, stats, hidden_ND, step % reuse == 0)
            if reuse > 1:
                log_probs |= _log_probs(batch, stats, places)
        if min(places) < num_samples:
            # Before the backward pass, after which a sharded head is whole no longer.
            with clock("samples_seconds"):
                own_N = loss_N if return_N is None else token_loss(loss.terms(), stats)
                scored = Scored(
                    hidden_ND=hidden_ND,
                    known=of_students_tokens(known, loss),
                    loss_N=own_N,
                    stats=stats,
                )
                samples |= _samples(setup, lesson, loss, scored, places, num_samples)
        with clock("student_seconds"):
            loss_sum.backward()
        written = [texts[place] for place in places]
        before_answer_N = before_answer(batch, written, student.tokenizer, setup.answer_end)
        of_tokens = token_sums(stats, before_answer_N, batch.rollouts, split_by)
        sums.update(of_tokens | {"loss": loss_sum.item()})
    sizes = [abs(value) for value in gap_values]
    sums.update({"gap": sum(sizes), "log_ratio": sum(gap_values), "num_told": float(len(sizes))})
    return Accumulated(
        sums=_over_ranks(sums, max(sizes, default=0.0), world),
        samples=[samples[place] for place in sorted(samples)],
        log_probs=log_probs,
    )


def _divisor(loss: Loss, rollouts: list[Rollout], step: int, world: World) -> float:
    """The step's one divisor. Raises DataError where it would be 0."""
    (divisor,) = distributed.sum_over_ranks([loss.divisor(rollouts)], world)
    if not divisor:
        raise DataError(
            f"step {step + 1}: none of its completions has a token with a loss; raise window.tokens"
        )
    return divisor


def _announce(setup: Setup, lessons: Sequence[Lesson]) -> None:
    """Tell the teachers elsewhere which batches they will be asked for."""
    for each in setup.teachings:
        heard = [lesson.heard_by(each.teacher) for lesson in lessons]
        expect(each.teacher, list(itertools.chain(*heard)))


def _loss_of_all(
    setup: Setup,
    lesson: Lesson,
    signal: Signal | None,
    batch: Batch,
    loss: Loss,
    divisor: float,
    return_N: Tensor | None,
    hidden_ND: Tensor,
) -> tuple[Tensor, Tensor, TokenStats, dict[str, float]]:
    """`batch_loss` of the first teacher with the losses of those beside it and the KL to the start,
    and the sums of each that there is."""
    student = setup.student
    weighted = dataclasses.replace(loss, teacher_weight=lesson.weight)
    given = (signal, batch, weighted, divisor, return_N, hidden_ND)
    loss_sum, loss_N, stats = batch_loss(student, lesson.teacher, *given)
    beside, sums = further_losses(lesson, student, hidden_ND, loss, divisor)
    loss_sum, sums = loss_sum + beside, sums | sums_of(lesson.name, stats)
    if isinstance(signal, SpanSignal):
        sums |= span_sums(signal, stats, batch)
    if setup.start is not None:
        to_start, kl_N = kl_to_start(hidden_ND, student, setup.start, batch, loss, divisor)
        loss_sum, sums = loss_sum + to_start, sums | {"start_kl": float(kl_N.double().sum())}
    return loss_sum, loss_N, stats, sums


def _clipped(batch: Batch, stats: TokenStats, loss: Loss) -> dict[str, float]:
    """How many loss tokens of rollouts that are used again have no policy gradient, as they have
    gone far enough from the student that wrote them."""
    if not loss.reward.weight or batch.rollouts[0].log_probs is None:
        return {}
    tokens = known_before(batch, stats.student_entropy_N.dtype).tokens(loss.terms(), stats)
    return {"num_clipped": float(num_clipped(tokens, loss.reward))}


def _over_ranks(sums: Mapping[str, float], largest_gap: float, world: World) -> dict[str, float]:
    """The sums over all ranks, and the largest of the differences that `_engine_gaps` finds."""
    totals = distributed.sum_over_ranks(list(sums.values()), world)
    found = dict(zip(sums, totals, strict=True))
    if found["num_told"]:
        found["largest_gap"] = max(distributed.gather(largest_gap, world))
    return found


def _engine_gaps(
    setup: Setup,
    loss: Loss,
    batch: Batch,
    stats: TokenStats,
    hidden_ND: Tensor,
    is_new: bool,
) -> list[float]:
    """How far the log-probabilities of an engine's new rollouts, or of the cache's, are from the
    student's, of the tokens that both know; nothing where this process wrote."""
    told_N = told_log_probs(batch.rollouts, loss.end_class, stats.student_entropy_N)
    # A student that uses rollouts again has moved from where it wrote.
    if told_N is None or not (is_new or setup.cache is not None):
        return []
    ours_N = stats.student_log_prob_N
    if ours_N is None:
        # The teacher's likeliest tokens alone say nothing of the written one.
        labels_N = batch.target_ids_BT[batch.loss_mask_BT]
        with torch.no_grad():
            ours_N = fused_statistics(
                hidden_ND, setup.student.head, labels_N=labels_N, **loss.shared_options()
            ).student_log_prob_N
    assert ours_N is not None
    return gaps(told_N, ours_N).tolist()


def _log_probs(
    batch: Batch, stats: TokenStats, places: Sequence[int]
) -> dict[int, tuple[float, ...]]:
    """The student's log-probabilities of each new rollout's loss tokens, by place; nothing where
    the loss reads none."""
    if stats.student_log_prob_N is None or batch.rollouts[0].log_probs is not None:
        return {}
    lengths = [sum(rollout.trained) for rollout in batch.rollouts]
    each = [tuple(part.tolist()) for part in stats.student_log_prob_N.split(lengths)]
    return dict(zip(places, each, strict=True))


def _returns(
    setup: Setup, loss: Loss, batches: list[Batch], world: World, clock: Stopwatch
) -> Sequence[Tensor | None]:
    """Returns [N] of each batch, where later tokens count; else None."""
    if not loss.objective.gamma:
        return [None] * len(batches)
    # All batches first, because what a token answers for is measured by the whole step's rollouts.
    with clock("student_seconds"):
        costs = [later_costs(setup.student, setup.teacher, batch, loss) for batch in batches]
        return without_baseline(costs, batches, world)


def _samples(
    setup: Setup,
    lesson: Lesson,
    loss: Loss,
    scored: Scored,
    places: Sequence[int],
    num_samples: int,
) -> dict[int, Sample]:
    """A batch's rollouts among the step's first `num_samples`, as they are logged, by place."""
    found = {}
    rollouts = lesson.heard.rollouts
    for place, rollout, one in zip(places, rollouts, scored.each(rollouts), strict=True):
        if place < num_samples:
            found[place] = logged_sample(setup.student, lesson.teacher, rollout, one, loss)
    return found


def _habits(
    setup: Setup,
    lesson: Lesson,
    loss: Loss,
    stats: TokenStats,
    hidden_ND: Tensor,
    signal: Signal | None,
) -> dict[str, float]:
    """End habits of a batch: of the student, and of the teacher where its hidden states are the
    signal."""
    teacher_head = None if lesson.teacher is None else lesson.teacher.head
    theirs = None
    if isinstance(signal, Tensor) and teacher_head is not None:
        theirs = (signal, teacher_head)
    mine = (hidden_ND, setup.student.head)
    return habit_sums(lesson.heard.rollouts, loss.objective, setup.ends, stats, mine, theirs)


def _even_groups(
    rollouts: list[Rollout], kinds: Sequence[Hashable], settings: Train, world: World
) -> list[list[int]]:
    """Places of the rollouts of each batch: as many batches on every rank, since sharded ones pass
    forward together."""
    tokens = settings.tokens_per_batch
    options: Any = {"is_packed": settings.packing, "kinds": kinds}
    groups = batch_places(rollouts, tokens, **options)
    num_batches = distributed.max_over_ranks(len(groups), world)
    if len(groups) == num_batches:
        return groups
    return batch_places(rollouts, tokens, num_batches, **options)
