"""The items of a study: a run, a cache or an evaluation, each with its recipe, folder and process.

A run's folder is named by the hash of its resolved recipe, so that whatever is there with a
matching DONE is that run, whoever made it.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from potstill.config import (
    Evaluation,
    Recipe,
    make_recipe,
    read_recipe,
    toml_value,
    with_fields,
)
from potstill.files import json_digest
from potstill.runs.run_folder import is_done
from potstill.study.cells import corner
from potstill.study.file import DATA_OF_THE_START, PanelPlan, Stage, Study
from potstill.study.jobs import Job
from potstill.tasks import is_table


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that a study makes: a run, a cache or an evaluation.

    `label` is what the report calls it, the same for all seeds of a run; `pending`: its recipe
    waits for a sweep.
    """

    kind: Literal["train", "cache", "evaluate"]
    label: str
    job: Job
    recipe: Recipe
    evaluation: Evaluation
    pending: bool = False
    shown: bool = True

    @property
    def is_done(self) -> bool:
        """Whether it is there, whole and of this recipe."""
        return (
            is_done(self.job.path, self.recipe) if self.kind == "train" else self.job.done.exists()
        )


def panel_recipe(panel: PanelPlan, fields: dict[str, Any], seed: int, out: Path) -> Recipe:
    """The panel's recipe with these fields and this seed."""
    assert panel.recipe is not None
    data = read_recipe(panel.recipe, fields)
    section = data.get("data", {})
    source = section.get("sources") or section.get("source", "multiplication")
    given = _seeds(source, seed) | {"out": str(out)}
    return make_recipe(with_fields(data, given), f"panel {panel.title!r}")


def _seeds(source: Any, seed: int) -> dict[str, int]:
    """The seeds of a run, of which only a task's problems have one of their own."""
    return {"train.seed": seed} | ({} if is_table(source) else {"data.seed": seed})


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:60]


def run_items(
    study: Study,
    panel: PanelPlan,
    fields: dict[str, Any],
    seed: int,
    details: Sequence[str],
    which: str,
    cache_window: int | None,
    pending: bool = False,
) -> Iterator[Item]:
    """A run, after the cache that it reads if it reads one; `details` and `which` seed follow its
    method's name.

    `cache_window` is the widest window that reads the cache; None where none is read.
    """
    recipe = panel_recipe(panel, fields, seed, study.out)
    needs: tuple[Path, ...] = ()
    if cache_window is not None and recipe.objective.prefix == "teacher":
        cache = _cache(study, recipe, cache_window)
        yield cache
        needs = (cache.job.path,)
        recipe = make_recipe(with_fields(recipe.resolved(), {"teacher.cache": str(cache.job.path)}))
    label = ", ".join([recipe.method, *details])
    yield _run_item(study, recipe, label, which, pending, needs)


def _job(
    study: Study, command: str, name: str, folder: Path, num_steps: int, needs: tuple[Path, ...]
) -> Job:
    return Job(
        name=name,
        arguments=(command, str(recipe_file(study, folder))),
        path=folder,
        log=study.out / "logs" / f"{folder.name}.log",
        done=folder / "DONE",
        needs=needs,
        num_steps=num_steps,
    )


def recipe_file(study: Study, folder: Path) -> Path:
    """The recipe file that a process of the study is given, written before it begins."""
    return study.out / "recipes" / f"{folder.name}.toml"


def _cache(study: Study, recipe: Recipe, window: int) -> Item:
    """The cache of a run's teacher, wide enough for its own window and for this one."""
    read = ("student", "teacher", "data", "sampling")
    data = {key: value for key, value in recipe.resolved().items() if key in read}
    fields = corner("sft") | {
        "window.tokens": max(recipe.window.tokens, window),
        "train.seed": recipe.train.seed,
    }
    fields |= {
        "rollouts.end_set": recipe.rollouts.end_set,
        "objective.end_class": recipe.objective.end_class,
    }
    written = make_recipe(with_fields(data, fields))
    folder = study.out / "caches" / f"{_slug(recipe.teacher.model)}-{written.hash()}"
    written = written.model_copy(update={"out": folder})
    job = _job(study, "cache", f"cache of {recipe.teacher.model}", folder, 0, ())
    job = dataclasses.replace(
        job,
        arguments=("cache", "build", str(recipe_file(study, folder)), "--out", str(folder)),
        done=folder.with_name(f"{folder.name}.DONE"),
        marks=True,
    )
    return Item(
        kind="cache", label=job.name, job=job, recipe=written, evaluation=Evaluation(), shown=False
    )


def stage_item(
    study: Study,
    stage: Stage,
    *,
    model: str,
    start: Recipe,
    seed: int,
    origin: str,
    which: str,
    pending: bool = False,
    needs: tuple[Path, ...] = (),
) -> Item:
    """A stage's run from a model that is called `origin`, on the prompts and with the evaluation of
    the recipe `start`."""
    before = start.resolved()
    fields = {f"data.{name}": value for name, value in before["data"].items()}
    taken = sorted(DATA_OF_THE_START & fields.keys())
    fields = {name: fields[name] for name in taken if fields[name] != []}
    fields |= _seeds(start.data.origin, seed)
    # The rates of a shipped recipe are for models of its kind: those that this one began with.
    first = start.student.model if needs else model
    data = read_recipe(stage.recipe, stage.fields | fields | {"student.model": first})
    for name in DATA_OF_THE_START - fields.keys():
        data["data"].pop(name.partition(".")[2], None)
    data = with_fields(data, {"student.model": model, "evaluation": before.get("evaluation", {})})
    recipe = make_recipe(data, "then")
    label = ", ".join([f"{recipe.method} from {origin}", *([stage.label] if stage.label else [])])
    return _run_item(study, recipe, label, which, pending, needs)


def _run_item(
    study: Study, recipe: Recipe, label: str, which: str, pending: bool, needs: tuple[Path, ...]
) -> Item:
    """A run in the folder of its own that its recipe names."""
    folder = study.out / "runs" / f"{_slug(recipe.method)}-{recipe.hash()}"
    recipe = recipe.model_copy(update={"out": folder})
    return Item(
        kind="train",
        label=label,
        job=_job(study, "train", label + which, folder, recipe.train.steps, needs),
        recipe=recipe,
        evaluation=recipe.evaluation,
        pending=pending,
    )


def evaluation_item(
    study: Study,
    name: str,
    model: str,
    recipe: Recipe,
    settings: Evaluation,
    pending: bool = False,
    needs: tuple[Path, ...] = (),
) -> Item:
    """An evaluation of a model that is no run of its own, to a file named by model and settings."""
    plain = settings.model_dump(mode="json", exclude_none=True)
    identity = json_digest([model, plain])
    file = study.out / "evaluations" / f"{_slug(name)}-{identity}.json"
    # A folder of its own: two evaluations of equal weights would write one file at the same time.
    responses = study.out / "responses" / file.stem
    arguments = (
        "evaluate",
        model,
        "--out",
        str(file),
        "--responses",
        str(responses),
        *_flags(plain),
    )
    log = study.out / "logs" / f"{file.stem}.log"
    job = Job(name=name, arguments=arguments, path=file, log=log, done=file, needs=needs)
    return Item(
        kind="evaluate", label=name, job=job, recipe=recipe, evaluation=settings, pending=pending
    )


def _flags(settings: dict[str, Any]) -> list[str]:
    """The settings of an evaluation as `potstill evaluate` takes them."""
    words: list[str] = []
    for field, value in settings.items():
        name = f"--{field.replace('_', '-')}"
        if isinstance(value, dict):
            words += [f"{name}.{key}={toml_value(inner)}" for key, inner in value.items()]
        elif value not in ((), []):
            words += [name, *map(str, value if isinstance(value, list) else [value])]
    return words
