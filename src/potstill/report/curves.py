"""Curves of training over steps, and windows with their gate's decisions, as plotly's JSON."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.report.figures import Figure, Link, Styles, axis, layout, line_of, rounded
from potstill.runs.results import Entry
from potstill.runs.schema import MetricsRow, StepNumber, value_in

MAX_POINTS = 300
CURVES: tuple[tuple[StepNumber, str], ...] = (
    ("forward_kl", "forward KL (nats a token)"),
    ("reverse_kl", "reverse KL (nats a token)"),
    ("student_entropy_before_answer", "student entropy up to the answer (nats)"),
    ("teacher_entropy_before_answer", "teacher entropy up to the answer (nats)"),
    ("reward", "mean score of responses (GRPO)"),
    ("groups_with_signal", "share of groups that disagree in score (GRPO)"),
    ("length", "completion length (tokens)"),
    ("truncation", "share of completions cut by the window"),
    ("grad_norm", "gradient norm before clipping"),
)
# Values that controllers move, shown where they move in any run.
CONTROLLED: tuple[tuple[StepNumber, str], ...] = (
    ("window", "window (tokens)"),
    ("forward_weight", "weight of the forward KL"),
)
ACTIONS = {
    "climb": "triangle-up",
    "hold": "circle-open",
    "freeze": "square",
    "step back": "triangle-down",
}


def thin(rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    """At most MAX_POINTS of a run's steps, evenly, the last one among them."""
    every = -(-len(rows) // MAX_POINTS)
    return list(rows[::-every])[::-1] if every else []


def shown_curves(runs: Sequence[Entry]) -> list[tuple[StepNumber, str]]:
    """Name and title of the quantities that these runs logged, and of those that a controller moved
    in any of them."""
    shown = [
        each
        for each in CURVES
        if any(value_in(run.metrics[0], each[0]) is not None for run in runs)
    ]
    return shown + [each for each in CONTROLLED if any(_moves(run, each[0]) for run in runs)]


def _moves(run: Entry, name: StepNumber) -> bool:
    return len({value_in(row, name) for row in run.metrics}) > 1


def curve(
    name: StepNumber,
    title: str,
    runs: Sequence[Entry],
    labels: dict[Path, str],
    styles: Styles,
    visible: set[Path],
    link: Link,
) -> Figure:
    """One quantity of training over steps, a line a run; the page's list of runs says which are
    drawn."""
    shape = "hv" if name == "window" else "linear"
    lines = []
    for run in runs:
        rows = thin(run.metrics)
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [row["step"] for row in rows],
                "y": [rounded(value_in(row, name)) for row in rows],
                "name": html.escape(labels[run.path]),
                "line": line_of(styles[run.path]) | {"shape": shape},
                "visible": run.path in visible,
                "meta": link(run.path),
                "hovertemplate": "%{y:.4~g} at step %{x}<br>%{fullData.name}<extra></extra>",
            }
        )
    return layout(lines, 280, axis("step"), axis(""), title)


def windows(
    runs: Sequence[Entry],
    labels: dict[Path, str],
    styles: Styles,
    visible: set[Path],
    link: Link,
) -> Figure:
    """The window over steps of the runs with a gate, and a mark for each decision with the numbers
    behind it."""
    traces: list[dict[str, Any]] = []
    for run in runs:
        rows, line = thin(run.metrics), line_of(styles[run.path])
        name = html.escape(labels[run.path])
        shared = {
            "type": "scatter",
            "name": name,
            "visible": run.path in visible,
            "meta": link(run.path),
        }
        traces.append(
            shared
            | {
                "mode": "lines",
                "x": [row["step"] for row in rows],
                "y": [value_in(row, "window") for row in rows],
                "line": line | {"shape": "hv"},
                "hoverinfo": "skip",
            }
        )
        traces.append(
            shared
            | {
                "mode": "markers",
                "x": [row["step"] for row in run.decisions],
                "y": [row["window"] for row in run.decisions],
                "marker": {
                    "size": 12,
                    "color": line["color"],
                    "symbol": [ACTIONS[row["action"]] for row in run.decisions],
                    "line": {"width": 1.5, "color": line["color"]},
                },
                "text": [decision_text(row) for row in run.decisions],
                "hovertemplate": "%{text}<br>%{fullData.name}<extra></extra>",
            }
        )
    return layout(traces, 340, axis("step"), axis("window (tokens)"))


def decision_text(row: dict[str, Any]) -> str:
    """The gate's decision, and the numbers of its probe, as text."""
    numbers = [
        f"{row['action']} before step {row['step']}, window {row['window']}",
        f"entropy {row['entropy']:.3f}, threshold {row['threshold']:.3f}",
        f"truncation {row['truncation']:.0%}, teacher's {row['teacher_truncation']:.0%}",
        f"repetition {row['repetition']:.0%}",
    ]
    return html.escape(" | ".join(numbers + [f"failed: {name}" for name in row["failed"]])).replace(
        " | ", "<br>"
    )
