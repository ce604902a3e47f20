"""The numbers of runs and models on the terminal: one short table in 100 columns; details are the
report's."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.console.printable import WIDTH, one_line, say
from potstill.report.metrics import metrics_of, stored
from potstill.report.page import RESULTS_FILE
from potstill.report.tables import settings_note, settings_warning
from potstill.runs.results import Entry

GAP = "  "
# Longer names are cut: what is cut off them stands in the report.
MODEL_WIDTH = 40
# Runs that are shown where none is of a corner of the grid.
NUM_SHOWN_RUNS = 6
LINE_TITLES = {
    "entropy": "Entropy (nats)",
    "length": "Length (tokens)",
    "truncation": "Truncated (%)",
}


@dataclass(frozen=True)
class ShownQuantity:
    """A column of the table, or a line below it; its numbers are shown times `scale`."""

    title: str
    scale: float
    digits: int


# The value of a quantity and the ends of its interval, by the quantity's key.
Numbers = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class ModelRow:
    """A model's numbers, and those of what it began as where that is in the table."""

    name: str
    numbers: Numbers
    before: Numbers | None = None


def print_table(entries: Sequence[Entry]) -> None:
    """Print evaluated models and runs as they were given."""
    if not any(entry.evals for entry in entries):
        say("No evaluation was found.")
        return
    metrics = metrics_of(entries)
    rows = []
    for entry in entries:
        found = {metric.key: stored(entry, metric) for metric in metrics}
        rows.append(
            ModelRow(
                entry.name, {key: number for key, number in found.items() if number is not None}
            )
        )
    quantities = {
        metric.key: ShownQuantity(metric.title, metric.scale, metric.digits) for metric in metrics
    }
    say(*_wrapped(f"{settings_note(entries)}."), *_table(rows, quantities))
    for key in LINE_TITLES:
        say(*_line(rows, quantities, key))
    say(_legend(rows))
    for warning in settings_warning(entries):
        say(*_wrapped(warning))


def print_summary(page: Path) -> None:
    """Print each panel of a report: its models, the corners of the grid, and what they began as."""
    for panel in json.loads((page.parent / RESULTS_FILE).read_text())["panels"]:
        quantities = {
            key: ShownQuantity(metric["title"], metric["scale"], metric["digits"])
            for key, metric in panel["metrics"].items()
        }
        if not _accuracies(quantities):
            say("None of these runs was evaluated on a task; their curves are on the page.", "")
            continue
        rows = rows_of(panel["groups"])
        say(*_wrapped(": ".join(text for text in (panel["title"], panel["note"]) if text)))
        say(*_table(rows, quantities), *_line(rows, quantities, "entropy"), _legend(rows))
        num_more = len(panel["groups"]) - len(rows)
        say(*([f"The report also has {num_more} more of this panel."] if num_more else []), "")


def rows_of(groups: Sequence[dict[str, Any]]) -> list[ModelRow]:
    """The groups of a panel of `results.json` that are shown: its models, and the first run of each
    corner.

    Where no run is of a corner, the first few are shown.
    """
    numbers = {
        group["label"]: {
            key: (found["value"], found["low"], found["high"])
            for key, found in group["metrics"].items()
        }
        for group in groups
    }
    trained = [group for group in groups if not group["is_model"]]
    corners: dict[str, str] = {}
    for group in trained:
        if group["corner"] is not None:
            corners.setdefault(group["corner"], group["label"])
    shown = list(corners.values()) or [group["label"] for group in trained[:NUM_SHOWN_RUNS]]
    return [
        ModelRow(group["label"], numbers[group["label"]], numbers.get(group["start"]))
        for group in groups
        if group["is_model"] or group["label"] in shown
    ]


def _table(rows: Sequence[ModelRow], quantities: Mapping[str, ShownQuantity]) -> list[str]:
    """Header and rows of the accuracies, in as many parts below each other as their width takes."""
    names = [_cut(row.name) for row in rows]
    columns = []
    for key in _accuracies(quantities):
        cells = [_cell(row, key, quantities[key]) for row in rows]
        width = max(map(len, [quantities[key].title, *cells]))
        columns.append([cell.ljust(width) for cell in [quantities[key].title, *cells]])
    if not columns:
        return []
    margin = max(map(len, names))
    widest = max(len(column[0]) for column in columns)
    num_beside = max(1, (WIDTH - margin) // (widest + len(GAP)))
    lines = []
    for part in range(math.ceil(len(columns) / num_beside)):
        beside = columns[part * num_beside : (part + 1) * num_beside]
        for name, *cells in zip(["", *names], *beside, strict=True):
            lines.append(GAP.join([name.ljust(margin), *cells]).rstrip())
    return lines


def _legend(rows: Sequence[ModelRow]) -> str:
    """A line that says what the numbers of the table are."""
    began = "; before -> after" if any(row.before is not None for row in rows) else ""
    return (
        "Avg: right answers; Pass@k: problems that one of k solves; % ± half a 95 % "
        f"interval{began}"
    )


def _accuracies(quantities: Mapping[str, ShownQuantity]) -> list[str]:
    """Avg at each temperature, and Pass with the smaller k."""
    avgs = [key for key in quantities if key.startswith("avg-")]
    return avgs + [key for key in quantities if key.startswith("pass")][:1]


def _cell(row: ModelRow, key: str, quantity: ShownQuantity) -> str:
    if key not in row.numbers:
        return ""
    value, low, high = (*row.numbers[key], None, None)[:3]
    text = _shown(value, quantity)
    if low is not None and high is not None:
        text += f" ±{_shown((high - low) / 2, quantity)}"
    if row.before is not None and key in row.before:
        text = f"{_shown(row.before[key][0], quantity)} -> {text}"
    return text


def _shown(value: float | None, quantity: ShownQuantity) -> str:
    return "none" if value is None else f"{quantity.scale * value:,.{quantity.digits}f}"


def _line(rows: Sequence[ModelRow], quantities: Mapping[str, ShownQuantity], key: str) -> list[str]:
    """One quantity of all rows in a sentence, folded where it is long; nothing where no row has
    it."""
    found = [
        f"{_cut(row.name)} {_shown(row.numbers[key][0], quantities[key])}"
        for row in rows
        if key in row.numbers
    ]
    return _wrapped(f"{LINE_TITLES[key]}: {', '.join(found)}") if found else []


def _cut(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= MODEL_WIDTH else f"{name[: MODEL_WIDTH - 3]}..."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(one_line(text), WIDTH, break_on_hyphens=False)
