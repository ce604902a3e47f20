"""Contents of run folders, evaluation files and study folders, for whoever compares them. Needs no
torch."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from potstill.config import METHODS, Recipe, Role, Selection, load_recipe
from potstill.runs.results_schema import EVAL_COLUMNS, EvalRow, PlanPanel, RunEvalRow
from potstill.runs.run_folder import (
    REPAIRS,
    STEP_LOGS,
    RunError,
    check_keys,
    is_trained,
    last_row,
    read_evals,
    read_json,
    read_json_list,
    read_metrics,
    read_rows,
    read_validations,
    resume_command,
)
from potstill.runs.schema import MetricsRow, SampleRow, ValidationRow, WindowRow, value_in

# The list of what a study's folder consists of, written before the first run.
PLAN_FILE = "plan.json"
# Keys of each run in that plan.
RUN_KEYS = ("folder", "name", "state")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished run, or an evaluated model without one.

    `evals` has one row a temperature (`EvalRow` says what is in it), `decisions`
    what the length gate did, `validations` a row for each validation of the student as it learnt.
    """

    name: str
    path: Path
    evals: Sequence[EvalRow]
    recipe: Recipe | None = None
    metrics: tuple[MetricsRow, ...] = ()
    samples: tuple[SampleRow, ...] = ()
    decisions: tuple[WindowRow, ...] = ()
    validations: tuple[ValidationRow, ...] = ()

    @property
    def cell(self) -> str | None:
        """The key of the grid's corner that this run is in; none of a run with a reward, or
        on an older student's prefixes."""
        recipe = self.recipe
        if recipe is None or recipe.objective.signal != "full" or not recipe.reward.is_off:
            return None
        if recipe.has_older_prefixes:
            return None
        here = (recipe.objective.prefix, recipe.objective.kl)
        return next(
            (key for key, method in METHODS.items() if here == (method.prefix, method.kl)), None
        )

    @property
    def is_rewarded(self) -> bool:
        """Whether this run learnt from scores, beside a teacher or alone."""
        return self.recipe is not None and self.recipe.reward.weight > 0

    @property
    def start(self) -> Path | None:
        """The run folder or model that it started from; beside this one, where both have been
        moved."""
        if self.recipe is None:
            return None
        named = Path(self.recipe.student.model)
        beside = self.path.parent / named.name
        return beside if not named.exists() and beside.exists() else named

    @property
    def num_loss_tokens(self) -> int | None:
        return int(sum(value_in(row, "num_loss_tokens") or 0 for row in self.metrics)) or None

    @property
    def seconds(self) -> float | None:
        return sum(row["seconds"] for row in self.metrics) or None

    @property
    def flops(self) -> float | None:
        """Operations of training, where they were counted."""
        return value_in(self.metrics[-1], "total_flops") if self.metrics else None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Entries that can be compared with each other: one task, one pair of models.

    The runs of a sweep decide what the others do and are compared with nothing else. `unfinished`
    are runs that belong here and have no result, each with its folder and what is known of it.
    """

    title: str
    entries: tuple[Entry, ...]
    note: str = ""
    unfinished: tuple[tuple[Path, str], ...] = ()
    is_sweep: bool = False


def read_entry(path: Path) -> Entry:
    """A finished run folder, or a JSON file that `potstill evaluate --out` wrote. Raises
    RunError."""
    if path.is_file():
        found = cast(list[EvalRow], read_json_list(path, EVAL_COLUMNS))
        return Entry(name=found[0]["model"].removeprefix("potstill:"), path=path, evals=found)
    if not (path / "recipe.toml").exists():
        raise RunError(
            f"{str(path)!r} is no run folder, study folder or evaluation file; "
            "`potstill runs FOLDER` lists the runs in a folder"
        )
    recipe = load_recipe(path / "recipe.toml")
    if not is_trained(path, recipe):
        raise RunError(f"run {str(path)!r} is not finished; `{resume_command(path)}` resumes it")
    metrics = tuple(read_metrics(path, STEP_LOGS["metrics.jsonl"]))
    samples, decisions = (
        read_rows(path / name, STEP_LOGS[name]) for name in ("samples.jsonl", "window.jsonl")
    )
    evals = newest_evals(path, metrics[-1]["step"] if metrics else last_row(path)["step"])
    return Entry(
        name=recipe.method,
        path=path,
        evals=evals,
        recipe=recipe,
        metrics=metrics,
        samples=tuple(cast(list[SampleRow], samples)),
        decisions=tuple(cast(list[WindowRow], decisions)),
        validations=tuple(read_validations(path, STEP_LOGS["validation.jsonl"])),
    )


def newest_evals(folder: Path, step: int) -> list[RunEvalRow]:
    """The newest evaluation at each temperature of a run's student as it is now, after so many
    steps.

    Those of a student that the run has gone on from do not count. Raises RunError.
    """
    rows = read_evals(folder, ("step", *EVAL_COLUMNS))
    return list({row["temperature"]: row for row in rows if row["step"] == step}.values())


def read_panels(paths: list[Path]) -> list[Panel]:
    """The panels of each study folder, and one panel of all other runs and evaluation files. Raises
    RunError."""
    panels = [panel for path in paths if (path / PLAN_FILE).exists() for panel in read_study(path)]
    others = tuple(read_entry(path) for path in paths if not (path / PLAN_FILE).exists())
    return [*panels, *([Panel(title="", entries=others)] if others else [])]


def read_plan(folder: Path) -> list[PlanPanel]:
    """The panels of a study's plan. Raises RunError where the file is damaged."""
    path = folder / PLAN_FILE
    panels = read_json(path, ("panels",))["panels"]
    for panel in _listed(panels, path):
        check_keys(panel, path, ("title", "note", "is_sweep", "runs"), ", a panel")
        for run in _listed(panel["runs"], path):
            check_keys(run, path, RUN_KEYS, ", a run")
            if not all(isinstance(run[key], str) for key in RUN_KEYS):
                raise RunError(
                    f"{str(path)!r} has a run of {run}, which is not three texts; "
                    f"{REPAIRS[PLAN_FILE]}"
                )
    return cast(list[PlanPanel], panels)


def _listed(found: Any, path: Path) -> list[Any]:
    if not isinstance(found, list):
        raise RunError(f"{str(path)!r} has {found!r:.60} in place of a list; {REPAIRS[PLAN_FILE]}")
    return found


def read_study(folder: Path) -> list[Panel]:
    """The panels of a study as far as it has come."""
    panels = []
    for planned in read_plan(folder):
        entries, unfinished = [], []
        for run in planned["runs"]:
            path = folder / run["folder"]
            try:
                entry = read_entry(path)
            except RunError as error:
                is_begun = path.exists() and not run["state"].startswith("crashed")
                is_damaged = (path / "DONE").exists() or path.is_file()
                state = "unfinished" if is_begun else run["state"]
                unfinished.append((path, str(error) if is_damaged else state))
                continue
            entries.append(replace(entry, name=run["name"]))
        panel = Panel(
            title=planned["title"],
            entries=tuple(entries),
            note=planned["note"],
            unfinished=tuple(unfinished),
            is_sweep=planned["is_sweep"],
        )
        panels.append(panel)
    return panels


def recipe_key(entry: Entry, ignore: Selection) -> str:
    """The resolved recipe as JSON, without `out` and without what is ignored: equal iff runs match.

    Of a teacher's cache it says only that there is one: seeds have caches of their own.
    """
    data = entry.recipe.resolved_without(("out", *ignore)) if entry.recipe is not None else {}
    if "cache" in data.get("teacher", {}):
        data["teacher"]["cache"] = True
    return json.dumps(data, sort_keys=True)


def find_starts(entries: Sequence[Entry]) -> dict[Path, Entry]:
    """For the folder of each run, the run or the model among these that it started from, where
    there is one."""
    known = {
        path.resolve(): entry for entry in entries for path in (entry.path, entry.path / "model")
    }
    models = {
        row["model"]: entry for entry in entries if entry.recipe is None for row in entry.evals
    }
    starts = {}
    for entry in entries:
        if entry.start is not None:
            start = known.get(entry.start.resolve()) or models.get(str(entry.start))
            starts |= {entry.path: start} if start is not None else {}
    return starts


def group_by_seed(entries: Sequence[Entry]) -> list[tuple[Entry, ...]]:
    """Runs whose recipes agree on everything but the seeds; those too that go on from runs which
    differ in seeds alone.

    A model without a run is a group of its own.
    """
    starts = find_starts(entries)
    groups: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        is_model = entry.recipe is None
        key = (str(entry.path),) if is_model else tuple(_seedless_keys(entry, starts))
        groups[key].append(entry)
    return [tuple(group) for group in groups.values()]


def _seedless_keys(entry: Entry, starts: Mapping[Path, Entry]) -> list[str]:
    """The recipes of a run and of those that it goes on from, the last one first, without seeds and
    what follows from them."""
    keys: list[str] = []
    seen: set[Path] = set()
    # Folders that were removed and made again can name each other.
    while entry.path not in seen:
        seen.add(entry.path)
        start = starts.get(entry.path)
        if start is None or start.recipe is None:
            return [*keys, recipe_key(entry, (Role.SEED,))]
        keys.append(recipe_key(entry, (Role.SEED, "student.model")))
        entry = start
    return keys
