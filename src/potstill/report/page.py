"""One self-contained HTML file from run folders, evaluation files and studies, and `results.json`
with its numbers.

Reads files only; needs no torch. Every number in it is read or computed from the files that it
links to, and text that a model or a user wrote is escaped.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from potstill.files import pack, pack_data, unpack, write_atomically
from potstill.report import curves, figures
from potstill.report.comparison import (
    Group,
    at_temperature,
    budgets,
    forward_weight_sweeps,
    in_turn,
    is_gated,
    window_comparisons,
)
from potstill.report.figures import Link
from potstill.report.findings import findings, habit_table, number_text, seeds_of, values
from potstill.report.metrics import stored
from potstill.report.numbers import PanelResult, finite, numbers_of, panel_result
from potstill.report.opening import picture, sentences_of, title_of
from potstill.report.tables import comparison_table, grid, level_table, runs_of, table_note
from potstill.report.validation import validation_curves, validation_table
from potstill.report.viewer import reader_data
from potstill.runs.results import read_panels
from potstill.runs.run_folder import RunError
from potstill.statistics import Estimate

RESULTS_FILE = "results.json"
PLOTLY = r'<script type="text/plain" id="plotly">(.*?)</script>'
# How many runs' curves are drawn before the reader chooses.
NUM_DRAWN = 6
# How many runs' rollouts a page holds.
NUM_READABLE = 24
VERDICTS = ("supported", "contradicted", "undecided")


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write the report over run folders, evaluation files and study folders, and `results.json`
    beside it.

    Returns the path of the page. Raises RunError, also where there already is a `results.json` that
    is no report's.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    if not paths:
        raise RunError("a report needs at least one run folder, evaluation file or study folder")
    results_file = out.parent / RESULTS_FILE
    refuse_to_replace(results_file)
    if out.is_dir() or out.resolve() in [path.resolve() for path in paths]:
        raise RunError(
            f"--out is {str(out)!r}, a folder or one of the files to report on; give the name of "
            "a new file"
        )
    results = [panel_result(panel) for panel in read_panels(list(paths))]

    def link(path: Path) -> str:
        """The URL of a folder or file from the page."""
        relative = os.path.relpath(path.resolve(), out.parent.resolve())
        return quote(Path(relative).as_posix()) + ("/" if path.is_dir() else "")

    entries = [entry for result in results for entry in result.panel.entries]
    runs = [entry for entry in entries if entry.metrics]
    ordered = [entry for result in results for entry in in_turn(result.groups)]
    read = [entry for entry in ordered if entry.samples][:NUM_READABLE]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("potstill.report", "templates"), autoescape=True
    )
    environment.filters["packed"] = pack_data
    text = environment.get_template("report.html").render(
        panels=[page_of(result, link) for result in results],
        title=title_of(results),
        opening=opening_of(results, link),
        num_runs=len(runs),
        results_file=RESULTS_FILE,
        reader=reader_data(read),
        num_unread=len([entry for entry in runs if entry.samples]) - len(read),
        plotly=pack(re.sub("\r\n?", "\n", get_plotlyjs())),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    numbers = {
        "report": out.name,
        "panels": [numbers_of(result, link) for result in results],
    }
    write_atomically(
        results_file,
        json.dumps(finite(numbers), ensure_ascii=False, allow_nan=False) + "\n",
    )
    write_atomically(out, with_policy(text))
    return out


def opening_of(results: Sequence[PanelResult], link: Link) -> dict[str, Any]:
    """The sentences, the picture and the first groups of the first panel that has a result."""
    first = next((result for result in results if result.groups), results[0])
    shown = [group for group in first.groups if group.entries[0].metrics][:NUM_DRAWN]
    return {
        "sentences": sentences_of(first),
        "picture": picture(first, link),
        "groups": [
            (group.label, link(group.entries[0].path), first.styles[group.entries[0].path])
            for group in shown
        ],
    }


def with_policy(page: str) -> str:
    """The page with its Content-Security-Policy: it runs its own scripts, by their hashes, and asks
    for nothing.

    A second wall behind the escaping: a script or handler from a run's texts would not run.
    """
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    # A browser reads any line end as a line feed before it hashes.
    # Plotly is packed, and put into a script of its own when it is unpacked.
    scripts += [unpack(text) for text in re.findall(PLOTLY, page)]
    digests = [
        hashlib.sha256(re.sub("\r\n?", "\n", script).encode()).digest() for script in scripts
    ]
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    rules = (
        "default-src 'none'",
        f"script-src {hashes}",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
        "font-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    )
    meta = '<meta http-equiv="Content-Security-Policy" content="'
    start = page.index(meta) + len(meta)
    return page[:start] + "; ".join(rules) + page[page.index('"', start) :]


def _effect(effect: Estimate, unit: str) -> str:
    sign = "" if unit == "times" else "+"
    return f"{effect.value:{sign}.3g} [{effect.low:.3g}, {effect.high:.3g}]"


def refuse_to_replace(path: Path) -> None:
    """Raise RunError when there is a file of this name that an earlier report did not write."""
    if path.exists():
        try:
            is_ours = "report" in json.loads(path.read_text())
        except ValueError:
            is_ours = False
        if not is_ours:
            raise RunError(
                f"{str(path)!r} is there and is no report's; choose an --out in another folder, "
                "or move it"
            )


def page_of(result: PanelResult, link: Link) -> dict[str, Any]:
    """Everything that the template shows of a panel; a section that its runs do not feed is
    empty."""
    panel, labels = result.panel, result.labels
    page = {
        "title": panel.title or "Runs",
        "note": panel.note,
        "metrics": result.metrics,
        "is_scored": any(entry.evals for entry in panel.entries),
        "unfinished": [
            {"name": path.name, "href": link(path) if path.exists() else None, "state": state}
            for path, state in panel.unfinished
        ],
        "findings": [
            (
                text,
                [(labels[path], link(path)) for path in paths[:NUM_DRAWN]],
                len(paths) - NUM_DRAWN,
            )
            for text, paths in findings(result.metrics, result.groups, result.rewarded)
        ],
    }
    sections = (
        claims_section,
        grids_section,
        table_section,
        curves_section,
        window_section,
        budget_section,
    )
    for section in (*sections, rewarded_section):
        page |= section(result, link)
    return page


def claims_section(result: PanelResult, link: Link) -> dict[str, Any]:
    """Claims with what was measured of each, and those that these runs do not measure.

    They are for a study, or where there are seeds enough for a verdict on some claim.
    """
    measured = [claim for claim in result.claims if claim.effect is not None]
    is_study = bool(result.panel.title)
    if not is_study and not any(claim.verdict in VERDICTS for claim in measured):
        return {"measured": [], "unmeasured": []}
    labels = result.labels
    return {
        "measured": [
            {
                "claim": claim,
                "effect": _effect(claim.effect, claim.unit),
                "pairs": [
                    [(labels.get(path, path.name), link(path)) for path in pair]
                    for pair in claim.pairs
                ],
            }
            for claim in measured
            if claim.effect is not None
        ],
        "unmeasured": [claim for claim in result.claims if claim.effect is None],
    }


def grids_section(result: PanelResult, link: Link) -> dict[str, Any]:
    """The grid of prefixes and KLs, once for each metric that some group has."""
    metrics = result.metrics
    return {
        "grids": [
            {
                "metric": metric,
                "parts": [grid(part, metric, result.grids, link) for part in result.grids],
            }
            for metric in metrics
            if any(metric.key in group.summaries for part in result.grids for group in part.groups)
        ],
    }


def table_section(result: PanelResult, link: Link) -> dict[str, Any]:
    """The table of all entries, their levels, and one figure of accuracy against each other
    metric."""
    entries, metrics, labels = result.panel.entries, result.metrics, result.labels
    header, rows = comparison_table(entries)
    costs = [metric for metric in metrics if metric.key == "gflops"]
    avgs = [metric for metric in metrics if metric.column == "avg"]
    return {
        "header": [*header, *(metric.unit for metric in costs)],
        "rows": [
            (
                labels[entry.path],
                link(entry.path),
                [*cells[1:], *(number_text(stored(entry, metric), metric) for metric in costs)],
            )
            for entry, cells in zip(entries, rows, strict=True)
        ],
        "table_note": table_note(entries),
        "hrefs": {labels[entry.path]: link(entry.path) for entry in entries},
        "levels": level_table([replace(entry, name=labels[entry.path]) for entry in entries]),
        "trade_offs": [
            (
                avg.title,
                [
                    figures.trade_off(
                        avg, other, entries, labels, result.firsts, result.styles, link
                    )
                    for other in at_temperature(metrics, avg)
                ],
            )
            for avg in avgs
        ],
    }


def curves_section(result: PanelResult, link: Link) -> dict[str, Any]:
    """Curves over the steps, validations, habits of ending, and sweeps of the forward weight."""
    groups, labels, styles = result.groups, result.labels, result.styles
    runs = [entry for entry in in_turn(groups) if entry.metrics]
    drawn = drawn_first(groups)
    sweeps = forward_weight_sweeps(groups)
    swept = [metric for metric in result.metrics if metric.temperature is not None]
    habits_header, habits = habit_table(result.panel.entries)
    header, validated = validation_table(result.panel.entries)
    return {
        "runs": [
            (labels[run.path], link(run.path), styles[run.path], run.path in drawn) for run in runs
        ],
        "curves": curves.training_curves(runs, labels, styles, link),
        "validations": validation_curves(runs, labels, styles, link),
        "validated_header": header,
        "validated": [(labels[entry.path], link(entry.path), cells) for entry, cells in validated],
        "habits_header": habits_header,
        "habits": [(labels[entry.path], link(entry.path), cells) for entry, cells in habits],
        "sweeps": [figures.sweep(metric, sweeps, link) for metric in swept] if sweeps else [],
    }


def window_section(result: PanelResult, link: Link) -> dict[str, Any]:
    """Gated windows over the steps, and tables of runs that differ in their windows."""
    groups, labels, metrics = result.groups, result.labels, result.metrics
    styles = result.styles
    gated = [
        entry for group in groups if is_gated(group) for entry in group.entries if entry.decisions
    ]
    gated_drawn = drawn_first([group for group in groups if is_gated(group)])
    return {
        "gated": [
            (labels[run.path], link(run.path), styles[run.path], run.path in gated_drawn)
            for run in gated
        ],
        "windows": curves.windows(gated, labels, styles, gated_drawn, link) if gated else None,
        "window_tables": [
            (
                part.label,
                [
                    (group.label, runs_of(group, None, link), values(group, metrics))
                    for group in part.groups
                ],
            )
            for part in window_comparisons(groups)
        ],
    }


def budget_section(result: PanelResult, link: Link) -> dict[str, Any]:
    """Grids of equal operations, or where there are none a figure of accuracy against
    operations."""
    metrics, labels = result.metrics, result.labels
    runs = [entry for entry in result.panel.entries if entry.metrics]
    costs = [metric for metric in metrics if metric.key == "gflops"]
    avgs = [metric for metric in metrics if metric.column == "avg"]
    by_budget = budgets(result.grids)
    return {
        "budgets": [
            [
                (metric, [grid(part, metric, result.grids, link) for part in same])
                for metric in [*avgs[:1], *costs]
            ]
            for same in by_budget
        ],
        "compute": figures.trade_off(
            avgs[0], costs[0], runs, labels, result.firsts, result.styles, link
        )
        if avgs and costs and not by_budget
        else None,
    }


def rewarded_section(result: PanelResult, link: Link) -> dict[str, Any]:
    """Each student before and after reinforcement learning."""
    swept = [metric for metric in result.metrics if metric.temperature is not None]
    return {
        "rewarded": [
            {
                "seeds": seeds_of(pair.after),
                "before": (pair.before.label, runs_of(pair.before, None, link)),
                "after": (pair.after.label, runs_of(pair.after, None, link)),
                "cells": [
                    (
                        values(pair.before, [metric])[0],
                        values(pair.after, [metric])[0],
                        number_text(pair.differences[metric.key], metric, sign="+"),
                    )
                    for metric in swept
                ],
            }
            for pair in result.rewarded
        ],
        "rewarded_header": [metric.title for metric in swept],
        "rewarded_figures": [
            figures.before_and_after(metric, result.rewarded, link) for metric in swept
        ]
        if result.rewarded
        else [],
    }


def drawn_first(groups: Sequence[Group]) -> set[Path]:
    """The runs whose curves are drawn at first: one of each group, then their other seeds, up to a
    number."""
    return {
        entry.path for entry in [entry for entry in in_turn(groups) if entry.metrics][:NUM_DRAWN]
    }
