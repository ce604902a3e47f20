"""Curves of training over steps, and windows with their gate's decisions, as plotly's JSON."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.report.figures import Figure, Link, Styles, axis, layout, line_of
from potstill.runs.results import Entry
from potstill.runs.schema import GateAction, MetricsRow, StepNumber, WindowRow, value_in

# The most points of a curve, and of one quantity of all runs together; they make up most of a page
# with hundreds of runs.
MAX_POINTS, MAX_IN_ALL = 300, 20_000
DIGITS_OF_CURVES = 4
CURVES: tuple[tuple[StepNumber, str], ...] = (
    ("forward_kl", "forward KL (nats a token)"),
    ("reverse_kl", "reverse KL (nats a token)"),
    ("student_entropy_before_answer", "student entropy up to the answer (nats)"),
    ("teacher_entropy_before_answer", "teacher entropy up to the answer (nats)"),
    ("reward", "mean score of responses"),
    ("groups_with_signal", "share of groups that disagree in score"),
    ("clipped", "share of tokens whose policy gradient is clipped"),
    ("start_kl", "KL to the start (nats a token)"),
    ("length", "completion length (tokens)"),
    ("truncation", "share of completions cut by the window"),
    ("grad_norm", "gradient norm before clipping"),
)
# Values that controllers move, shown where they move in any run.
CONTROLLED: tuple[tuple[StepNumber, str], ...] = (
    ("window", "window (tokens)"),
    ("forward_weight", "weight of the forward KL"),
)
ACTIONS: dict[GateAction, str] = {
    "climb": "triangle-up",
    "hold": "circle-open",
    "freeze": "square",
    "step back": "triangle-down",
}


def thin(rows: Sequence[MetricsRow], num_points: int = MAX_POINTS) -> list[MetricsRow]:
    """At most so many of a run's steps, evenly, the last one among them."""
    every = -(-len(rows) // num_points)
    return list(rows[::-every])[::-1] if every else []


def shown_curves(runs: Sequence[Entry]) -> list[tuple[str, str]]:
    """Name and title of the quantities that these runs logged, of each of several teachers, and of
    those that a controller moved in any of them."""
    shown: list[tuple[str, str]] = [
        each
        for each in CURVES
        if any(value_in(run.metrics[0], each[0]) is not None for run in runs)
    ]
    teachers = [name for run in runs for name in run.metrics[0].get("by_teacher", {})]
    for name in dict.fromkeys(teachers):
        shown.append((f"forward_kl/{name}", f"forward KL of {name} (nats a token)"))
        shown.append((f"reverse_kl/{name}", f"reverse KL of {name} (nats a token)"))
    return shown + [each for each in CONTROLLED if any(_moves(run, each[0]) for run in runs)]


def _logged(row: MetricsRow, name: str) -> float | None:
    """A step's value of a shown quantity: its own, or after a slash that of one teacher."""
    quantity, _, teacher = name.partition("/")
    values: Any = row.get("by_teacher", {}).get(teacher, {}) if teacher else row
    return values.get(quantity)


def _moves(run: Entry, name: StepNumber) -> bool:
    return len({value_in(row, name) for row in run.metrics}) > 1


def training_curves(
    runs: Sequence[Entry], labels: dict[Path, str], styles: Styles, link: Link
) -> dict[str, Any]:
    """Quantities of training over steps, from which the page's script draws those of chosen runs.

    `figures` has name, title and shape of each, `runs` each run's style, `steps` and `values`.
    """
    shown = shown_curves(runs)
    num_points = max(1, min(MAX_POINTS, MAX_IN_ALL // max(1, len(runs))))
    found = []
    for run in runs:
        rows = thin(run.metrics, num_points)
        values = {name: [short(_logged(row, name)) for row in rows] for name, _ in shown}
        known = {name: each for name, each in values.items() if any(x is not None for x in each)}
        about = about_run(run, labels, styles, link)
        found.append(about | {"steps": [row["step"] for row in rows], "values": known})
    controlled = [name for name, _ in CONTROLLED]
    return {
        "figures": [
            {
                "name": name,
                "title": title,
                "is_smooth": name not in controlled,
                "shape": "hv" if name == "window" else "linear",
            }
            for name, title in shown
        ],
        "runs": found,
    }


def about_run(
    run: Entry, labels: dict[Path, str], styles: Styles, link: Link
) -> dict[str, str | None]:
    """How a run is called, where it leads, and how its curves look."""
    style = styles[run.path]
    return {
        "name": html.escape(labels[run.path]),
        "href": link(run.path),
        "colour": style.colour,
        "dash": style.dash,
        "symbol": style.symbol,
    }


def short(value: float | None) -> float | None:
    """Four digits, which is more than a curve shows; null where it is no number."""
    is_number = value is not None and math.isfinite(value)
    return float(f"{value:.{DIGITS_OF_CURVES}g}") if is_number else None


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


def decision_text(row: WindowRow) -> str:
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
