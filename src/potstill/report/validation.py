"""Validations of runs for the report and the terminal: curves with their intervals, and a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.report.curves import about_run, short
from potstill.report.figures import Link, Styles
from potstill.runs.quantities import SHOWN
from potstill.runs.results import Entry
from potstill.runs.schema import Quality, ValidationRow, quantity_in


def validation_curves(
    runs: Sequence[Entry], labels: dict[Path, str], styles: Styles, link: Link
) -> dict[str, Any]:
    """Quantities that some run has validated, with 95 % intervals over prompts, as
    `training_curves` has those of training; `low` and `high` are the ends."""
    validated = [run for run in runs if run.validations]
    known = [n for n in SHOWN if any(n in row for run in validated for row in run.validations)]
    found = []
    for run in validated:
        values: dict[str, list[float | None]] = {}
        low: dict[str, list[float | None]] = {}
        high: dict[str, list[float | None]] = {}
        for name in known:
            scale = SHOWN[name].scale
            rows = [quantity_in(row, name) for row in run.validations]
            values[name], low[name], high[name] = (
                [short(None if row is None else scale * row[i]) for row in rows] for i in range(3)
            )
        steps = [row["step"] for row in run.validations]
        numbers = {"steps": steps, "values": values, "low": low, "high": high}
        found.append(about_run(run, labels, styles, link) | numbers)
    figures = [{"name": name, "title": SHOWN[name].title, "is_smooth": False} for name in known]
    return {"figures": figures, "runs": found}


def validation_table(entries: Sequence[Entry]) -> tuple[list[str], list[tuple[Entry, list[str]]]]:
    """Header and rows of each run's last validation: value and interval of what some run knows."""
    validated = [entry for entry in entries if entry.validations]
    known = [name for name in SHOWN if any(name in run.validations[-1] for run in validated)]
    header = ["run", "step", *(SHOWN[name].column for name in known)]
    rows = []
    for entry in validated:
        row = entry.validations[-1]
        cells = [value_and_interval(row, name) for name in known]
        rows.append((entry, [str(row["step"]), *cells]))
    return header, rows


def value_and_interval(row: ValidationRow, name: str) -> str:
    """A quantity and its interval, which one prompt has not; nothing where it is not known."""
    shown, found = SHOWN[name], quantity_in(row, name)
    if found is None:
        return ""
    value, low, high = (f"{shown.scale * end:.{shown.digits}f}" for end in found)
    return f"{value} [{low}, {high}]" if row["num_prompts"] > 1 else value


def prompts_in_words(num: int) -> str:
    return f"{num} prompt{'s' if num > 1 else ''}"


def _which_interval(row: ValidationRow) -> str:
    return "95 % interval over prompts" if row["num_prompts"] > 1 else "one prompt has no interval"


def validation_lines(entry: Entry) -> list[str]:
    """The last validation of a run beside its first, a line a quantity, for the terminal."""
    if not entry.validations:
        return []
    first, last = entry.validations[0], entry.validations[-1]
    names = [name for name in SHOWN if name in last]
    width = max(len(SHOWN[name].title) for name in names)
    lines = [
        f"{SHOWN[name].title:{width}}  {_before(first, name)}{value_and_interval(last, name)}"
        for name in names
    ]
    about = (
        f"{prompts_in_words(last['num_prompts'])} not trained on, at most {last['max_tokens']} "
        f"tokens; before the first step -> after step {last['step']} [{_which_interval(last)}]:"
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
        f"{prompts_in_words(first['num_prompts'])} of {first['prompts']}, at most "
        f"{first['max_tokens']} tokens{scored} [{_which_interval(first)}]:"
    ]
    width = max(len(row["model"]) for row in rows)
    for name, shown in SHOWN.items():
        found = [row for row in rows if name in row]
        if found:
            lines.append(shown.title)
            lines += [f"  {row['model']:{width}}  {value_and_interval(row, name)}" for row in found]
    return lines
