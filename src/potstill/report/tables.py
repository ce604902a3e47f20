"""Tables of runs beside each other, as the report and the terminal show them, and what their
numbers are of."""

from collections.abc import Sequence
from typing import Any

from potstill.config import METHODS
from potstill.report.comparison import GridPart, Group, seed_names
from potstill.report.figures import Link
from potstill.report.findings import number_text, values
from potstill.report.metrics import LAST_SHARE, Metric, entropy_excess
from potstill.runs.results import Entry


def comparison_table(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the report's comparison of runs."""
    temperatures = sorted(
        {row["temperature"] for entry in entries for row in entry.evals}, reverse=True
    )
    num_responses = max(
        (row["num_responses"] for entry in entries for row in entry.evals), default=1
    )
    k = min([8, *(row["num_responses"] for entry in entries for row in entry.evals)])
    header = ["model"]
    for temperature in temperatures:
        header += [f"Avg@{num_responses} T={temperature:g}", f"Pass@{k} T={temperature:g}"]
    header += ["entropy", "length", "truncated", "loss tokens", "seconds"]
    excesses = [entropy_excess(entry) for entry in entries]
    has_excess = any(excess is not None for excess in excesses)
    header += ["excess entropy"] * has_excess
    rows = []
    for entry, excess in zip(entries, excesses, strict=True):
        by_temperature = {row["temperature"]: row for row in entry.evals}
        cells = [entry.name]
        for temperature in temperatures:
            row = by_temperature.get(temperature)
            cells += [_percent(row["avg"]), _percent(row["pass"][str(k)])] if row else ["", ""]
        first = by_temperature.get(temperatures[0]) if temperatures else None
        cells += (
            [
                _number(first["entropy"], 3),
                _number(first["length"], 0),
                _percent(first["truncation"]),
            ]
            if first
            else [""] * 3
        )
        cells += [
            f"{entry.num_loss_tokens:,}" if entry.num_loss_tokens else "",
            f"{entry.seconds:.0f}" if entry.seconds else "",
        ]
        if has_excess:
            cells.append("" if excess is None else f"{excess:+.3f}")
        rows.append(cells)
    return header, rows


def level_table(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of Avg by difficulty level, for tasks that have levels."""
    levels = sorted(
        {level for entry in entries for row in entry.evals for level in row["levels"] if level}
    )
    rows = []
    for entry in entries if levels else ():
        for row in entry.evals:
            estimates = [row["levels"].get(level) for level in levels]
            cells = [_percent(estimate["avg"]) if estimate else "" for estimate in estimates]
            rows.append([entry.name, f"{row['temperature']:g}", *cells])
    return ["model", "T", *levels], rows


def table_note(entries: Sequence[Entry]) -> str:
    """A line on what the table's numbers are of; a warning when they are not of the same thing."""
    is_evaluated = any(entry.evals for entry in entries)
    sentences = [_evaluation_note(entries) if is_evaluated else "No evaluation was found."]
    if any(entropy_excess(entry) is not None for entry in entries):
        sentences.append(
            "Excess entropy: the student's minus that of the teacher and the forward KL, nats a "
            f"training token of the last {LAST_SHARE:.0%} of the steps; it is 0 where the scale of "
            "the logits cannot get better."
        )
    return " ".join([*sentences, *settings_warning(entries)])


def _evaluation_note(entries: Sequence[Entry]) -> str:
    return (
        f"{settings_note(entries)}; accuracy and truncation in %; [95 % bootstrap interval over "
        "problems]; entropy (nats a token), length and truncation at the highest temperature; "
        "seconds of training."
    )


def settings_note(entries: Sequence[Entry]) -> str:
    """The size of the first evaluation among these."""
    row = next(row for entry in entries for row in entry.evals)
    num, length = row["num_responses"], row["settings"]["max_tokens"]
    return f"{row['num_problems']} held-out problems, {num} responses each, at most {length} tokens"


def settings_warning(entries: Sequence[Entry]) -> list[str]:
    """A sentence where evaluations are not of the same thing; none where they are."""
    asked = [row["settings"] for entry in entries for row in entry.evals]
    compared = (
        "source",
        "split",
        "template",
        "system",
        "num_problems",
        "num_responses",
        "max_tokens",
        "seed",
        "source_sha256",
    )
    differing = [
        name for name in compared if any(each.get(name) != asked[0].get(name) for each in asked)
    ]
    if not differing:
        return []
    return [
        f"WARNING: the evaluations differ in {', '.join(differing)}, so their numbers cannot be "
        "compared."
    ]


def grid(part: GridPart, metric: Metric, parts: Sequence[GridPart], link: Link) -> dict[str, Any]:
    """The corners of a grid in reading order, each with its value, how dark it is, and its runs."""
    shown = [
        group.summaries[metric.key].value
        for p in parts
        for group in p.groups
        if metric.key in group.summaries
    ]
    lowest, highest = min(shown), max(shown)
    cells = []
    for key, method in METHODS.items():
        group = next(
            (g for g in part.groups if g.entries[0].cell == key and metric.key in g.summaries), None
        )
        cell: dict[str, Any] = {"key": key, "method": method, "text": None}
        if group is not None:
            value = group.summaries[metric.key].value
            cell |= {
                "text": values(group, [metric])[0],
                "heat": (value - lowest) / (highest - lowest) if highest > lowest else 0.5,
                "runs": runs_of(group, metric, link),
            }
        cells.append(cell)
    return {"label": part.label, "cells": cells}


def runs_of(group: Group, metric: Metric | None, link: Link) -> list[tuple[str, str]]:
    """A text and a link for each run of a group: its seed, and its own value of a metric."""
    own = dict(group.summaries[metric.key].per_run) if metric is not None else {}
    return [
        (
            (seed or group.label)
            + (
                f": {number_text((own[path],), metric)}"
                if metric is not None and len(own) > 1
                else ""
            ),
            link(path),
        )
        for path, seed in seed_names(group).items()
        if metric is None or path in own
    ]


def _percent(estimate: Sequence[float]) -> str:
    value, low, high = (100 * x for x in estimate)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _number(estimate: Sequence[float], digits: int) -> str:
    value, low, high = estimate
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
