"""The training loop: from a recipe to a run folder with a distilled student."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill import files
from potstill.checks.exploration import verdict
from potstill.config import Recipe, Role, check_recipe
from potstill.console.boundary import saying_when_stopped, stop_asked_for, stopped_after
from potstill.console.printable import say
from potstill.console.progress import StepDisplay
from potstill.engines.make import engine_of_rank_0, engine_spec, refuse_missing_program
from potstill.evaluation.scores import evaluate_anew, evaluate_run
from potstill.models import distributed
from potstill.models.adapters import has_adapter, merge_in_place
from potstill.models.distributed import World
from potstill.models.given import GivenModel, GivenTokenizer, left_as_it_was, with_names
from potstill.models.language_model import LanguageModel, ModelError, save_model
from potstill.models.lean.quantized import is_quantized
from potstill.models.probe import ready
from potstill.objectives.reward import with_log_probs
from potstill.runs import run_folder
from potstill.runs.card import write_card
from potstill.runs.schema import MetricsRow, Sample, SampleRow, StepMetrics
from potstill.tasks.own import own_files
from potstill.tracking.trackers import refuse_missing, tracked
from potstill.training import checkpoint
from potstill.training.extension import extended
from potstill.training.gradients import accumulate_gradients
from potstill.training.metrics import Stopwatch, describe, timing
from potstill.training.opening import opening, record_of, scores_at_start, warner
from potstill.training.rates import is_spent
from potstill.training.setup import Setup, prepare
from potstill.training.state import (
    Run,
    Trainer,
    begin,
    make_trainer,
    numbers_in_round,
    prompts_and_seeds,
)
from potstill.training.step import (
    NUM_LOGGED_SAMPLES,
    begin_step,
    count_flops,
    is_saved,
    lean_passes,
    plan_step,
    probe_if_due,
    samples_without_dropout,
    step_metrics,
    update,
    write_round,
)
from potstill.training.validation import is_exhausted, validate_if_due
from potstill.types import Example, Message

StepFunction = Callable[[MetricsRow], object]
# As asked to stop: no signal, but a function that was told of a step and failed.
FAILED = 1000


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, its student, and the metrics of its last step."""

    folder: Path
    student: LanguageModel
    metrics: StepMetrics


def train(
    recipe: Recipe,
    *,
    student: GivenModel | None = None,
    teacher: GivenModel | None = None,
    tokenizer: GivenTokenizer | None = None,
    prompts: Sequence[str | list[Message] | dict[str, Any] | Example] | None = None,
    extend_to: int | None = None,
    on_step: StepFunction | None = None,
    quiet: bool = False,
) -> RunResult:
    """Run a recipe, or resume it in its folder, and return the student.

    `extend_to` gives the run in the folder so many steps, finished or not (`extension.py` says what
    that means). A finished run whose recipe has another evaluation is evaluated anew.

    `on_step` is called after each step with a copy of its row of `metrics.jsonl`, in the main
    process alone. What it raises ends the run once the step is saved.

    `student` and `teacher` take the place of the models that the recipe names: other names, causal
    LMs of transformers (with their `tokenizer`), or what `load_model` returns. The student is
    trained in place. An object that is both is copied for the teacher, and a teacher is left as it
    was. `prompts` take the place of the data: strings, lists of chat messages, rows as of a data
    file, or Examples. Raises RecipeError, ModelError, DataError or RunError for bad
    input before anything is written, and NonFiniteError before a bad update.
    """
    check_recipe(recipe)
    recipe, student, teacher = with_names(
        recipe, student=student, teacher=teacher, tokenizer=tokenizer
    )
    refuse_missing(recipe.train.tracker)
    refuse_missing_program(engine_spec(recipe))
    world = distributed.start()
    may_change: tuple[Role, ...] = ()
    if extend_to is not None:
        recipe, may_change = extended(recipe, extend_to), (Role.LENGTH,)
    if world.is_main:
        run_folder.check_folder(recipe, may_change)
    folder, objects = recipe.out, (student, teacher, tokenizer, prompts)
    if run_folder.is_trained(folder, recipe):
        if all(thing is None for thing in objects):
            return _finished(recipe, world, quiet)
        if checkpoint.latest(folder) is None:
            raise run_folder.RunError(
                f"run {str(folder)!r} is finished and its checkpoint was removed; its student is "
                f"in {str(folder / 'model')!r}"
            )
    with (
        saying_when_stopped(lambda: checkpoint.what_is_saved(folder)),
        left_as_it_was(None if teacher is student else teacher),
    ):
        given: dict[str, Any] = {
            "student": student,
            "teacher": teacher,
            "tokenizer": tokenizer,
            "prompts": prompts,
        }
        setup = prepare(recipe, world, **given, date=run_folder.begun_on(folder))
        if not any(weight.requires_grad for weight in setup.student.parameters()):
            raise ModelError(
                f"student {setup.student.name!r} has no weight that may change; call its "
                "requires_grad_()"
            )
        if not world.is_main:
            return _run(recipe, setup, world, quiet=True)
        start = scores_at_start(recipe, setup)
        environment = record_of(setup, world) | ({"start": start} if start else {})
        with run_folder.open_run(recipe, environment, may_change) as notes:
            said = [*(verdict(start) if start else ()), *notes]
            return _run(recipe, setup, world, quiet, said, on_step)


def _finished(recipe: Recipe, world: World, quiet: bool) -> RunResult:
    """The student of a finished run, evaluated anew where the recipe's evaluation is another than
    the folder's."""
    spec, folder = recipe.student, recipe.out
    model = ready(str(folder / "model"), dtype=spec.dtype, trust_remote_code=spec.trust_remote_code)
    if not run_folder.is_done(folder, recipe):
        distributed.wait_for_all(world)
        if world.is_main:
            evaluate_anew(recipe, model.to(world.device), quiet)
        distributed.wait_for_rank_0(world)
    elif world.is_main and not quiet:
        edited = run_folder.edited_files(folder, own_files(recipe.data.origin, *recipe.own_sources))
        for file in edited:
            say(
                f"{file} has changed since; the finished run stays as it is, `potstill evaluate` "
                "scores it anew",
                error=True,
            )
    return RunResult(folder, model, run_folder.last_row(folder))


def _run(
    recipe: Recipe,
    setup: Setup,
    world: World,
    quiet: bool,
    notes: Sequence[str] = (),
    on_step: StepFunction | None = None,
) -> RunResult:
    """Take the steps that are left, and write the student. All randomness follows from the seed and
    finished steps."""
    trainer = make_trainer(recipe, setup, world)
    with contextlib.closing(trainer):
        return _finish(trainer, _until_spent(trainer, quiet, notes, on_step), quiet)


def _until_spent(
    trainer: Trainer, quiet: bool, notes: Sequence[str], on_step: StepFunction | None
) -> Run:
    """Take the steps that are left, from where the newest checkpoint left them."""
    recipe, setup, world = trainer.recipe, trainer.setup, trainer.world
    run, settings = begin(trainer), trainer.settings
    with (
        contextlib.ExitStack() as stack,
        StepDisplay(settings.steps, run.step, quiet, settings.flops) as display,
        stop_asked_for() as asked,
    ):
        told = [warner(trainer, display.note)] if world.is_main else []
        told += [] if on_step is None else [on_step]
        if world.is_main and recipe.train.tracker is not None:
            told.append(stack.enter_context(tracked(recipe)))
        display.note(*opening(recipe, setup, world, run.step), *notes)
        if run.step == 0:
            run = validate_if_due(trainer, run, display)
        run = _take_steps(trainer, run, display, asked, told)
        # Asked for while the last step was saved: what follows can take longer than all steps.
        if signal := distributed.max_over_ranks(asked(), world):
            raise stopped_after(run.step, signal)
    return run


def _take_steps(
    trainer: Trainer,
    run: Run,
    display: StepDisplay,
    asked: Callable[[], int],
    told: Sequence[StepFunction],
) -> Run:
    """The loop. `run` is the state before a step, `plan` what that step is to do. Each function of
    `told` is told of each step, in the main process."""
    settings, world, student = trainer.settings, trainer.world, trainer.setup.student
    has_dropout = trainer.recipe.student.dropout
    while not is_spent(settings, run.step, run.flops) and not is_exhausted(trainer, run):
        clock = Stopwatch(world.device, display.doing)
        begin_step(trainer, run)
        run, probed = probe_if_due(trainer, run, clock, display.note)
        plan = plan_step(trainer, run)
        rollouts, written = write_round(trainer, run, plan, clock)
        trainer.rest()
        cost = count_flops(trainer, run, rollouts, written=written, probed=probed)
        saves = is_saved(trainer, run, cost)
        num_samples = NUM_LOGGED_SAMPLES if saves or run.step == 0 else 0
        samples = []
        if num_samples and has_dropout:
            samples = samples_without_dropout(trainer, plan, rollouts[:num_samples], clock)
        student.train(has_dropout)
        with lean_passes(trainer.setup, settings):
            done = accumulate_gradients(
                trainer.setup,
                plan.loss,
                rollouts,
                settings=settings,
                step=run.step,
                world=world,
                clock=clock,
                split_by=trainer.split_by,
                num_samples=0 if has_dropout else num_samples,
                reuse=trainer.recipe.rollouts.reuse,
            )
        updated = update(trainer, run, plan, done.sums, clock)
        metrics = step_metrics(trainer, plan, done.sums, updated, cost)
        rollouts = with_log_probs(rollouts, done.log_probs)
        run = run.after(trainer.recipe, metrics, rollouts)
        row = _record(trainer, metrics, samples + done.samples, display, clock)
        failure = _tell(told, row)
        run = validate_if_due(trainer, run, display)
        ends_early = is_exhausted(trainer, run)
        # The ranks stop together.
        signal = distributed.max_over_ranks(FAILED if failure else asked(), world)
        if saves or signal or ends_early:
            _save(trainer, run)
        display.update(
            metrics["step"],
            num_tokens=metrics["num_loss_tokens"],
            total_flops=metrics["total_flops"],
            numbers=describe(metrics),
        )
        if signal == FAILED:
            raise _failed(failure, run.step, display)
        if signal:
            raise stopped_after(run.step, signal)
        if ends_early:
            display.note(_ended_early(trainer, run))
    return run


def _ended_early(trainer: Trainer, run: Run) -> str:
    goal = trainer.recipe.validation.keep_best
    return (
        f"ended early after step {run.step}: {run.best.num_since} validations in a row had no "
        f"better {goal} than the one after step {run.best.step}"
    )


def _record(
    trainer: Trainer,
    metrics: StepMetrics,
    samples: list[Sample],
    display: StepDisplay,
    clock: Stopwatch,
) -> MetricsRow:
    """Log a finished step; its row."""
    row: MetricsRow = {**metrics, **timing(display.lap(), clock.seconds)}
    if not trainer.world.is_main:
        return row
    files.append(trainer.folder / "metrics.jsonl", row)
    for sample in samples:
        logged: SampleRow = {"step": metrics["step"], **sample}
        files.append(trainer.folder / "samples.jsonl", logged)
    return row


def _tell(told: Sequence[StepFunction], row: MetricsRow) -> Exception | None:
    """Tell each function of a step; what one of them raises."""
    for function in told:
        try:
            function(copy.deepcopy(row))
        # An error of the user's own code is raised again once the step is saved.
        except Exception as error:
            return error
    return None


def _failed(failure: Exception | None, step: int, display: StepDisplay) -> Exception:
    """The error that ends a run whose step is saved and could not be told."""
    saved = f"step {step} is saved, and the same command goes on from there"
    if failure is None:
        return run_folder.RunError(f"rank 0 could not tell of step {step}; {saved}")
    display.note(f"ended by {type(failure).__name__} after a step: {saved}")
    failure.add_note(saved)
    return failure


def _save(trainer: Trainer, run: Run) -> None:
    """Write a checkpoint, with the rollouts if the next step uses them again."""
    rollouts = None
    if run.step % trainer.recipe.rollouts.reuse:
        _, seeds = prompts_and_seeds(trainer, run.step)
        rollouts = dict(zip(numbers_in_round(seeds), run.rollouts, strict=True))
    checkpoint.save(
        trainer.folder,
        run.step,
        trainer.setup.student,
        trainer.optimizer,
        trainer.world,
        state=run.as_data(),
        rollouts=rollouts,
        teacher=trainer.follower,
        num_kept=trainer.settings.keep_checkpoints,
        in_shards=trainer.settings.checkpoint_files == "sharded",
    )
    if trainer.world.is_main:
        checkpoint.settle_best(trainer.folder, run.best.step)


def _finish(trainer: Trainer, run: Run, quiet: bool) -> RunResult:
    """Write the student, evaluate it, and mark the run as done."""
    recipe, setup, folder, world = trainer.recipe, trainer.setup, trainer.folder, trainer.world
    student = setup.student
    decoder = trainer.decoder
    if recipe.evaluation.source is not None or has_adapter(decoder):
        trainer.complete(run.step)
    weights = checkpoint.weights(student, decoder if world.is_main else None, recipe.student.lora)
    student.eval()
    if world.is_main:
        save_model(student, weights, setup.ends.stop_ids, folder / "model")
        if has_adapter(decoder) and not is_quantized(decoder):
            # Evaluated is what is saved, to the bit.
            merge_in_place(decoder)
        engine = trainer.engines["student"]
        # The other ranks take no part.
        own = None if engine.is_native else engine_of_rank_0(engine)
        evaluate_run(recipe, trainer.measured, run.step, quiet, own)
        write_card(folder)
        run_folder.mark_done(recipe)
    distributed.wait_for_rank_0(world)
    # A run that was stopped after its last step has no step left to do.
    return RunResult(folder, student, run.metrics or run_folder.last_row(folder))
