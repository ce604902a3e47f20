"""A study: a grid of runs from one file, each done once, and a report.

`read_study_file` -> `plan` (recipes and jobs) -> `run_jobs`. A run's folder is named by the hash of its
resolved recipe, so that whatever is there with a matching DONE is that run, whoever made it. `plan.json` says what the
study consists of; the report reads it.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from potstill.config import (
    METHODS,
    Evaluation,
    GrpoRecipe,
    Recipe,
    RecipeError,
    RunRecipe,
    Section,
    is_table,
    make_recipe,
    read_recipe,
    to_toml,
    validate,
    with_fields,
)
from potstill.jobs import Job, run_jobs
from potstill.results import PLAN_FILE, read_entry
from potstill.runlog import RunError, is_done, write_atomically

SHIPPED_STUDIES = Path(__file__).parent / "studies"
# What a method's name says already.
NAMED_FIELDS = tuple(
    f"objective.{field}" for field in ("forward_weight", "jsd_weight", "gamma", "student_share", "skew")
)
# A sweep is judged on problems that no other run is evaluated on.
SWEEP_EVALUATION_SEED = 1_000_003


def _flat(value: Any) -> Any:
    """Nested tables as one with dotted names: `train.lr = 1e-3` in TOML is a table in a table."""
    if not isinstance(value, dict):
        return value
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= {f"{key}.{name}": v for name, v in _flat(inner).items()}
        else:
            flat[key] = inner
    return flat


Fields = Annotated[dict[str, Any], BeforeValidator(_flat), Field(default_factory=dict)]
Axes = Annotated[
    dict[str, Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_flat), Field(default_factory=dict)
]
MethodName = Literal["sft", "dagger", "offline-rl", "opd"]


class Judgement(Section):
    """One more evaluation of each run of a group, in other settings."""

    label: str
    """What it is called beside the run's name."""
    fields: Fields
    """Fields of section `evaluation` that differ."""


class Group(Section):
    """Runs that differ in the values of some fields."""

    label: str = ""
    """What its runs are called beside their method."""
    axes: Axes
    """Values of fields of the recipe, every combination of which is a run; `method` sets prefix and KL."""
    fields: Fields
    """Fields that all runs of the group share."""
    seeds: tuple[int, ...] | None = None
    """Instead of the study's."""
    sweep_as: str | None = None
    """Take the swept value of this method; by default that of the axis `method`."""
    cache: bool = False
    """Runs on teacher prefixes read the teacher from a cache, which is built first."""
    grpo: bool = False
    """Go on from each run with the study's GRPO stage."""
    judgements: tuple[Judgement, ...] = ()
    """Other evaluations of each run."""


class Sweep(Section):
    """One field, chosen for each method before methods are compared: by Avg at one seed, on problems of its own."""

    field: str = "train.lr"
    """The field."""
    values: tuple[float, ...] = Field(min_length=1)
    """What is tried."""
    methods: tuple[MethodName, ...] = ("sft", "dagger", "offline-rl", "opd")
    """For which methods."""
    fields: Fields
    """Further fields of the runs that decide."""
    cache: bool = False
    """As for a group."""


class PanelPlan(Section):
    """Runs that can be compared with each other: one task, one pair of models."""

    title: str
    """As the report shows it."""
    note: str = ""
    """What a reader should know of it: that a setting is constructed, say."""
    recipe: str | None = None
    """Base recipe, instead of the study's."""
    fields: Fields
    """Fields of all runs of the panel."""
    models: tuple[str, ...] = ()
    """Models that are evaluated beside the runs."""
    grpo_from: tuple[str, ...] = ()
    """Models that the GRPO stage also starts from."""
    sweep: Sweep | None = None
    """What is chosen before anything is compared."""
    groups: tuple[Group, ...] = Field(min_length=1)
    """The runs."""


class Stage(Section):
    """The GRPO stage of a study."""

    recipe: str = "grpo"
    """Base recipe; start, seeds, folder and evaluation come from the run that it goes on from."""
    fields: Fields
    """Fields over the recipe's."""


class Study(Section):
    """A whole study."""

    out: Path
    """Folder of the study."""
    recipe: str = "demo"
    """Base recipe: a shipped one's name, or a file beside the study's."""
    fields: Fields
    """Fields of all runs, over the recipe's."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Each run is done with each: seeds of the training problems and of sampling. Held-out problems stay the same."""
    grpo: Stage = Stage.model_validate({})
    """Reinforcement learning after distillation, for groups that ask for it."""
    panels: tuple[PanelPlan, ...] = Field(min_length=1)
    """What is compared."""

    @model_validator(mode="after")
    def _titles_differ(self):
        titles = [panel.title for panel in self.panels]
        if twice := next((title for title in titles if titles.count(title) > 1), None):
            raise ValueError(f"two panels have the title {twice!r}; give each its own")
        return self


def read_study_file(study: str | Path) -> Study:
    """A study from a TOML file, or a shipped one by its name. Raises RecipeError with one line.

    Base recipes that are files are found beside the study's own.
    """
    path = Path(study)
    if not path.is_file():
        shipped = sorted(known.stem for known in SHIPPED_STUDIES.glob("*.toml"))
        if str(study) not in shipped:
            raise RecipeError(f"study {str(study)!r} does not exist; give a TOML file or one of {', '.join(shipped)}")
        path = SHIPPED_STUDIES / f"{study}.toml"
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    found = validate(data, str(study), Study)

    def beside(recipe: str) -> str:
        return str(path.parent / recipe) if (path.parent / recipe).is_file() else recipe

    panels = tuple(p.model_copy(update={"recipe": beside(p.recipe or found.recipe)}) for p in found.panels)
    stage = found.grpo.model_copy(update={"recipe": beside(found.grpo.recipe)})
    return found.model_copy(update={"panels": panels, "grpo": stage})


@dataclass(frozen=True)
class Cell:
    """One distillation of a panel before its seed is set: fields over the base recipe, and what follows it."""

    fields: dict[str, Any]
    method: str | None
    details: tuple[str, ...]
    seeds: tuple[int, ...]
    group: Group


def cells(study: Study, panel: PanelPlan) -> list[Cell]:
    """Every combination of every group's axes."""
    found = []
    for group in panel.groups:
        for values in itertools.product(*group.axes.values()):
            chosen = dict(zip(group.axes, values, strict=True))
            method = chosen.pop("method", None)
            fields = study.fields | panel.fields | group.fields | _corner(method) | chosen
            details = [group.label] if group.label else []
            details += [_axis_text(field, value) for field, value in chosen.items() if field not in NAMED_FIELDS]
            found.append(Cell(fields, group.sweep_as or method, tuple(details), group.seeds or study.seeds, group))
    return found


def _axis_text(field: str, value: Any) -> str:
    """`window 24` for window.tokens, `teacher small` for a model's path, else the field with its value."""
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


@dataclass(frozen=True)
class Item:
    """One thing that a study makes: a run, a cache or an evaluation.

    `label` is what the report calls it, the same for all seeds of a run; `pending`: its recipe waits for a sweep.
    """

    kind: Literal["train", "grpo", "cache", "evaluate"]
    label: str
    job: Job
    recipe: RunRecipe
    evaluation: Evaluation
    pending: bool = False
    shown: bool = True

    @property
    def is_done(self) -> bool:
        if isinstance(self.recipe, Recipe | GrpoRecipe) and self.kind in ("train", "grpo"):
            return is_done(self.job.path, self.recipe)
        return self.job.done.exists()


@dataclass(frozen=True)
class PlannedPanel:
    """What one panel of the report will be made of."""

    title: str
    note: str
    items: tuple[Item, ...]
    is_sweep: bool = False


def plan(study: Study, chosen: dict[tuple[str, str], float]) -> list[PlannedPanel]:
    """Everything that the study makes, panel by panel, sweeps last; `chosen` are the sweeps' results so far.

    Raises RecipeError for any run that could not begin.
    """
    panels: list[PlannedPanel] = []

    def add(title: str, note: str, items: Iterator[Item], is_sweep: bool = False) -> None:
        # Several runs can need one cache.
        panels.append(PlannedPanel(title, note, tuple({item.job.path: item for item in items}.values()), is_sweep))

    for panel in study.panels:
        add(panel.title, panel.note, _panel_items(study, panel, chosen))
    for panel in study.panels:
        if panel.sweep is not None:
            note = f"{panel.sweep.field} is chosen for each method by Avg on problems of its own, at one seed."
            add(f"{panel.title}: sweep", note, _sweep_items(study, panel), is_sweep=True)
    return panels


def _sweep_items(study: Study, panel: PanelPlan) -> Iterator[Item]:
    sweep = panel.sweep
    assert sweep is not None
    for method, value in itertools.product(sweep.methods, sweep.values):
        fields = study.fields | panel.fields | sweep.fields | _corner(method) | {sweep.field: value}
        fields |= {"evaluation.seed": SWEEP_EVALUATION_SEED}
        yield from _run_items(
            study, panel, fields, study.seeds[0], [_axis_text(sweep.field, f"{value:g}")], "", sweep.cache
        )


def choose(study: Study) -> dict[tuple[str, str], float]:
    """The value of each finished sweep, by panel and method: the best Avg at the highest temperature."""
    chosen = {}
    for panel in study.panels:
        if panel.sweep is None:
            continue
        runs = [item for item in _sweep_items(study, panel) if item.kind == "train"]
        for i, method in enumerate(panel.sweep.methods):
            tried = runs[i * len(panel.sweep.values) : (i + 1) * len(panel.sweep.values)]
            if all(item.is_done for item in tried):
                scores = [
                    max(read_entry(item.job.path).evals, key=lambda row: row["temperature"])["avg"] for item in tried
                ]
                best = max(range(len(tried)), key=lambda k: scores[k][0])
                chosen[panel.title, method] = panel.sweep.values[best]
    return chosen


def _panel_items(study: Study, panel: PanelPlan, chosen: dict[tuple[str, str], float]) -> Iterator[Item]:
    base = _recipe(panel, study.fields | panel.fields, study.seeds[0], study.out / "runs/base")
    for model in panel.models:
        yield _evaluation(study, model.removeprefix("potstill:"), model, base, base.evaluation)
    for model in panel.grpo_from:
        for seed in study.seeds:
            yield _grpo(study, model, base, seed, f"GRPO from {model}", _seed_text(seed, study.seeds), pending=False)
    for cell in cells(study, panel):
        fields, pending = cell.fields, False
        if panel.sweep is not None and cell.method in panel.sweep.methods:
            value = chosen.get((panel.title, cell.method))
            pending = value is None
            fields = fields | {panel.sweep.field: panel.sweep.values[0] if value is None else value}
        for seed in cell.seeds:
            which = _seed_text(seed, cell.seeds)
            made = list(_run_items(study, panel, fields, seed, cell.details, which, cell.group.cache, pending))
            yield from made
            run = made[-1]
            assert isinstance(run.recipe, Recipe)
            if cell.group.grpo:
                model = str(run.job.path)
                label = f"GRPO from {run.label}"
                yield _grpo(study, model, run.recipe, seed, label, which, pending, (run.job.path,))
            for judgement in cell.group.judgements:
                settings = make_recipe(
                    with_fields(run.recipe.resolved(), _in("evaluation", judgement.fields))
                ).evaluation
                model, name = str(run.job.path / "model"), f"{run.job.name}, {judgement.label}"
                yield _evaluation(study, name, model, run.recipe, settings, pending, (run.job.path,))


def _recipe(panel: PanelPlan, fields: dict[str, Any], seed: int, out: Path) -> Recipe:
    assert panel.recipe is not None
    data = with_fields(read_recipe(panel.recipe), fields)
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
    """A run, after the cache that it reads if it reads one; `details` and `which` seed follow its method's name."""
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
    yield Item("train", label, job, recipe, recipe.evaluation, pending)


def _job(study: Study, command: str, name: str, folder: Path, num_steps: int, needs: tuple[Path, ...]) -> Job:
    arguments, log = (command, str(_recipe_file(study, folder))), study.out / "logs" / f"{folder.name}.log"
    return Job(name, arguments, folder, log, folder / "DONE", needs=needs, num_steps=num_steps)


def _recipe_file(study: Study, folder: Path) -> Path:
    return study.out / "recipes" / f"{folder.name}.toml"


def _cache(study: Study, panel: PanelPlan, recipe: Recipe) -> Item:
    """The cache of a run's teacher, wide enough for every window of the panel."""
    windows = [cell.fields.get("window.tokens", recipe.window.tokens) for cell in cells(study, panel)]
    read = ("student", "teacher", "data", "sampling")
    data = {key: value for key, value in recipe.resolved().items() if key in read}
    fields = _corner("sft") | {"window.tokens": max([recipe.window.tokens, *windows]), "train.seed": recipe.train.seed}
    fields |= {"rollouts.end_set": recipe.rollouts.end_set, "objective.end_class": recipe.objective.end_class}
    written = make_recipe(with_fields(data, fields))
    folder = study.out / "caches" / f"{_slug(recipe.teacher.model)}-{written.hash()}"
    written = written.model_copy(update={"out": folder})
    job = _job(study, "cache", f"cache of {recipe.teacher.model}", folder, 0, ())
    job = dataclasses.replace(
        job,
        arguments=("cache", "build", str(_recipe_file(study, folder)), "--out", str(folder)),
        done=folder.with_name(f"{folder.name}.DONE"),
        marks=True,
    )
    return Item("cache", job.name, job, written, Evaluation(), shown=False)


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
    data = with_fields(read_recipe(study.grpo.recipe), study.grpo.fields | fields)
    data["evaluation"] = start.resolved().get("evaluation", {})
    recipe = validate(data, "grpo", GrpoRecipe)
    folder = study.out / "runs" / f"grpo-{recipe.hash()}"
    recipe = recipe.model_copy(update={"out": folder})
    job = _job(study, "grpo", label + which, folder, recipe.grpo.steps, needs)
    return Item("grpo", label, job, recipe, recipe.evaluation, pending)


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
    flags = []
    for field, value in plain.items():
        if value != () and value != []:
            flags += [f"--{field.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    arguments = ("evaluate", model, "--out", str(file), "--responses", str(study.out / "responses"), *flags)
    log = study.out / "logs" / f"{file.stem}.log"
    return Item("evaluate", name, Job(name, arguments, file, log, file, needs=needs), recipe, settings, pending)


def run_study(
    study: Study,
    num_jobs: int | None = None,
    dry_run: bool = False,
) -> bool:
    """Do what is missing of a study, sweeps first; returns whether nothing crashed.

    Prints the plan with estimated time and disk before it begins, and asks nothing. What crashed in an earlier call is
    done again. Raises RecipeError or RunError before any work when a run could not begin.
    """
    from filelock import FileLock, Timeout

    if num_jobs is not None and num_jobs < 1:
        raise RecipeError(f"--jobs is {num_jobs}; it must be at least 1")
    num_parallel, one_thread = _processes(num_jobs)
    states = _last_states(study)
    panels = plan(study, choose(study))
    _check_models(study, panels)
    print_plan(study, panels, states, num_parallel, one_thread, list_all=dry_run)
    if dry_run:
        return True
    study.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(study.out / ".lock", timeout=0):
            crashed = _run_stage(study, [panel for panel in panels if panel.is_sweep], panels, num_parallel, one_thread)
            panels = plan(study, choose(study))
            for (title, method), value in choose(study).items():
                print(f"{title}: {METHODS[method].name} goes on with {value:g}")
            others = [panel for panel in panels if not panel.is_sweep]
            crashed += _run_stage(study, others, panels, num_parallel, one_thread)
    except Timeout:
        raise RunError(f"study {str(study.out)!r} is being run by another process; wait for it or stop it") from None
    for item, message in crashed:
        print(f"CRASHED {item.job.name}: {message} ({item.job.log})", file=sys.stderr)
    return not crashed


def _check_models(study: Study, panels: Sequence[PlannedPanel]) -> None:
    """Raise ModelError for a model that can be nowhere, but for those that the study itself makes."""
    from potstill.models import locate

    names: set[str] = set()
    for item in (item for panel in panels for item in panel.items):
        if isinstance(item.recipe, Recipe):
            names |= {item.recipe.student.model, item.recipe.teacher.model} - {"self"}
        if item.kind in ("grpo", "evaluate"):
            names.add(item.recipe.model if isinstance(item.recipe, GrpoRecipe) else item.job.arguments[1])
    for name in sorted(names):
        if not Path(name).is_relative_to(study.out):
            locate(name)


def _processes(num_jobs: int | None) -> tuple[int, bool]:
    """How many processes, and whether each is to compute with one thread: where they share the cores of a CPU."""
    import torch

    has_gpu = torch.cuda.is_available()
    num_parallel = num_jobs or (1 if has_gpu else os.cpu_count() or 1)
    return num_parallel, num_parallel > 1 and not has_gpu


def _run_stage(
    study: Study, stage: Sequence[PlannedPanel], panels: Sequence[PlannedPanel], num_parallel: int, one_thread: bool
) -> list[tuple[Item, str]]:
    """Run what is missing of some panels. Returns what crashed."""
    # The same run can be in several panels.
    items = {item.job.path: item for panel in stage for item in panel.items if not (item.is_done or item.pending)}
    states = _last_states(study)
    for item in items.values():
        if item.kind != "evaluate":
            file = _recipe_file(study, item.job.path)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, to_toml(item.recipe.resolved()))
        states.pop(str(item.job.path.relative_to(study.out)), None)
    _write_plan(study, panels, states)
    crashed = []

    def on_end(job: Job, message: str | None) -> None:
        if message is not None:
            crashed.append((items[job.path], message))
            states[str(job.path.relative_to(study.out))] = f"crashed: {message}"
            _write_plan(study, panels, states)

    # What others wait for first, then the longest, so that the processes end together.
    needed = {path for item in items.values() for path in item.job.needs}
    order = sorted(items.values(), key=lambda item: (item.job.path not in needed, -item.job.num_steps))
    run_jobs([item.job for item in order], num_parallel, one_thread, on_end)
    return crashed


def _last_states(study: Study) -> dict[str, str]:
    """What is known of runs that crashed."""
    file = study.out / PLAN_FILE
    if not file.exists():
        return {}
    runs = [run for panel in json.loads(file.read_text())["panels"] for run in panel["runs"]]
    return {run["folder"]: run["state"] for run in runs if run["state"].startswith("crashed")}


def state_of(item: Item, study: Study, states: dict[str, str]) -> str:
    """done, crashed (with its last line), unfinished, not begun, or waits for the sweep."""
    if item.pending:
        return "waits for the sweep"
    if item.is_done:
        return "done"
    crashed = states.get(str(item.job.path.relative_to(study.out)))
    return crashed or ("unfinished" if item.job.path.exists() else "not begun")


def _write_plan(study: Study, panels: Sequence[PlannedPanel], states: dict[str, str]) -> None:
    """What the report reads: panels with their runs and what is known of those that are not done."""
    planned = [
        {
            "title": panel.title,
            "note": panel.note,
            "is_sweep": panel.is_sweep,
            "runs": [
                {
                    "folder": str(item.job.path.relative_to(study.out)),
                    "name": item.label,
                    "state": state_of(item, study, states),
                }
                for item in panel.items
                if item.shown and not item.pending
            ],
        }
        for panel in panels
    ]
    write_atomically(study.out / PLAN_FILE, json.dumps({"panels": planned}, indent=1) + "\n")


def print_plan(
    study: Study,
    panels: Sequence[PlannedPanel],
    states: dict[str, str],
    num_parallel: int,
    one_thread: bool,
    list_all: bool,
) -> None:
    """What there is to do, panel by panel (`list_all`: run by run), and about how long and how large it is."""
    from rich.console import Console
    from rich.table import Table

    from potstill.estimates import estimate

    items = list({item.job.path: item for panel in panels for item in panel.items}.values())
    costs = estimate(items, one_thread)
    table = Table(title=f"{study.out}", title_justify="left")
    for column in ("panel", "distil", "GRPO", "evaluate", "cache", "done", "crashed", "to do"):
        table.add_column(column, justify="left" if column == "panel" else "right", min_width=len(column))
    for panel in panels:
        found = [state_of(item, study, states) for item in panel.items]
        num_done, num_crashed = found.count("done"), sum(state.startswith("crashed") for state in found)
        kinds = [str(sum(i.kind == kind for i in panel.items)) for kind in ("train", "grpo", "evaluate", "cache")]
        table.add_row(panel.title, *kinds, str(num_done), str(num_crashed), str(len(found) - num_done))
    console = Console(soft_wrap=True)
    console.print(table)
    for item in items if list_all else [item for item in items if state_of(item, study, states).startswith("crashed")]:
        place = "" if item.pending else f" ({item.job.path})"
        console.print(f"{item.job.name}: {state_of(item, study, states)}{place}", markup=False, highlight=False)
    known = [cost for cost in costs.values() if cost is not None]
    if not costs:
        print("nothing is left to do")
        return
    minutes = sum(cost.seconds for cost in known) / num_parallel / 60
    megabytes = sum(cost.num_bytes for cost in known) / 1e6
    print(
        f"{len(costs)} to do, {num_parallel} at a time: about {minutes:.0f} minutes and {megabytes:.0f} MB for "
        f"{len(known)} of them (from finished runs and trials of two steps)"
    )
    if len(known) < len(costs):
        print(f"what the other {len(costs) - len(known)} take is known when the first of their kind is done")
