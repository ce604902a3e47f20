"""The parts of one step, in the order in which the loop takes them."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from potstill import files
from potstill.config import Train
from potstill.engines.mismatch import refuse_mismatch
from potstill.models import distributed
from potstill.models.flops import ModelFlops, rollout_flops
from potstill.models.lean.activations import layers_run_again
from potstill.models.lean.compiling import layers_compiled
from potstill.models.lean.embedding import embedding_added_late
from potstill.models.lean.packing import rows_apart
from potstill.objectives.habits import step_habits
from potstill.objectives.lessons import lesson_flops, lesson_of, means_by_teacher
from potstill.objectives.loss import Loss
from potstill.objectives.reward import with_credit
from potstill.rollouts.batching import make_batch
from potstill.rollouts.prefixes import Writing, write_rollouts
from potstill.rollouts.spans import with_readings
from potstill.rollouts.text import responses
from potstill.runs.schema import (
    FLOPS_PARTS,
    Flops,
    OfWriter,
    Sample,
    StepExtras,
    StepMetrics,
    Update,
    WindowRow,
)
from potstill.seeds import step_seed
from potstill.training.controllers import decide, is_probe_due, scheduled_weight, scheduled_window
from potstill.training.metrics import Stopwatch, reward_means, span_means, step_means
from potstill.training.probing import probe_window
from potstill.training.rates import is_extended_at, is_spent, learning_rate, planned_steps
from potstill.training.rollout_log import scored_samples
from potstill.training.setup import Setup, writing_of
from potstill.training.state import Run, Trainer, prompts_and_seeds
from potstill.types import NonFiniteError, Prompt, Rollout, Writer

# Decoded rollouts with per-token numbers are logged this many at a time, at step 1 and with every
# checkpoint.
NUM_LOGGED_SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step, decided on: its prompts, how they are answered, and the loss with its forward
    weight.

    `age` is the number of steps that the round's rollouts have served already; at 0 they are
    written.
    """

    step: int
    age: int
    prompts: list[Prompt]
    seeds: list[tuple[int, ...]]
    writing: Writing
    loss: Loss


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of a step over all ranks, by part, and of the whole run with it."""

    parts: Flops
    total: float


def begin_step(trainer: Trainer, run: Run) -> None:
    """Seed the step, and bring every copy of the student that is due up to its present weights."""
    recipe, student = trainer.recipe, trainer.setup.student
    follower, every = trainer.follower, recipe.teacher.follows_every
    torch.manual_seed(step_seed("step", trainer.settings.seed, run.step, trainer.world.rank))
    if follower is not None and every is not None and run.step > 0 and run.step % every == 0:
        distributed.refresh(follower.model, student, kept=recipe.teacher.ema or 0.0)
    student.eval()
    probes = is_probe_due(recipe.window, run.window, run.step, recipe.rollouts.reuse)
    if run.step % recipe.rollouts.reuse == 0 and (recipe.student_writes or probes):
        trainer.bring_up(run.step)


def probe_if_due(
    trainer: Trainer, run: Run, clock: Stopwatch, tell: Callable[[str], None]
) -> tuple[Run, float]:
    """The run with the window that the length gate decides on, and this rank's operations for
    it."""
    recipe, reuse = trainer.recipe, trainer.recipe.rollouts.reuse
    if run.step % reuse or not is_probe_due(recipe.window, run.window, run.step, reuse):
        return run, 0
    with clock("probe_seconds"):
        probe, flops = probe_window(
            recipe,
            trainer.setup,
            trainer.engines,
            student=trainer.measured,
            state=run.window,
            step=run.step,
            world=trainer.world,
        )
    window, decision = decide(recipe.window, run.window, probe)
    tell(f"before step {run.step + 1}: {decision}")
    if trainer.world.is_main:
        row: WindowRow = {"step": run.step + 1, **decision.as_row()}
        files.append(trainer.folder / "window.jsonl", row)
    return dataclasses.replace(run, window=window), flops


def plan_step(trainer: Trainer, run: Run) -> StepPlan:
    """Decide on the prompts, the window and the forward weight of the next step."""
    recipe, setup, step = trainer.recipe, trainer.setup, run.step
    age = step % recipe.rollouts.reuse
    window = run.window.tokens
    if recipe.window.schedule == "linear":
        first = step - age
        window = scheduled_window(recipe.window, first, planned_steps(trainer.settings, first))
    weight = run.weight.weight
    if recipe.weight_schedule.schedule != "entropy":
        num_steps = planned_steps(trainer.settings, step)
        weight = scheduled_weight(
            recipe.weight_schedule, recipe.objective.forward_weight, step, num_steps
        )
    prompts, seeds = prompts_and_seeds(trainer, step)
    writing = writing_of(recipe, setup, trainer.engines, window)
    loss = dataclasses.replace(setup.loss, forward_weight=weight)
    return StepPlan(step=step, age=age, prompts=prompts, seeds=seeds, writing=writing, loss=loss)


def write_round(
    trainer: Trainer, run: Run, plan: StepPlan, clock: Stopwatch
) -> tuple[list[Rollout], float]:
    """This rank's rollouts of the step, and the operations that writing them took: none while they
    are used again."""
    setup, objective = trainer.setup, trainer.recipe.objective
    flops: dict[Writer, ModelFlops] = {}
    if setup.cache is None:
        flops["student"] = setup.student_flops
        if setup.teacher_flops is not None:
            flops["teacher"] = setup.teacher_flops
    if plan.age > 0:
        return run.rollouts, 0
    with clock("rollout_seconds"), naming_the_step(plan.step, plan.prompts):
        counter = clock.token_counter(len(plan.prompts) * plan.writing.window)
        writing = dataclasses.replace(plan.writing, on_token=counter)
        written = write_rollouts(writing, plan.prompts, plan.seeds)
        rollouts = with_readings(written, setup.loss.translation)
    if setup.grader is not None:
        with clock("grading_seconds"):
            texts = responses(rollouts, setup.student.tokenizer)
            rollouts = with_credit(rollouts, texts, setup.grader, setup.loss.reward)
    by_token = objective.prefix == "mixed" and objective.prefix_mix == "token"
    return rollouts, rollout_flops(rollouts, flops, by_token)


def count_flops(
    trainer: Trainer, run: Run, rollouts: list[Rollout], *, written: float, probed: float
) -> StepFlops:
    """The operations of the step over all ranks; this one spent `written` on rollouts and `probed`
    on the probe."""
    setup, looks_ahead = trainer.setup, trainer.recipe.objective.gamma > 0
    parts = lesson_flops(
        setup.teachings,
        rollouts,
        setup.student_flops,
        looks_ahead=looks_ahead,
        has_start=setup.start is not None,
    )
    parts["rollout"], parts["probe"] = written, probed
    totals = distributed.sum_over_ranks([parts[part] for part in FLOPS_PARTS], trainer.world)
    for part, total in zip(FLOPS_PARTS, totals, strict=True):
        parts[part] = total
    return StepFlops(parts=parts, total=run.flops + sum(totals))


def is_saved(trainer: Trainer, run: Run, cost: StepFlops) -> bool:
    """Whether a checkpoint follows the step: every so many, at the end, and where an extended run
    once ended."""
    settings, after = trainer.settings, run.step + 1
    ends = is_spent(settings, after, cost.total) or is_extended_at(settings, after)
    return after % settings.checkpoint_every == 0 or ends


def samples_without_dropout(
    trainer: Trainer, plan: StepPlan, rollouts: list[Rollout], clock: Stopwatch
) -> list[Sample]:
    """Rollouts for the log where the student learns with dropout: the log is of the student that
    wrote."""
    setup, device = trainer.setup, trainer.world.device
    # Ranks, whose rollouts may have other teachers, take as many passes.
    parts = [rollouts] if len(setup.teachings) < 2 else [[rollout] for rollout in rollouts]
    samples = []
    with clock("samples_seconds"), naming_the_step(plan.step, plan.prompts):
        for part in parts:
            lesson = lesson_of(setup.teachings, setup.teacher, make_batch(part, device))
            loss = dataclasses.replace(plan.loss, teacher_weight=lesson.weight)
            heard = lesson.heard.rollouts
            samples += scored_samples(setup.student, lesson.teacher, heard, loss, device)
    distributed.reshard(setup.student)
    return samples


@contextmanager
def lean_passes(setup: Setup, settings: Train) -> Iterator[None]:
    """Within, the student's passes with gradients take as little memory as the recipe asks for, and
    all models take packed batches if it asks for them."""
    model = setup.student.model
    with contextlib.ExitStack() as stack:
        stack.enter_context(embedding_added_late(model))
        if settings.compile:
            stack.enter_context(layers_compiled(model))
        if settings.activation_checkpointing:
            stack.enter_context(layers_run_again(model))
        if settings.packing:
            teachers = [each.teacher for each in setup.teachings]
            stack.enter_context(rows_apart(setup.student, setup.start, *teachers))
        yield


def update(
    trainer: Trainer, run: Run, plan: StepPlan, sums: dict[str, float], clock: Stopwatch
) -> Update:
    """Clip the gradient and take the optimiser's step; its norm before, and the rate. Refuses what
    is not finite, and rollouts of other weights than the student's."""
    if sums["num_told"] and not trainer.recipe.has_older_prefixes:
        refuse_mismatch(trainer.recipe, sums["gap"] / sums["num_told"], plan.step)
    student, optimizer, settings = trainer.setup.student, trainer.optimizer, trainer.settings
    with clock("student_seconds"):
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
        grad_norm = distributed.whole(norm).item()
        if not math.isfinite(grad_norm):
            raise not_finite("the gradient is not finite", plan.step, plan.prompts)
        lr = learning_rate(settings, run.step, run.flops)
        for group in optimizer.param_groups:
            # torchao reads it from a tensor, which its compiled step has at hand.
            is_tensor = isinstance(group["lr"], torch.Tensor)
            group["lr"] = group["lr"].fill_(lr) if is_tensor else lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": grad_norm, "lr": lr}


def step_metrics(
    trainer: Trainer, plan: StepPlan, sums: dict[str, float], updated: Update, cost: StepFlops
) -> StepMetrics:
    """A row of `metrics.jsonl` but its timings."""
    recipe, setup = trainer.recipe, trainer.setup
    extras: StepExtras = {**reward_means(sums)}
    if recipe.has_older_prefixes:
        extras = {**extras, **_of_writer(trainer, plan.step, sums)}
    elif sums["num_told"]:
        extras["engine_mismatch_mean_abs"] = sums["gap"] / sums["num_told"]
        extras["engine_mismatch_max"] = sums["largest_gap"]
    if recipe.objective.kl == "mixed":
        assert plan.loss.forward_weight is not None
        extras["forward_weight"] = plan.loss.forward_weight
    extras = {**extras, **span_means(sums)}
    if by_teacher := means_by_teacher(sums, setup.teachings):
        extras["by_teacher"] = by_teacher
    if setup.ends.compared_ids:
        extras["end_habits"] = step_habits(
            sums, recipe.objective, setup.ends, setup.student.tokenizer
        )
    return {
        "step": plan.step + 1,
        "prefix": recipe.objective.prefix,
        **step_means(sums, trainer.split_by),
        **updated,
        "window": plan.writing.window,
        "rollout_age": plan.age,
        **extras,
        "flops": cost.parts,
        "total_flops": cost.total,
    }


def _of_writer(trainer: Trainer, step: int, sums: dict[str, float]) -> OfWriter:
    """How old the cached prefixes are, and how far their writer is from the student by now."""
    cache, is_alike = trainer.setup.cache, trainer.recipe.draws_exactly
    assert cache is not None, "the prefixes are its"
    row: OfWriter = {"writer_age": step + (cache.steps_before or 0)}
    # Where tokens are drawn from a colder or cut distribution, the difference says nothing.
    if sums["num_told"] and is_alike:
        row["writer_log_ratio_mean"] = sums["log_ratio"] / sums["num_told"]
        row["writer_log_ratio_max"] = sums["largest_gap"]
    return row


@contextmanager
def naming_the_step(step: int, prompts: Sequence[Prompt]) -> Iterator[None]:
    """Say of a NonFiniteError in which step it came up, and for which prompts."""
    try:
        yield
    except NonFiniteError as error:
        raise not_finite(str(error), step, prompts) from None


def not_finite(what: str, step: int, prompts: Sequence[Prompt]) -> NonFiniteError:
    """The error that ends a run before a bad update."""
    ids = ", ".join(prompt.example.id for prompt in prompts[:8])
    return NonFiniteError(
        f"step {step + 1}: {what}; nothing was updated. The first prompts are {ids}. Look at "
        "them and at both models' logits, or lower train.lr"
    )
