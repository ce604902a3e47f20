"""From a study's file to everything that it makes: recipes, folders, processes, and what waits for
what.

A run's folder is named by the hash of its resolved recipe, so that whatever is there with a
matching DONE is that run, whoever made it.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from potstill.config import (
    METHODS,
    NAMED,
    Evaluation,
    GrpoRecipe,
    Recipe,
    RecipeError,
    fields_with,
    make_recipe,
    read_recipe,
    run_evaluation,
    toml_value,
    validate,
    with_fields,
)
from potstill.runs.results import read_entry
from potstill.runs.run_folder import is_done
from potstill.study.file import Group, PanelPlan, Study
from potstill.study.jobs import Job
from potstill.tasks import is_table

# Of a panel: more are a slip in an axis, and would take minutes to plan alone.
MAX_RUNS = 10_000
# A sweep is judged on problems that no other run is evaluated on.
SWEEP_EVALUATION_SEED = 1_000_003


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One distillation of a panel before its seed is set: fields over the base recipe, and what
    follows it."""

    fields: dict[str, Any]
    method: str | None
    details: tuple[str, ...]
    seeds: tuple[int, ...]
    group: Group


def cells(study: Study, panel: PanelPlan) -> list[Cell]:
    """Every combination of every group's axes."""
    found = []
    named = fields_with(*NAMED)
    for group in panel.groups:
        for values in itertools.product(*group.axes.values()):
            chosen = dict(zip(group.axes, values, strict=True))
            method = chosen.pop("method", None)
            fields = study.fields | panel.fields | group.fields | _corner(method) | chosen
            details = [group.label] if group.label else []
            details += [
                _axis_text(field, value) for field, value in chosen.items() if field not in named
            ]
            found.append(
                Cell(
                    fields=fields,
                    method=group.sweep_as or method,
                    details=tuple(details),
                    seeds=group.seeds or study.seeds,
                    group=group,
                )
            )
    return found


def _axis_text(field: str, value: Any) -> str:
    """`window 24` for window.tokens, `teacher small` for a model's path, else the field with its
    value."""
    section, _, name = field.rpartition(".")
    if name in ("model", "tokens"):
        return f"{section} {str(value).rstrip('/').rpartition('/')[2].removeprefix('potstill:')}"
    return f"{field} {value}"


def _corner(method: str | None) -> dict[str, str]:
    if method is None:
        return {}
    if method not in METHODS:
        raise RecipeError(f"method is {method!r} on an axis; choose one of {', '.join(METHODS)}")
    return {"objective.prefix": METHODS[method].prefix, "objective.kl": METHODS[method].kl}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that a study makes: a run, a cache or an evaluation.

    `label` is what the report calls it, the same for all seeds of a run; `pending`: its recipe
    waits for a sweep.
    """

    kind: Literal["train", "grpo", "cache", "evaluate"]
    label: str
    job: Job
    recipe: Recipe | GrpoRecipe
    evaluation: Evaluation
    pending: bool = False
    shown: bool = True

    @property
    def is_done(self) -> bool:
        """Whether it is there, whole and of this recipe."""
        return (
            is_done(self.job.path, self.recipe)
            if self.kind in ("train", "grpo")
            else self.job.done.exists()
        )


@dataclass(frozen=True, kw_only=True)
class PlannedPanel:
    """What one panel of the report will be made of."""

    title: str
    note: str
    items: tuple[Item, ...]
    is_sweep: bool = False


def plan(study: Study, chosen: dict[tuple[str, str], float]) -> list[PlannedPanel]:
    """Everything that the study makes, panel by panel, sweeps last; `chosen` are the sweeps'
    results so far.

    Raises RecipeError for any run that could not begin.
    """
    _refuse_more_than_can_be_run(study)
    panels: list[PlannedPanel] = []

    def add(title: str, note: str, items: Iterator[Item], is_sweep: bool = False) -> None:
        # Several runs can need one cache.
        once = tuple({item.job.path: item for item in items}.values())
        panels.append(PlannedPanel(title=title, note=note, items=once, is_sweep=is_sweep))

    for panel in study.panels:
        add(panel.title, panel.note, _panel_items(study, panel, chosen))
    for panel in study.panels:
        if panel.sweep is not None:
            note = (
                f"{panel.sweep.field} is chosen for each method by Avg on problems of its "
                "own, at one seed."
            )
            add(f"{panel.title}: sweep", note, _sweep_items(study, panel), is_sweep=True)
    return panels


def _refuse_more_than_can_be_run(study: Study) -> None:
    for panel in study.panels:
        sizes = [
            math.prod(map(len, group.axes.values())) * len(group.seeds or study.seeds)
            for group in panel.groups
        ]
        if sum(sizes) > MAX_RUNS:
            raise RecipeError(
                f"panel {panel.title!r} has {sum(sizes):,} runs, more than {MAX_RUNS:,}; give "
                "its axes fewer values"
            )


def _sweep_items(study: Study, panel: PanelPlan) -> Iterator[Item]:
    sweep = panel.sweep
    assert sweep is not None
    for method, value in itertools.product(sweep.methods, sweep.values):
        fields = study.fields | panel.fields | sweep.fields | _corner(method) | {sweep.field: value}
        fields |= {"evaluation.seed": SWEEP_EVALUATION_SEED}
        yield from _run_items(
            study,
            panel,
            fields,
            study.seeds[0],
            [_axis_text(sweep.field, f"{value:g}")],
            "",
            sweep.cache,
        )


def choose(study: Study) -> dict[tuple[str, str], float]:
    """The value of each finished sweep, by panel and method: the best Avg at the highest
    temperature."""
    chosen = {}
    for panel in study.panels:
        if panel.sweep is None:
            continue
        runs = [item for item in _sweep_items(study, panel) if item.kind == "train"]
        for i, method in enumerate(panel.sweep.methods):
            tried = runs[i * len(panel.sweep.values) : (i + 1) * len(panel.sweep.values)]
            if all(item.is_done for item in tried):
                scores = [
                    max(read_entry(item.job.path).evals, key=lambda row: row["temperature"])["avg"]
                    for item in tried
                ]
                best = max(range(len(tried)), key=lambda k: scores[k][0])
                chosen[panel.title, method] = panel.sweep.values[best]
    return chosen


def _panel_items(
    study: Study, panel: PanelPlan, chosen: dict[tuple[str, str], float]
) -> Iterator[Item]:
    base = _recipe(panel, study.fields | panel.fields, study.seeds[0], study.out / "runs/base")
    for model in panel.models:
        yield _evaluation(study, model.removeprefix("potstill:"), model, base, run_evaluation(base))
    for model in panel.grpo_from:
        for seed in study.seeds:
            yield _grpo(
                study,
                model,
                base,
                seed,
                f"GRPO from {model}",
                _seed_text(seed, study.seeds),
                pending=False,
            )
    for cell in cells(study, panel):
        fields, pending = cell.fields, False
        if panel.sweep is not None and cell.method in panel.sweep.methods:
            value = chosen.get((panel.title, cell.method))
            pending = value is None
            fields = fields | {panel.sweep.field: panel.sweep.values[0] if value is None else value}
        for seed in cell.seeds:
            which = _seed_text(seed, cell.seeds)
            made = list(
                _run_items(
                    study, panel, fields, seed, cell.details, which, cell.group.cache, pending
                )
            )
            yield from made
            run = made[-1]
            assert isinstance(run.recipe, Recipe)
            if cell.group.grpo:
                model = str(run.job.path)
                label = f"GRPO from {run.label}"
                yield _grpo(study, model, run.recipe, seed, label, which, pending, (run.job.path,))
            for judgement in cell.group.judgements:
                judged = with_fields(run.recipe.resolved(), _in("evaluation", judgement.fields))
                settings = run_evaluation(make_recipe(judged))
                model, name = str(run.job.path / "model"), f"{run.job.name}, {judgement.label}"
                yield _evaluation(
                    study, name, model, run.recipe, settings, pending, (run.job.path,)
                )


def _recipe(panel: PanelPlan, fields: dict[str, Any], seed: int, out: Path) -> Recipe:
    assert panel.recipe is not None
    data = read_recipe(panel.recipe, fields)
    source = data.get("data", {}).get("source", "multiplication")
    seeds = {"train.seed": seed} | ({} if is_table(source) else {"data.seed": seed})
    return make_recipe(with_fields(data, seeds | {"out": str(out)}), f"panel {panel.title!r}")


def _in(section: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in fields.items()}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:60]


def _run_items(
    study: Study,
    panel: PanelPlan,
    fields: dict[str, Any],
    seed: int,
    details: Sequence[str],
    which: str,
    cached: bool,
    pending: bool = False,
) -> Iterator[Item]:
    """A run, after the cache that it reads if it reads one; `details` and `which` seed follow its
    method's name."""
    recipe = _recipe(panel, fields, seed, study.out)
    needs: tuple[Path, ...] = ()
    if cached and recipe.objective.prefix == "teacher":
        cache = _cache(study, panel, recipe)
        yield cache
        needs = (cache.job.path,)
        recipe = make_recipe(with_fields(recipe.resolved(), {"teacher.cache": str(cache.job.path)}))
    folder = study.out / "runs" / f"{_slug(recipe.method)}-{recipe.hash()}"
    recipe = recipe.model_copy(update={"out": folder})
    label = ", ".join([recipe.method, *details])
    job = _job(study, "train", label + which, folder, recipe.train.steps, needs)
    yield Item(
        kind="train",
        label=label,
        job=job,
        recipe=recipe,
        evaluation=recipe.evaluation,
        pending=pending,
    )


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
    """What a process of the study is given, written before it begins."""
    return study.out / "recipes" / f"{folder.name}.toml"


def _cache(study: Study, panel: PanelPlan, recipe: Recipe) -> Item:
    """The cache of a run's teacher, wide enough for every window of the panel."""
    windows = [
        cell.fields.get("window.tokens", recipe.window.tokens) for cell in cells(study, panel)
    ]
    read = ("student", "teacher", "data", "sampling")
    data = {key: value for key, value in recipe.resolved().items() if key in read}
    fields = _corner("sft") | {
        "window.tokens": max([recipe.window.tokens, *windows]),
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


def _grpo(
    study: Study,
    model: str,
    start: Recipe,
    seed: int,
    label: str,
    which: str,
    pending: bool,
    needs: tuple[Path, ...] = (),
) -> Item:
    fields = {"model": model, "grpo.seed": seed, "data.source": start.data.source}
    fields |= {} if is_table(start.data.source) else {"data.seed": seed}
    # What a shipped recipe says of rates is for models of its kind: those that this one began with.
    first = start.student.model if needs else model
    data = read_recipe(study.grpo.recipe, study.grpo.fields | fields | {"model": first}) | {
        "model": model
    }
    data["evaluation"] = start.resolved().get("evaluation", {})
    recipe = validate(data, "grpo", GrpoRecipe)
    folder = study.out / "runs" / f"grpo-{recipe.hash()}"
    recipe = recipe.model_copy(update={"out": folder})
    job = _job(study, "grpo", label + which, folder, recipe.grpo.steps, needs)
    return Item(
        kind="grpo",
        label=label,
        job=job,
        recipe=recipe,
        evaluation=recipe.evaluation,
        pending=pending,
    )


def _seed_text(seed: int, seeds: Sequence[int]) -> str:
    return f", seed {seed}" if len(seeds) > 1 else ""


def _evaluation(
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
    identity = hashlib.sha256(json.dumps([model, plain], sort_keys=True).encode()).hexdigest()[:16]
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
