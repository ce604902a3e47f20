"""How long a study's runs will take and how much disk they fill: from finished runs of a kind, or a
trial of two steps.

Trials are for models so small that they cost a second; what larger ones take is known when the
first run is done.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.config import Evaluation, Recipe, Role, Selection
from potstill.runs.results import read_entry
from potstill.runs.schema import FLOPS_PARTS, FlopsPart, TimedPart, value_in
from potstill.tasks import is_table
from potstill.tasks.own import own_task
from potstill.types import NonFiniteError

if TYPE_CHECKING:
    from potstill.study.items import Item

NUM_TRIAL_STEPS = 2
# Models whose weights are larger are not loaded for an estimate.
MAX_TRIAL_BYTES = 50e6
# Fields that the cost of a step does not depend on.
FREE: Selection = (
    *(Role.OUTPUT, Role.EVALUATION, Role.SEED, Role.TUNED, Role.CACHE, Role.DIVERGENCE),
    *(Role.LENGTH, Role.WARM_UP, Role.BUDGET, "data.num_prompts", "student.model"),
)


@dataclass(frozen=True)
class Cost:
    """Seconds of one process, and bytes."""

    seconds: float
    num_bytes: float


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of a step, those that a cache saves it, operations, tokens of a completion, and bytes
    of what is kept."""

    seconds: float
    cached_seconds: float
    flops: float
    length: float
    num_bytes: int


@dataclass(frozen=True)
class Known:
    """Costs that were measured so far, by what they depend on; None where a trial says nothing."""

    steps: dict[str, StepCost | None]
    evaluations: dict[str, Cost | None]


def estimate_costs(items: Sequence[Item], one_thread: bool) -> dict[Path, Cost | None]:
    """The cost of each item that is not done; None where nothing is known yet. With `one_thread`
    trials take one."""
    left = [item for item in items if not item.is_done]
    if not left:
        return {}
    import torch

    if one_thread:
        torch.set_num_threads(1)
    students = {item.job.path: item.recipe.student.model for item in items if item.kind == "train"}
    known = Known(_finished_steps(items, students), {})
    return {item.job.path: _cost(item, _start(item, students), known) for item in left}


def _finished_steps(items: Sequence[Item], students: dict[Path, str]) -> dict[str, StepCost | None]:
    done = [item for item in items if item.kind == "train" and item.is_done]
    return {
        _kind(item.recipe, _start(item, students)): _finished_step(item.job.path) for item in done
    }


def _start(item: Item, students: dict[Path, str]) -> str:
    """The model that an item begins with, or where a run makes it first, the student of that
    run."""
    start = item.job.arguments[1] if item.kind == "evaluate" else item.recipe.student.model
    # A model that does not exist yet is as large as the one it is made from.
    return students.get(Path(start), students.get(Path(start).parent, start))


def _cost(item: Item, start: str, known: Known) -> Cost | None:
    if item.kind == "evaluate":
        return _evaluation_cost(start, item.evaluation, known)
    step = _step_cost(item, start, known)
    if item.kind == "cache":
        return None if step is None else _cache_cost(item.recipe, step)
    evaluated = _evaluation_cost(start, item.evaluation, known)
    return None if step is None or evaluated is None else _run_cost(item, step, evaluated)


def _step_cost(item: Item, start: str, known: Known) -> StepCost | None:
    recipe = item.recipe
    kind = _kind(recipe, start)
    if kind not in known.steps:
        cached = item.kind == "cache" or recipe.teacher.cache is not None
        known.steps[kind] = _try_steps(recipe, start, cached)
    return known.steps[kind]


def _evaluation_cost(model: str, evaluation: Evaluation, known: Known) -> Cost | None:
    key = json.dumps([model, evaluation.model_dump(mode="json", exclude={"seed"})])
    if key not in known.evaluations:
        known.evaluations[key] = _try_evaluation(model, evaluation)
    return known.evaluations[key]


def _cache_cost(recipe: Recipe, step: StepCost) -> Cost:
    from potstill.config import CacheOptions
    from potstill.planning.disk import bytes_a_token
    from potstill.planning.sizes import model_sizes, without_weights
    from potstill.prompts.examples import DEFAULT_TASK_PROMPTS

    num_prompts = recipe.data.num_prompts or DEFAULT_TASK_PROMPTS
    seconds = step.cached_seconds * num_prompts / recipe.train.prompts_per_step
    teacher = model_sizes(without_weights(recipe.teacher.model))
    a_token = bytes_a_token(CacheOptions(), teacher, recipe.objective.top_k)
    return Cost(seconds, num_prompts * step.length * a_token)


def _run_cost(item: Item, step: StepCost, evaluated: Cost) -> Cost:
    """The cost of as many steps as the run takes, which its budget of operations can cut short, and
    its evaluation."""
    recipe, num_steps = item.recipe, item.job.num_steps
    if recipe.train.flops is not None and step.flops:
        num_steps = min(num_steps, math.ceil(recipe.train.flops / step.flops))
    return Cost(step.seconds * num_steps + evaluated.seconds, step.num_bytes + evaluated.num_bytes)


def _kind(recipe: Recipe, start: str) -> str:
    """The part of a recipe that runs with steps of one cost have in common, with the model that
    they began with."""
    data = recipe.resolved_without(FREE)
    return json.dumps([recipe.teacher.cache is not None, start, data], sort_keys=True)


def _finished_step(path: Path) -> StepCost:
    metrics = read_entry(path).metrics
    num_bytes = sum(_num_bytes(path / kept) for kept in ("model", "checkpoint"))
    flops = (value_in(metrics[-1], "total_flops") or 0.0) / len(metrics)
    return StepCost(
        seconds=sum(row["seconds"] for row in metrics) / len(metrics),
        cached_seconds=0.0,
        flops=flops,
        length=metrics[-1]["length"],
        num_bytes=num_bytes,
    )


def _try_steps(recipe: Recipe, start: str, cached: bool) -> StepCost | None:
    """A trial in a folder that is removed again; None where it would not be quick, or run code of
    the user's.

    There is no cache yet, so what it saves is taken off.
    """
    from potstill.training.loop import train

    origin = recipe.data.origin
    models = {start, recipe.teacher.model} - {"self"}
    if is_table(origin) or any(map(own_task, (origin, *recipe.own_sources))):
        return None
    if not all(map(_is_small, models)):
        return None
    few = {"steps": NUM_TRIAL_STEPS, "warmup_steps": 0, "flops": None}
    sections = {"train": few, "teacher": {"cache": None}, "student": {"model": start}}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trial"
        try:
            train(_trial(recipe, sections, out), quiet=True)
        except NonFiniteError:
            # The run will say so itself; others can go on.
            return None
        # The first step also warms up.
        last = read_entry(out).metrics[-1]
        saved: tuple[FlopsPart, ...] = ("rollout", "teacher") if cached else ()
        saved_seconds: tuple[TimedPart, ...] = (
            ("rollout_seconds", "teacher_seconds") if cached else ()
        )
        seconds = last["seconds"] - sum(value_in(last, part) or 0.0 for part in saved_seconds)
        flops = sum(last["flops"][part] for part in FLOPS_PARTS if part not in saved)
        num_bytes = sum(_num_bytes(out / kept) for kept in ("model", "checkpoint"))
        return StepCost(
            seconds=seconds,
            cached_seconds=last["seconds"] - seconds,
            flops=flops,
            length=last["length"],
            num_bytes=num_bytes,
        )


def _trial(recipe: Recipe, sections: dict[str, dict[str, Any]], out: Path) -> Recipe:
    update = {
        name: getattr(recipe, name).model_copy(update=fields) for name, fields in sections.items()
    }
    return recipe.model_copy(update=update | {"out": out, "evaluation": Evaluation()})


def _try_evaluation(model: str, evaluation: Evaluation) -> Cost | None:
    """From one batch of responses; None where that would not be quick, or run code of the
    user's."""
    if evaluation.source is None:
        return Cost(0, 0)
    if is_table(evaluation.source) or own_task(evaluation.source) or not _is_small(model):
        return None
    from potstill.evaluation.scores import evaluate

    num_problems = max(
        1, min(evaluation.batch_size // evaluation.num_responses, evaluation.num_problems)
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        few = evaluation.model_copy(update={"num_problems": num_problems})
        evaluate(model, few, responses=Path(folder), quiet=True)
        scale = evaluation.num_problems / num_problems
        return Cost(scale * (time.perf_counter() - started), scale * _num_bytes(Path(folder)))


def _is_small(name: str) -> bool:
    from potstill.models.language_model import find_folder

    folder = find_folder(name)
    return (
        folder is not None
        and sum(f.stat().st_size for f in folder.glob("*.safetensors")) < MAX_TRIAL_BYTES
    )


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
