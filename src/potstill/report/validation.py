"""Validations of runs for the report and the terminal: curves with their intervals, and a table."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.report.figures import GREY, Figure, Link, Styles, axis, layout, line_of, rounded
from potstill.runs.quantities import SHOWN
from potstill.runs.results import Entry
from potstill.runs.schema import Quality, quantity_in


def validation_curves(
    runs: Sequence[Entry],
    labels: dict[Path, str],
    styles: Styles,
    visible: set[Path],
    link: Link,
) -> list[Figure]:
    """A figure a quantity that some run has validated, with 95 % intervals over prompts."""
    known = [name for name in SHOWN if any(name in row for run in runs for row in run.validations)]
    return [_curve(name, runs, labels, styles, visible, link) for name in known]


def _curve(
    name: str,
    runs: Sequence[Entry],
    labels: dict[Path, str],
    styles: Styles,
    visible: set[Path],
    link: Link,
) -> Figure:
    shown, lines = SHOWN[name], []
    for run in runs:
        known = [(row["step"], quantity_in(row, name)) for row in run.validations]
        points = [(step, found) for step, found in known if found is not None]
        estimates = [[shown.scale * end for end in found] for _, found in points]
        lines.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [step for step, _ in points],
                "y": [rounded(value) for value, _, _ in estimates],
                "error_y": {
                    "type": "data",
                    "array": [rounded(high - value) for value, _, high in estimates],
                    "arrayminus": [rounded(value - low) for value, low, _ in estimates],
                    "thickness": 1,
                    "width": 2,
                    "color": GREY,
                },
                "name": html.escape(labels[run.path]),
                "line": line_of(styles[run.path]),
                "marker": {"size": 6, "symbol": styles[run.path].symbol},
                "visible": run.path in visible,
                "meta": link(run.path),
                "hovertemplate": "%{y:.4~g} after step %{x}<br>%{fullData.name}<extra></extra>",
            }
        )
    return layout(lines, 280, axis("step"), axis(""), shown.title)


def validation_table(entries: Sequence[Entry]) -> tuple[list[str], list[tuple[Entry, list[str]]]]:
    """Header and rows of each run's last validation: value and interval of what some run knows."""
    validated = [entry for entry in entries if entry.validations]
    known = [name for name in SHOWN if any(name in run.validations[-1] for run in validated)]
    header = ["run", "step", *(SHOWN[name].column for name in known)]
    rows = []
    for entry in validated:
        row = entry.validations[-1]
        cells = [_cell(row, name) for name in known]
        rows.append((entry, [str(row["step"]), *cells]))
    return header, rows


def _cell(row: Quality, name: str) -> str:
    """A quantity and its interval; nothing where it is not known."""
    shown, found = SHOWN[name], quantity_in(row, name)
    if found is None:
        return ""
    value, low, high = (f"{shown.scale * end:.{shown.digits}f}" for end in found)
    return f"{value} [{low}, {high}]"


def validation_lines(entry: Entry) -> list[str]:
    """The last validation of a run beside its first, a line a quantity, for the terminal."""
    if not entry.validations:
        return []
    first, last = entry.validations[0], entry.validations[-1]
    names = [name for name in SHOWN if name in last]
    width = max(len(SHOWN[name].title) for name in names)
    lines = [
        f"{SHOWN[name].title:{width}}  {_before(first, name)}{_cell(last, name)}" for name in names
    ]
    about = (
        f"{last['num_prompts']} prompts that were not trained on, at most {last['max_tokens']} "
        f"tokens; before the first step -> after step {last['step']} [95 % interval over prompts]:"
    )
    return [about, *lines]


def _before(row: Quality, name: str) -> str:
    """The value of another validation, where there is one."""
    shown, found = SHOWN[name], quantity_in(row, name)
    return "" if found is None else f"{shown.scale * found[0]:.{shown.digits}f} -> "


def comparison_lines(rows: Sequence[Any]) -> list[str]:
    """Models measured on the same prompts: a block a quantity, a line a model, for the terminal."""
    first = rows[0]
    scored = f"; {first['teacher']} is the teacher" if first["teacher"] is not None else ""
    lines = [
        f"{first['num_prompts']} prompts of {first['prompts']}, at most {first['max_tokens']} "
        f"tokens{scored} [95 % interval over prompts]:"
    ]
    width = max(len(row["model"]) for row in rows)
    for name, shown in SHOWN.items():
        found = [row for row in rows if name in row]
        if found:
            lines.append(shown.title)
            lines += [f"  {row['model']:{width}}  {_cell(row, name)}" for row in found]
    return lines
