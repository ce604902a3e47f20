"""A list of the runs in a folder: how far each is, its last numbers, and where it stands."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from potstill.config import (
    HIGHER_IS_BETTER,
    Goal,
    Recipe,
    RecipeError,
    load_recipe,
)
from potstill.runs.results import PLAN_FILE, newest_evals, read_plan
from potstill.runs.run_folder import (
    STEP_LOGS,
    RunError,
    is_in_use,
    is_trained,
    read_metrics,
    read_validations,
)
from potstill.runs.schema import MetricsRow, quantity_in

RunState = Literal["finished", "running", "stopped", "failed", "unreadable"]


class BestValidation(NamedTuple):
    """The best validation of a run that keeps its student: by which quantity, after which step."""

    quantity: Goal
    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """A run folder in a list.

    `step` of `num_steps` is the last one that was done; `avgs` are shares of right answers by
    temperature; `seconds` are those of all steps. Of an unreadable run only the folder and what is
    wrong (`trouble`) are known. `trouble` of a failed one is the last line that it printed.
    """

    folder: Path
    state: RunState
    method: str | None = None
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    avgs: tuple[tuple[float, float], ...] = ()
    best: BestValidation | None = None
    seconds: float = 0.0
    trouble: str | None = None

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def list_runs(folder: Path) -> list[ListedRun]:
    """The runs in a folder and in the folders below it, by their paths; the folder itself may be
    one.

    Raises RunError where there is none.
    """
    if not folder.is_dir():
        raise RunError(
            f"folder {str(folder)!r} {'is a file' if folder.exists() else 'does not exist'}; "
            "give a folder"
        )
    crashed: dict[Path, str] = {}
    runs: list[ListedRun] = []
    for path in _folders(folder):
        if (path / PLAN_FILE).is_file():
            crashed |= _crashed(path)
        if (path / "recipe.toml").exists():
            runs.append(_listed(path))
    if not runs:
        raise RunError(
            f"folder {str(folder)!r} has no runs in it; give one with run folders, such as that "
            "of a recipe's `out`"
        )
    return [_with_crash(run, crashed.get(run.folder)) for run in runs]


def _folders(folder: Path) -> Iterator[Path]:
    """A folder and those below it, in order of their paths; not those inside of a run, and no
    hidden ones.

    Raises OSError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    for parent, names, files in os.walk(folder, onerror=refuse):
        names[:] = (
            []
            if "recipe.toml" in files
            else sorted(name for name in names if not name.startswith("."))
        )
        yield Path(parent)


def _crashed(study: Path) -> dict[Path, str]:
    """The last lines of the runs of a study that crashed, by their folders; none where its plan
    cannot be read."""
    try:
        planned = [run for panel in read_plan(study) for run in panel["runs"]]
    except RunError:
        return {}
    return {
        study / run["folder"]: run["state"].removeprefix("crashed: ")
        for run in planned
        if run["state"].startswith("crashed")
    }


def _with_crash(run: ListedRun, crash: str | None) -> ListedRun:
    return (
        run
        if crash is None or run.state != "stopped"
        else replace(run, state="failed", trouble=crash)
    )


def _listed(folder: Path) -> ListedRun:
    try:
        recipe = load_recipe(folder / "recipe.toml")
        rows = read_metrics(folder, STEP_LOGS["metrics.jsonl"])
        return _described(folder, recipe, rows)
    except (RunError, RecipeError) as error:
        return ListedRun(folder=folder, state="unreadable", trouble=str(error))


def _described(folder: Path, recipe: Recipe, rows: list[MetricsRow]) -> ListedRun:
    path = folder / "metrics.jsonl"
    step = rows[-1]["step"] if rows else 0
    evals = newest_evals(folder, step)
    evals_path = folder / "evals.jsonl"
    avgs = [
        (_number(row["temperature"], evals_path), _value(row["avg"], evals_path)) for row in evals
    ]
    state: RunState = "finished" if is_trained(folder, recipe) else "stopped"
    return ListedRun(
        folder=folder,
        state="running" if is_in_use(folder) else state,
        method=recipe.method,
        step=int(_number(step, path)),
        num_steps=recipe.train.steps,
        loss=_number(rows[-1]["loss"], path) if rows and "loss" in rows[-1] else None,
        avgs=tuple(avgs),
        best=_best(folder, recipe),
        seconds=math.fsum(_number(row["seconds"], path) for row in rows),
    )


def _best(folder: Path, recipe: Recipe) -> BestValidation | None:
    """The validation whose student the run keeps; None without one."""
    goal, path = recipe.validation.keep_best, folder / "validation.jsonl"
    if goal is None:
        return None
    rows = read_validations(folder, ("step", goal))
    found = [
        BestValidation(goal, int(_number(row["step"], path)), _value(quantity_in(row, goal), path))
        for row in rows
    ]
    sign = 1 if goal in HIGHER_IS_BETTER else -1
    # The run keeps the first of equal ones, too.
    return max(found, key=lambda each: sign * each.value, default=None)


def _value(found: Any, path: Path) -> float:
    """A value that stands with its interval."""
    return _number(found[0] if isinstance(found, list) and found else found, path)


def _number(found: Any, path: Path) -> float:
    if not isinstance(found, int | float):
        raise RunError(f"{str(path)!r} has {found!r:.60} where a number belongs; restore it")
    return found
