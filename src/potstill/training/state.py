"""A run in progress: what its steps share, and what each hands on to the next."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from potstill.config import Recipe, Train
from potstill.engines.make import make_engine, own_engine
from potstill.engines.protocol import Engine
from potstill.models import distributed
from potstill.models.adapters import has_adapter
from potstill.models.distributed import World
from potstill.models.language_model import LanguageModel
from potstill.models.lean.optimizers import make_optimizer
from potstill.prompts.mixture import step_places
from potstill.runs import run_folder
from potstill.runs.schema import StepMetrics, value_in
from potstill.seeds import Key
from potstill.training import checkpoint
from potstill.training.controllers import (
    BestState,
    WeightState,
    WindowState,
    first_window,
    next_weight,
)
from potstill.training.rates import is_extended_at, is_spent, with_lr
from potstill.training.setup import Setup
from potstill.types import Prompt, Rollout, Writer


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Everything that the steps of a run share. Its models and its optimiser change in place.

    `settings` are `recipe.train` with a learning rate. `engines` are those of the models that
    write; this process writes with a whole copy of a student that ranks share, or that writes in
    another type. `follower` is a teacher that becomes the student every so many steps.
    """

    recipe: Recipe
    settings: Train
    setup: Setup
    world: World
    optimizer: torch.optim.Optimizer
    engines: Mapping[Writer, Engine]
    follower: LanguageModel | None

    @property
    def measured(self) -> LanguageModel:
        """The student as it is measured: itself, or its copy where ranks, which share it, have a
        whole one."""
        student = self.setup.student
        if self.world.size == 1 or self.ranks_that_pass is not None:
            return student
        return student.around(self.decoder, "student")

    @property
    def ranks_that_pass(self) -> World | None:
        """The ranks that share the student that is measured, and so take as many passes; None where
        each has a whole one."""
        is_shared = self.world.size > 1 and distributed.is_empty(self.decoder)
        return self.world if is_shared else None

    @property
    def folder(self) -> Path:
        return self.recipe.out

    @property
    def decoder(self) -> Any:
        """The student's model that writes: whole on this rank, or empty where it does not write."""
        return self.engines["student"].model

    @property
    def split_by(self) -> tuple[Writer, ...]:
        """The writers by which metrics are split: two that write the same rollouts, or none."""
        return ("teacher", "student") if self.recipe.objective.prefix == "mixed" else ()

    def bring_up(self, step: int) -> None:
        """Give the student that writes the weights of the one that learns, after so many steps.
        Every rank must call this."""
        distributed.refresh(self.decoder, self.setup.student)
        self.engines["student"].update_weights(step)

    def complete(self, step: int) -> None:
        """Bring it up once more at the end of a run, whole on rank 0. Every rank must call this."""
        self.bring_up(step)
        distributed.fill(self.decoder, self.setup.student, is_here=self.world.is_main)

    def rest(self) -> None:
        """Leave the device to what learns."""
        for engine in self.engines.values():
            engine.rest()

    def close(self) -> None:
        """End what the engines have started."""
        for engine in self.engines.values():
            engine.close()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run between two steps: `step` finished ones, and what the next one needs to know of them.

    `rollouts` are this rank's of the round in use, `flops` the operations of all ranks so far,
    `metrics` those of the last step, None before one. The rest is plain data, which checkpoints
    keep.
    """

    step: int
    weight: WeightState
    window: WindowState
    best: BestState
    flops: float
    rollouts: list[Rollout]
    metrics: StepMetrics | None

    def as_data(self) -> dict[str, Any]:
        """Plain data for a checkpoint; the inverse is `_read_run`."""
        return {
            "weight": dataclasses.asdict(self.weight),
            "window": dataclasses.asdict(self.window),
            "best": dataclasses.asdict(self.best),
            "flops": self.flops,
        }

    def after(self, recipe: Recipe, metrics: StepMetrics, rollouts: list[Rollout]) -> "Run":
        """The run one step on, with the forward weight that the step's entropies lead to."""
        weight = self.weight
        if recipe.weight_schedule.schedule == "entropy":
            entropy = value_in(metrics, "student_entropy_before_answer")
            teacher_entropy = value_in(metrics, "teacher_entropy_before_answer")
            # A step without a token before an answer tells nothing, and the weight stays.
            if entropy is not None and teacher_entropy is not None:
                weight = next_weight(recipe.weight_schedule, weight, entropy, teacher_entropy)
        return dataclasses.replace(
            self,
            step=self.step + 1,
            weight=weight,
            flops=metrics["total_flops"],
            rollouts=rollouts,
            metrics=metrics,
        )


def make_trainer(recipe: Recipe, setup: Setup, world: World) -> Trainer:
    """Shard the student over the ranks and give it an optimiser."""
    student, teacher = setup.student, setup.teacher
    settings = with_lr(recipe.train, student.num_weights, has_adapter(student.model))
    engines = _engines(recipe, setup, world)
    follower = None
    if teacher is not None and teacher.name == "self" and recipe.teacher.follows_every:
        assert isinstance(teacher, LanguageModel), "load_teacher copies the student"
        follower = teacher
    optimizer = make_optimizer(student, settings)
    return Trainer(
        recipe=recipe,
        settings=settings,
        setup=setup,
        world=world,
        optimizer=optimizer,
        engines=engines,
        follower=follower,
    )


def _engines(recipe: Recipe, setup: Setup, world: World) -> dict[Writer, Engine]:
    """An engine for each model that writes, once the student is sharded."""
    place: dict[str, Any] = {"folder": recipe.out / "engine", "max_tokens": setup.longest}
    decoder, is_another = _decoder(recipe, setup, world)
    engines: dict[Writer, Engine] = {
        "student": make_engine(
            recipe,
            decoder,
            "student",
            world=world,
            student=setup.student,
            is_another=is_another,
            **place,
        )
    }
    writes = None if setup.compared is None else setup.compared.decoder
    if writes is None:
        return engines
    if recipe.objective.prefix in ("teacher", "mixed") and setup.cache is None:
        engines["teacher"] = make_engine(recipe, writes, "teacher", world=world, **place)
    else:
        # Validation asks for few completions.
        engines["teacher"] = own_engine(writes)
    return engines


def _decoder(recipe: Recipe, setup: Setup, world: World) -> tuple[Any, bool]:
    """The model that writes for the student, once that is sharded, and whether it is a copy in
    another type. It is empty where this process does not write with it."""
    writes = recipe.student_writes or bool(setup.probes) or setup.held_out is not None
    is_here = recipe.rollouts.engine == "native"
    # A server also writes for the evaluation; by itself this process evaluates what is saved.
    is_written = writes or (not is_here and recipe.evaluation.source is not None)
    is_another = is_written and writes_in_another_type(recipe, setup)
    # Ranks probe with whole copies, as each has other prompts.
    has_values = (writes and is_here) or (bool(setup.probes) and world.size > 1)
    decoder = distributed.shard(
        setup.student, world, in_bfloat16=is_another, is_empty=not has_values
    )
    return decoder, is_another


def writes_in_another_type(recipe: Recipe, setup: Setup) -> bool:
    """Whether a copy in bfloat16 writes for a student in float32."""
    in_bfloat16 = recipe.writes_in(setup.loss.compute_dtype) == "bfloat16"
    return in_bfloat16 and setup.student.model.dtype == torch.float32


def begin(trainer: Trainer) -> Run:
    """The run before its first step, or where its newest checkpoint left it, without any trace of
    later steps."""
    recipe, folder = trainer.recipe, trainer.folder
    path = checkpoint.latest(folder)
    if path is None:
        weight, window = WeightState(recipe.objective.forward_weight), first_window(recipe.window)
        state = {"weight": weight, "window": window, "best": BestState()}
        run, logs = Run(step=0, **state, flops=0.0, rollouts=[], metrics=None), {}
    else:
        saved = checkpoint.load(path, trainer.setup.student, trainer.optimizer, trainer.follower)
        run, logs = _read_run(saved, trainer), saved.logs
    if is_extended_at(trainer.settings, run.step):
        run = dataclasses.replace(run, best=dataclasses.replace(run.best, num_since=0))
    if trainer.world.is_main:
        run_folder.rewind(folder, run.step, logs)
        checkpoint.tidy(folder, run.step, trainer.settings.keep_checkpoints)
        checkpoint.settle_best(folder, run.best.step)
    return run


def _read_run(saved: checkpoint.Saved, trainer: Trainer) -> Run:
    data = saved.state
    run = Run(
        step=saved.step,
        weight=WeightState(**data["weight"]),
        window=WindowState(**data["window"]),
        best=BestState(**data.get("best", {})),
        flops=data["flops"],
        rollouts=[],
        metrics=None,
    )
    if run.step % trainer.recipe.rollouts.reuse == 0 or is_spent(
        trainer.settings, run.step, run.flops
    ):
        return run
    prompts, seeds = prompts_and_seeds(trainer, run.step)
    rollouts = checkpoint.load_rollouts(saved, prompts, numbers_in_round(seeds))
    return dataclasses.replace(run, rollouts=rollouts)


def numbers_in_round(seeds: Sequence[Key]) -> list[int]:
    """The numbers of rollouts in their round, whatever the number of ranks."""
    return [number for _, _, number in seeds]


def prompts_and_seeds(trainer: Trainer, step: int) -> tuple[list[Prompt], list[Key]]:
    """This rank's prompts of the round that a step belongs to, and the seed of each rollout.

    A round is one set of rollouts, for one step or several.
    """
    settings, prompts, world = trainer.settings, trainer.setup.prompts, trainer.world
    size = trainer.recipe.reward.group_size
    round_ = step // trainer.recipe.rollouts.reuse
    mixture, per_step = trainer.setup.mixture, settings.prompts_per_step
    indices = step_places(len(prompts), mixture, per_step, round_, settings.seed)
    places = range(world.rank, settings.prompts_per_step, world.size)
    # A group of responses to one prompt is one rank's.
    rollouts = [(place, place * size + response) for place in places for response in range(size)]
    return [prompts[indices[place]] for place, _ in rollouts], [
        (settings.seed, round_, number) for _, number in rollouts
    ]
