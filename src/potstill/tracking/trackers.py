"""Trackers: the numbers of a run's steps in TensorBoard, Weights & Biases or trackio, where its
recipe names one.

Nothing leaves the machine by itself: TensorBoard and trackio write files, and Weights & Biases is
offline unless the user's own WANDB_MODE says otherwise. `tracker.json` in the run folder knows how
far each tracker was told, so that a run that is resumed doubles no step and leaves none out.
"""

import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from potstill.config import Recipe, RecipeError
from potstill.console.printable import error_text
from potstill.files import write_json
from potstill.runs.run_folder import RunError, read_json, read_metrics
from potstill.runs.schema import MetricsRow

TRACKER_FILE = "tracker.json"
# The project of those that have projects, unless the user's own settings name another.
PROJECT = "potstill"
# A row's parts that are no numbers of the training: token names, which can be any text.
LEFT_OUT = ("step", "end_habits")

RowFunction = Callable[[MetricsRow], object]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A tracker that is open: a function that takes numbers by name and a step, and one that ends
    it."""

    send: Callable[[dict[str, float], int], object]
    close: Callable[[], object]


def refuse_missing(tracker: str | None) -> None:
    """Raise RecipeError for a tracker that is not installed."""
    spec = None if tracker is None else find_spec(tracker)
    # Without an origin it is a folder of that name, such as wandb leaves where it was used.
    if tracker is not None and (spec is None or spec.origin is None):
        raise RecipeError(
            f'train.tracker is "{tracker}", which is not installed: pip install {tracker}'
        )


@contextmanager
def tracked(recipe: Recipe) -> Iterator[RowFunction]:
    """A function that tells the recipe's tracker of a step, which knows all steps before.

    For one process, which is in the run folder. Raises RunError where the tracker fails.
    """
    name, folder = recipe.train.tracker, recipe.out
    assert name is not None, "asked for without a tracker"
    path = folder / TRACKER_FILE
    states = read_json(path) if path.exists() else {}
    state = states.setdefault(name, {"id": secrets.token_hex(4), "num_steps": 0})
    with _failing_as_one_line(name):
        opened = OPENERS[name](folder, state["id"], recipe.resolved())

    def tell(row: MetricsRow) -> None:
        if row["step"] <= state["num_steps"]:
            return
        state["num_steps"] = row["step"]
        with _failing_as_one_line(name):
            opened.send(numbers(row), row["step"])
        write_json(path, states)

    try:
        for row in read_metrics(folder):
            tell(row)
        yield tell
    finally:
        with _failing_as_one_line(name):
            opened.close()


def numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a row, those of its parts by names such as `flops/rollout`."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if name in LEFT_OUT:
            continue
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[f"{prefix}{name}"] = value
    return found


@contextmanager
def _failing_as_one_line(name: str) -> Iterator[None]:
    try:
        yield
    # Any error can come from libraries that are not ours: a network, a disk, a version.
    except Exception as error:
        raise RunError(
            f'train.tracker = "{name}" failed: {error_text(error, 300)}; mend that, '
            "or remove train.tracker to go on without"
        ) from error


def _open_tensorboard(folder: Path, run_id: str, settings: dict[str, Any]) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(found: dict[str, float], step: int) -> None:
        for name, value in found.items():
            writer.add_scalar(name, value, step)
        # Else a kill would lose what `tracker.json` says was told.
        writer.flush()

    return Opened(send=send, close=writer.close)


def _open_wandb(folder: Path, run_id: str, settings: dict[str, Any]) -> Opened:
    # It is read when the package is imported.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    run = import_module("wandb").init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        id=run_id,
        resume="allow",
        mode=os.environ.get("WANDB_MODE", "offline"),
        dir=str(folder),
        config=settings,
        settings={"console": "off", "silent": True, "disable_code": True, "disable_git": True},
    )
    return Opened(send=lambda found, step: run.log(found, step=step), close=run.finish)


def _open_trackio(folder: Path, run_id: str, settings: dict[str, Any]) -> Opened:
    trackio = import_module("trackio")
    trackio.init(
        project=PROJECT,
        name=f"{folder.name}-{run_id}",
        resume="allow",
        config=settings,
        embed=False,
    )
    return Opened(send=lambda found, step: trackio.log(found, step=step), close=trackio.finish)


OPENERS: dict[str, Callable[[Path, str, dict[str, Any]], Opened]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
}
