"""The training loop: from a recipe to a run folder with a distilled student."""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from potstill import checkpoint, distributed, files, runlog
from potstill.batching import batch_places, make_batch
from potstill.boundary import stop_asked_for, stopped_after
from potstill.config import Recipe, Role, check_recipe, run_evaluation
from potstill.controllers import (
    WeightState,
    WindowState,
    decide,
    first_window,
    is_probe_due,
    next_weight,
    scheduled_weight,
    scheduled_window,
)
from potstill.distributed import World
from potstill.evaluation import evaluate, evaluate_anew
from potstill.extension import extended
from potstill.flops import ModelFlops, rollout_flops, training_flops
from potstill.fused import token_loss
from potstill.habits import disagreement, habit_sums, step_habits
from potstill.metrics import Stopwatch, before_answer, rollout_sums, step_means, token_sums
from potstill.models import LanguageModel, ModelError, save_model
from potstill.objective import (
    Loss,
    batch_loss,
    known_of_teacher,
    later_costs,
    signal_of,
    student_rows,
    without_baseline,
)
from potstill.opening import opening
from potstill.prefixes import Writing, write_rollouts
from potstill.printable import say
from potstill.probe import ready
from potstill.probing import probe_window
from potstill.progress import StepDisplay
from potstill.rates import is_spent, learning_rate, planned_steps, with_lr
from potstill.samples import Scored, logged_sample, scored_samples
from potstill.seeds import step_indices, step_seed
from potstill.setup import Setup, prepare
from potstill.tasks.own import own_files
from potstill.teachers import Teacher
from potstill.types import Example, NonFiniteError, Prompt, Rollout, Writer

# Decoded rollouts with per-token numbers are logged this many at a time, at step 1 and with every checkpoint.
NUM_LOGGED_SAMPLES = 2


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, its student, and the metrics of its last step."""

    folder: Path
    student: LanguageModel
    metrics: dict[str, Any]


def train(
    recipe: Recipe,
    *,
    student=None,
    teacher=None,
    tokenizer=None,
    prompts: Sequence[str | dict[str, Any] | Example] | None = None,
    extend_to: int | None = None,
    quiet: bool = False,
) -> RunResult:
    """Run a recipe, or resume it in its folder, and return the student.

    `extend_to` gives the run in the folder so many steps, finished or not (`extension.py` says what that means). A
    finished run whose recipe has another evaluation is evaluated anew.

    `student` and `teacher` may be Hugging Face causal LMs that are already loaded (with their `tokenizer`), `prompts` a
    list of strings, rows as of a data file, or Examples; they take the place of what the recipe names. Raises
    RecipeError, ModelError, DataError or RunError for bad input before anything is written, and NonFiniteError before a
    bad update.
    """
    check_recipe(recipe, Recipe)
    world = distributed.start()
    may_change: tuple[Role, ...] = ()
    if extend_to is not None:
        recipe, may_change = extended(recipe, extend_to), (Role.LENGTH,)
    if world.is_main:
        runlog.check_folder(recipe, may_change)
    folder, objects = recipe.out, (student, teacher, tokenizer, prompts)
    if runlog.is_trained(folder, recipe):
        if all(thing is None for thing in objects):
            return _finished(recipe, world, quiet)
        if checkpoint.latest(folder) is None:
            raise runlog.RunError(
                f"run {str(folder)!r} is finished and its checkpoint was removed; its student is in "
                f"{str(folder / 'model')!r}"
            )
    with checkpoint.told_when_stopped(folder):
        given: dict[str, Any] = {"student": student, "teacher": teacher, "tokenizer": tokenizer, "prompts": prompts}
        setup = prepare(recipe, world, **given, date=runlog.begun_on(folder))
        if not any(weight.requires_grad for weight in setup.student.parameters()):
            raise ModelError(f"student {setup.student.name!r} has no weight that may change; call its requires_grad_()")
        if not world.is_main:
            return _run(recipe, setup, world, quiet=True)
        with runlog.open_run(recipe, _environment(setup, world), may_change) as notes:
            return _run(recipe, setup, world, quiet, notes)


def _finished(recipe: Recipe, world: World, quiet: bool) -> RunResult:
    """The student of a finished run, evaluated anew where the recipe's evaluation is another than the folder's."""
    spec, folder = recipe.student, recipe.out
    model = ready(str(folder / "model"), dtype=spec.dtype, trust_remote_code=spec.trust_remote_code)
    if not runlog.is_done(folder, recipe):
        distributed.wait_for_all(world)
        if world.is_main:
            evaluate_anew(recipe, model.to(world.device), quiet)
        distributed.wait_for_rank_0(world)
    elif world.is_main and not quiet:
        edited = runlog.edited_files(folder, own_files(recipe.data.source, recipe.evaluation.source))
        for file in edited:
            say(
                f"{file} has changed since; the finished run stays as it is, `potstill evaluate` scores it anew",
                error=True,
            )
    return RunResult(folder, model, runlog.last_row(folder))


@dataclass(frozen=True)
class State:
    """What a run carries from step to step beside weights, optimiser and rollouts; in checkpoints, as plain data."""

    mixing: WeightState
    window: WindowState
    flops: float = 0.0

    @staticmethod
    def first(recipe: Recipe) -> "State":
        """Before the first step."""
        return State(WeightState(recipe.objective.forward_weight), first_window(recipe.window))

    @staticmethod
    def from_data(data: dict[str, Any]) -> "State":
        """The inverse of `dataclasses.asdict`."""
        mixing, window = WeightState(**data["mixing"]), WindowState(**data["window"])
        return State(mixing, window, data["flops"])


def _run(recipe: Recipe, setup: Setup, world: World, quiet: bool, notes: Sequence[str] = ()) -> RunResult:
    """The loop. All randomness follows from the number of finished steps and the seed."""
    student, teacher = setup.student, setup.teacher
    config, folder = with_lr(recipe.train, student.num_weights), recipe.out
    decoders: dict[Writer, Any] = {"student": distributed.shard(student, world)}
    if teacher is not None and teacher.decoder is not None:
        decoders["teacher"] = teacher.decoder
    split_by: tuple[Writer, ...] = ("teacher", "student") if recipe.objective.prefix == "mixed" else ()
    # Its rate is set in every step.
    optimizer = torch.optim.AdamW(student.parameters(), 0.0, config.betas, weight_decay=config.weight_decay)
    follower = None
    if teacher is not None and teacher.name == "self" and recipe.teacher.refresh_steps:
        assert isinstance(teacher, LanguageModel), "load_teacher copies the student"
        follower = teacher
    start, state, saved = 0, State.first(recipe), None
    if (path := checkpoint.latest(folder)) is not None:
        saved = checkpoint.load(path, student, optimizer, follower)
        start, state = saved.step, State.from_data(saved.state)
    writers_flops: dict[Writer, ModelFlops] = {"student": setup.student_flops}
    if setup.teacher_flops is not None and setup.cache is None:
        writers_flops["teacher"] = setup.teacher_flops
    by_token = recipe.objective.prefix == "mixed" and recipe.objective.prefix_mix == "token"
    rollouts: list[Rollout] = []
    if world.is_main:
        runlog.rewind(folder, start, {} if saved is None else saved.logs)
        checkpoint.tidy(folder, start)
    metrics: dict[str, Any] = {}
    has_warned = False
    with StepDisplay(config.steps, start, quiet, config.flops) as display, stop_asked_for() as asked:
        display.note(*opening(recipe, setup, start), *notes)
        step, is_last = start, is_spent(config, start, state.flops)
        while not is_last:
            torch.manual_seed(step_seed("step", config.seed, step, world.rank))
            if follower is not None and step > 0 and step % (recipe.teacher.refresh_steps or 1) == 0:
                distributed.refresh(follower.model, student)
            clock = Stopwatch(world.device)
            places = range(world.rank, config.prompts_per_step, world.size)
            written_flops = probe_flops = 0
            # A round is one set of rollouts, for one step or several.
            round_, age = divmod(step, recipe.rollouts.reuse)
            indices = step_indices(len(setup.prompts), config.prompts_per_step, round_, config.seed)
            prompts = [setup.prompts[indices[place]] for place in places]
            seeds = [(config.seed, round_, place) for place in places]
            student.eval()
            if age == 0:
                distributed.refresh(decoders["student"], student)
                if is_probe_due(recipe.window, state.window, step, recipe.rollouts.reuse):
                    with clock("probe"):
                        probe, probe_flops = probe_window(recipe, setup, decoders, state.window, step, world)
                    gate, decision = decide(recipe.window, state.window, probe)
                    state = dataclasses.replace(state, window=gate)
                    display.note(f"before step {step + 1}: {decision}")
                    if world.is_main:
                        files.append(folder / "window.jsonl", {"step": step + 1, **decision.as_row()})
            window = state.window.tokens
            if recipe.window.schedule == "linear":
                window = scheduled_window(recipe.window, step - age, planned_steps(config, step - age))
            writing = Writing(
                recipe.objective,
                decoders,
                window,
                setup.ends.stop_ids,
                recipe.sampling,
                config.prompts_per_step,
                setup.loss.vocab_size,
                setup.cache,
            )

            with clock("rollout"):
                if age == 0:
                    try:
                        rollouts = write_rollouts(writing, prompts, seeds)
                    except NonFiniteError as error:
                        raise _not_finite(str(error), step, prompts) from None
                    written_flops = rollout_flops(rollouts, writers_flops, by_token)
                elif step == start and saved is not None:
                    rollouts = checkpoint.load_rollouts(saved, prompts, world)

            looks_ahead = recipe.objective.gamma > 0
            parts = training_flops(rollouts, setup.student_flops, setup.scoring_flops, looks_ahead)
            parts |= {"rollout": written_flops, "probe": probe_flops}
            parts = dict(zip(parts, distributed.sum_over_ranks(list(parts.values()), world), strict=True))
            total_flops = state.flops + sum(parts.values())
            is_last = is_spent(config, step + 1, total_flops)
            ended = any(step + 1 == until for until, _ in config.extended)
            saves = (step + 1) % config.checkpoint_every == 0 or is_last or ended

            weight = state.mixing.weight
            if recipe.weight_schedule.schedule != "entropy":
                weight = scheduled_weight(
                    recipe.weight_schedule, recipe.objective.forward_weight, step, planned_steps(config, step)
                )
            loss = dataclasses.replace(setup.loss, forward_weight=weight)
            num_samples = NUM_LOGGED_SAMPLES if saves or step == 0 else 0
            samples: list[dict[str, Any]] = []
            if num_samples and recipe.student.dropout:
                # The log is of the student that wrote. Without dropout that is the one that learns.
                try:
                    with clock("samples"):
                        chosen = rollouts[:num_samples]
                        samples = scored_samples(student, teacher, chosen, loss, world.device)
                except NonFiniteError as error:
                    raise _not_finite(str(error), step, prompts) from None
                num_samples = 0
            student.train(recipe.student.dropout)
            batches = (rollouts, config.tokens_per_batch)
            sums, seen = accumulate_gradients(setup, loss, *batches, step, world, clock, split_by, num_samples)
            samples += seen

            with clock("student"):
                norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
                grad_norm = distributed.whole(norm).item()
                if not math.isfinite(grad_norm):
                    raise _not_finite("the gradient is not finite", step, prompts)
                lr = learning_rate(config, step, state.flops)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            metrics = {"step": step + 1, "prefix": recipe.objective.prefix, **step_means(sums, split_by)}
            metrics |= {"grad_norm": grad_norm, "lr": lr, "window": window, "rollout_age": age}
            if recipe.objective.kl == "mixed":
                metrics["forward_weight"] = weight
            if setup.ends.compared_ids:
                metrics["end_habits"] = step_habits(sums, recipe.objective, setup.ends, student.tokenizer)
                warning = disagreement(metrics["end_habits"], setup.ends, student.tokenizer)
                if warning is not None and not has_warned:
                    has_warned = True
                    display.note(warning)
            mixing = state.mixing
            if recipe.weight_schedule.schedule == "entropy":
                entropies = (metrics[f"{who}_entropy_before_answer"] for who in ("student", "teacher"))
                mixing = next_weight(recipe.weight_schedule, mixing, *entropies)
            state = State(mixing, state.window, total_flops)
            metrics |= {"flops": parts, "total_flops": total_flops}
            if world.is_main:
                files.append(folder / "metrics.jsonl", metrics | display.timing(clock.seconds))
                for sample in samples:
                    files.append(folder / "samples.jsonl", {"step": step + 1, **sample})
            # The ranks stop together.
            signal = distributed.max_over_ranks(asked(), world)
            if saves or signal:
                is_last_use = (step + 1) % recipe.rollouts.reuse == 0
                reused, data = () if is_last_use else rollouts, dataclasses.asdict(state)
                checkpoint.save(folder, step + 1, student, optimizer, world, data, reused, follower)
            display.update(metrics)
            step += 1
            if signal:
                raise stopped_after(step, signal)

    weights = checkpoint.weights(student)
    distributed.refresh(decoders["student"], student)
    student.eval()
    if world.is_main:
        save_model(student, weights, setup.ends.stop_ids, folder / "model")
        if recipe.evaluation.source is not None:
            finished = student.around(decoders["student"], str(folder))
            options = {"end_ids": setup.ends.stop_ids, "responses": folder / "responses", "quiet": quiet}
            runlog.store_evals(folder, step, evaluate(finished, run_evaluation(recipe), date=setup.date, **options))
        runlog.finish(recipe)
    distributed.wait_for_rank_0(world)
    # A run that was stopped after its last step has no step left to do.
    return RunResult(folder, student, metrics or runlog.last_row(folder))


def accumulate_gradients(
    setup: Setup,
    loss: Loss,
    rollouts: list[Rollout],
    tokens_per_batch: int,
    step: int,
    world: World,
    clock: Stopwatch,
    split_by: Sequence[Writer] = (),
    num_samples: int = 0,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Add this rank's part of the step's gradient, batch by batch; the only division is by one count over all ranks.

    Returns the step's summed statistics over all ranks, and this rank's first `num_samples` rollouts for the run log.
    """
    student = setup.student
    groups = batch_places(rollouts, tokens_per_batch)
    # Sharded ranks must take the same number of forward passes.
    num_batches = distributed.max_over_ranks(len(groups), world)
    if len(groups) < num_batches:
        groups = batch_places(rollouts, tokens_per_batch, num_batches)
    batches = [make_batch([rollouts[place] for place in places], world.device) for places in groups]
    (divisor,) = distributed.sum_over_ranks([loss.divisor(rollouts)], world)
    texts = student.tokenizer.batch_decode([list(r.completion_ids) for r in rollouts], skip_special_tokens=True)
    sums: Counter[str] = Counter(rollout_sums(rollouts, texts, split_by))
    returns: list[Any] = [None] * len(batches)
    if loss.objective.gamma:
        # Of all batches first: what a token answers for is measured by the whole step's rollouts.
        with clock("student"):
            costs = [later_costs(student, setup.teacher, batch, loss) for batch in batches]
            returns = without_baseline(costs, batches, world)
    samples: dict[int, dict[str, Any]] = {}
    for places, batch, returns_N in zip(groups, batches, returns, strict=True):
        with clock("teacher"):
            known = known_of_teacher(setup.teacher, batch, loss)
            signal = signal_of(known, setup.teacher, loss)
        with clock("student"):
            hidden_ND = student_rows(student, batch, loss)
            given = (student, setup.teacher, signal, batch, loss, divisor, returns_N, hidden_ND)
            try:
                loss_sum, loss_N, stats = batch_loss(*given)
            except NonFiniteError as error:
                raise _not_finite(str(error), step, [rollout.prompt for rollout in batch.rollouts]) from None
            teacher_head = None if setup.teacher is None else setup.teacher.head
            theirs = (signal, teacher_head) if isinstance(signal, torch.Tensor) and teacher_head is not None else None
            mine = (hidden_ND, student.head)
            sums.update(habit_sums(batch.rollouts, loss.objective, setup.ends, stats, mine, theirs))
        if min(places) < num_samples:
            # Before the backward pass, after which a sharded head is whole no longer.
            with clock("samples"):
                if returns_N is not None:
                    loss_N = token_loss(loss.terms(), stats)
                each = Scored(hidden_ND, known, loss_N, stats).each(batch.rollouts)
                for place, rollout, scored in zip(places, batch.rollouts, each, strict=True):
                    if place < num_samples:
                        samples[place] = logged_sample(student, setup.teacher, rollout, scored, loss)
        with clock("student"):
            loss_sum.backward()
        responses = [texts[place] for place in places]
        before_answer_N = before_answer(batch, responses, student.tokenizer, setup.answer_end)
        sums.update(token_sums(stats, before_answer_N, batch.rollouts, split_by) | {"loss": loss_sum.item()})
    sums_over_ranks = dict(zip(sums, distributed.sum_over_ranks(list(sums.values()), world), strict=True))
    return sums_over_ranks, [samples[place] for place in sorted(samples)]


def _not_finite(what: str, step: int, prompts: Sequence[Prompt]) -> NonFiniteError:
    ids = ", ".join(prompt.example.id for prompt in prompts[:8])
    return NonFiniteError(
        f"step {step + 1}: {what}; nothing was updated. The first prompts are {ids}. Look at them and at both models' "
        "logits, or lower train.lr"
    )


def _environment(setup: Setup, world: World) -> dict[str, Any]:
    models: dict[str, Teacher] = {"student": setup.student}
    if setup.teacher is not None:
        models["teacher"] = setup.teacher
    prompts = [(p.token_ids, p.completion_ids, p.trained, p.teacher_ids, p.cached) for p in setup.prompts]
    return {
        "world_size": world.size,
        "device": str(world.device),
        "date": setup.date,
        "task_files": setup.task_files,
        "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
        "end_ids": list(setup.ends.stop_ids),
        "end_class": list(setup.ends.class_ids),
        "models": {
            role: {"name": model.name, "weights": model.weights_digest(), "end_ids": list(model.end_ids)}
            for role, model in models.items()
        },
    }
