"""Numbers of the report: comparisons of runs as plain data for results.json."""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from potstill.report import curves
from potstill.report.claims import claims
from potstill.report.comparison import (
    BeforeAndAfter,
    GridPart,
    Group,
    grids,
    make_groups,
    rewarded_pairs,
    seed_names,
)
from potstill.report.figures import Link, Styles, style_at
from potstill.report.findings import findings, first_and_last_habits
from potstill.report.metrics import Metric, Summary, entropy_excess, metrics_of
from potstill.report.questions import Claim
from potstill.runs.results import Entry, Panel, find_starts
from potstill.runs.results_schema import EvalRow
from potstill.runs.schema import StepNumber, value_in
from potstill.statistics import Estimate


@dataclass(frozen=True, kw_only=True)
class PanelResult:
    """A panel with what is computed from it: what the page shows and `results.json` holds."""

    panel: Panel
    metrics: list[Metric]
    groups: list[Group]
    grids: list[GridPart]
    rewarded: list[BeforeAndAfter]
    claims: list[Claim]

    @cached_property
    def labels(self) -> dict[Path, str]:
        """A name for each run that no other run has."""
        return {
            path: f"{group.label} · {seed}" if len(group.entries) > 1 else group.label
            for group in self.groups
            for path, seed in seed_names(group).items()
        }

    @cached_property
    def starts(self) -> dict[Path, Entry]:
        """The entry that each run started from, where there is one."""
        return find_starts(self.panel.entries)

    @cached_property
    def group_labels(self) -> dict[Path, str]:
        """The name of the group that each entry is in."""
        return {entry.path: group.label for group in self.groups for entry in group.entries}

    @cached_property
    def styles(self) -> Styles:
        """How each entry looks in figures."""
        return {
            entry.path: style_at(i, seed)
            for i, group in enumerate(self.groups)
            for seed, entry in enumerate(group.entries)
        }

    @cached_property
    def firsts(self) -> dict[Path, str]:
        """The first entry of each group, and the group's name."""
        return {group.entries[0].path: group.label for group in self.groups}


def panel_result(panel: Panel) -> PanelResult:
    """Everything that is computed from a panel's entries."""
    metrics = metrics_of(panel.entries)
    groups = make_groups(panel.entries, metrics)
    judged = [] if panel.is_sweep else claims(panel.entries)
    return PanelResult(
        panel=panel,
        metrics=metrics,
        groups=groups,
        grids=grids(groups),
        rewarded=rewarded_pairs(groups, metrics),
        claims=judged,
    )


def finite(value: Any) -> Any:
    """Plain data for strict JSON: a number that is not finite is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def numbers_of(result: PanelResult, link: Link) -> dict[str, Any]:
    """A panel's numbers as plain data, with paths relative to the page."""
    return {
        "title": result.panel.title,
        "note": result.panel.note,
        "findings": [text for text, _ in findings(result.metrics, result.groups, result.rewarded)],
        "metrics": {
            metric.key: {
                "title": metric.title,
                "unit": metric.unit,
                "scale": metric.scale,
                "digits": metric.digits,
            }
            for metric in result.metrics
        },
        "runs": [
            run_numbers(entry, result.labels[entry.path], link) for entry in result.panel.entries
        ],
        "groups": [
            {
                "label": group.label,
                "paths": [link(entry.path) for entry in group.entries],
                "is_model": group.entries[0].recipe is None,
                "corner": group.entries[0].cell,
                "start": start_of(group, result),
                "metrics": summary_numbers(group.summaries, link),
            }
            for group in result.groups
        ],
        "grids": [
            {
                "label": part.label,
                "cells": {group.entries[0].cell: group.label for group in part.groups},
            }
            for part in result.grids
        ],
        "claims": [
            asdict(claim)
            | {
                "pairs": [[link(a), link(b)] for a, b in claim.pairs],
                "effect": interval_numbers(claim.effect),
            }
            | {"answer": claim.answer}
            for claim in result.claims
        ],
        "rewarded": [rewarded_numbers(pair, link) for pair in result.rewarded],
        "unfinished": [
            {"path": link(path), "state": state} for path, state in result.panel.unfinished
        ],
    }


def rewarded_numbers(pair: BeforeAndAfter, link: Link) -> dict[str, Any]:
    """The numbers of a group before and after reinforcement learning, and of the differences."""
    before, after = (
        {"label": group.label, "metrics": summary_numbers(group.summaries, link)}
        for group in (pair.before, pair.after)
    )
    return {
        "before": before,
        "after": after,
        "differences": {key: interval_numbers(effect) for key, effect in pair.differences.items()},
        "num_seeds": len(pair.after.entries),
    }


def run_numbers(entry: Entry, label: str, link: Link) -> dict[str, Any]:
    """The numbers of one run or model."""
    return {
        "path": link(entry.path),
        "label": label,
        "recipe": entry.recipe.resolved() if entry.recipe is not None else None,
        "num_steps": entry.metrics[-1]["step"] if entry.metrics else None,
        "num_loss_tokens": entry.num_loss_tokens,
        "flops": entry.flops,
        "seconds": entry.seconds,
        "entropy_excess": entropy_excess(entry),
        "evals": [evaluation_of(row) for row in entry.evals],
        "curves": curve_numbers(entry),
        "decisions": list(entry.decisions),
        "validations": list(entry.validations),
        "end_habits": first_and_last_habits(entry),
    }


def curve_numbers(entry: Entry) -> dict[StepNumber, list[float | None]]:
    """Logged values of each curve of a run, at the steps that figures show."""
    names: list[StepNumber] = ["step", *(name for name, _ in curves.CURVES + curves.CONTROLLED)]
    logged: list[StepNumber] = [
        name for name in names if any(value_in(row, name) is not None for row in entry.metrics)
    ]
    rows = curves.thin(entry.metrics)
    return {name: [value_in(row, name) for row in rows] for name in logged}


def summary_numbers(summaries: dict[str, Summary], link: Link) -> dict[str, Any]:
    """Each metric's value, its interval, and the value of each run."""
    return {
        key: {
            "value": s.value,
            "low": s.low,
            "high": s.high,
            "runs": {link(path): v for path, v in s.per_run},
        }
        for key, s in summaries.items()
    }


def interval_numbers(effect: Estimate | None) -> dict[str, float] | None:
    return (
        None if effect is None else {"value": effect.value, "low": effect.low, "high": effect.high}
    )


def start_of(group: Group, result: PanelResult) -> str | None:
    """The label of what a group's runs began as, where it is among the groups."""
    start = result.starts.get(group.entries[0].path)
    return None if start is None else result.group_labels[start.path]


def evaluation_of(row: EvalRow) -> dict[str, Any]:
    """An evaluation without its columns of problems, and of its levels what is shown."""
    levels = {level: {"avg": estimates["avg"]} for level, estimates in row["levels"].items()}
    return {key: value for key, value in row.items() if key != "problems"} | {"levels": levels}
