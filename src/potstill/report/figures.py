"""The report's figures: from entries to plotly's JSON, as plain data that the page draws in its own
colours.

Names that users chose are escaped, because plotly reads some HTML. `meta` (of a line) and
`customdata` (of a mark) are the links to run folders.
"""

import html
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from potstill.config import METHODS, Recipe
from potstill.report.comparison import (
    BeforeAndAfter,
    GridPart,
    Group,
    Metric,
    forward_weight,
    stored,
)
from potstill.runs.results import Entry
from potstill.runs.schema import MetricsRow, StepNumber, value_in

Figure = dict[str, Any]
Link = Callable[[Path], str]

MAX_POINTS = 300
# A run that is neither a corner nor one of these has the colour of its prefix.
COLOURS = {
    "SFT": "#4477aa",
    "DAgger": "#228833",
    "Offline RL": "#b8a020",
    "OPD": "#ee6677",
    "teacher prefix": "#66aacc",
    "student prefix": "#aa3377",
    "mixed prefix": "#44aa99",
    "dataset prefix": "#999933",
    "GRPO": "#dd7722",
    "model": "#888888",
}
MARKERS = dict(
    zip(
        COLOURS,
        (
            "circle",
            "square",
            "diamond",
            "triangle-up",
            "cross",
            "x",
            "pentagon",
            "hexagon",
            "star",
            "circle-open",
        ),
        strict=True,
    )
)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
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


def family(entry: Entry) -> str:
    """The family that a run's colour and mark stand for."""
    if entry.cell is not None:
        return METHODS[entry.cell].name
    if entry.recipe is None:
        return "model"
    return f"{entry.recipe.objective.prefix} prefix" if isinstance(entry.recipe, Recipe) else "GRPO"


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
    visible: set[Path],
    link: Link,
) -> Figure:
    """One quantity of training over steps, a line a run; the page's list of runs says which are
    drawn."""
    shape = "hv" if name == "window" else "linear"
    lines = []
    for run, line in zip(runs, line_styles(runs), strict=True):
        rows = thin(run.metrics)
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [row["step"] for row in rows],
                "y": [rounded(value_in(row, name)) for row in rows],
                "name": html.escape(labels[run.path]),
                "line": line | {"shape": shape},
                "visible": run.path in visible,
                "meta": link(run.path),
                "hovertemplate": "%{y:.4~g} at step %{x}<br>%{fullData.name}<extra></extra>",
            }
        )
    return layout(lines, 280, axis("step"), axis(""), title)


def line_styles(runs: Sequence[Entry]) -> list[dict[str, Any]]:
    """A colour a family; its runs take turns in dashes, so that no two neighbours differ by colour
    alone."""
    num_seen: dict[str, int] = {}
    styles = []
    for run in runs:
        place = num_seen[family(run)] = num_seen.get(family(run), -1) + 1
        width = 1.8 if len(runs) <= 12 else 1.2
        styles.append(
            {"color": COLOURS[family(run)], "dash": DASHES[place % len(DASHES)], "width": width}
        )
    return styles


def trade_off(
    avg: Metric, other: Metric, entries: Sequence[Entry], labels: dict[Path, str], link: Link
) -> Figure:
    """Accuracy against another metric, a mark a run with its intervals; models without a run bear
    their names."""
    by_family: dict[str, list[tuple[Entry, Sequence[float], Sequence[float]]]] = {}
    for entry in entries:
        x, y = stored(entry, other), stored(entry, avg)
        if x is not None and y is not None:
            by_family.setdefault(family(entry), []).append((entry, x, y))
    marks = [
        {
            "type": "scatter",
            "mode": "markers+text" if name == "model" else "markers",
            "textposition": "top center",
            "name": name,
            "x": [rounded(other.scale * x[0]) for _, x, _ in found],
            "y": [rounded(avg.scale * y[0]) for _, _, y in found],
            "error_x": errors(other, [x for _, x, _ in found]),
            "error_y": errors(avg, [y for _, _, y in found]),
            "marker": {"size": 10, "color": COLOURS[name], "symbol": MARKERS[name]},
            "text": [html.escape(labels[entry.path]) for entry, _, _ in found],
            "customdata": [link(entry.path) for entry, _, _ in found],
            "hovertemplate": f"%{{text}}<br>{avg.title} %{{y:.1f}} %<br>{other.title} %{{x}} "
            f"{other.unit}<extra></extra>",
        }
        for name, found in by_family.items()
    ]
    kind = "log" if other.temperature is None else "linear"
    x_axis, y_axis = axis(f"{other.title} ({other.unit})", kind), axis(f"{avg.title} (%)")
    return layout(marks, 400, x_axis, y_axis, f"{avg.title} against {other.title}", legend=True)


def errors(metric: Metric, estimates: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Plotly's error bars of value, low, high; none of a value alone."""
    if any(len(estimate) == 1 for estimate in estimates):
        return {"visible": False}
    return {
        "type": "data",
        "array": [rounded(metric.scale * (high - value)) for value, _, high in estimates],
        "arrayminus": [rounded(metric.scale * (value - low)) for value, low, _ in estimates],
        "thickness": 1,
        "width": 2,
    }


def sweep(metric: Metric, sweeps: Sequence[GridPart], link: Link) -> Figure:
    """A metric against the weight of the forward KL, a line a sweep."""
    lines = []
    for i, part in enumerate(sweeps):
        groups = [group for group in part.groups if metric.key in group.summaries]
        name = part.label or sweep_prefix(part)
        summaries = [group.summaries[metric.key] for group in groups]
        estimates = [
            (
                s.value,
                s.low if s.low is not None else s.value,
                s.high if s.high is not None else s.value,
            )
            for s in summaries
        ]
        lines.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": html.escape(name),
                "x": [forward_weight(group) for group in groups],
                "y": [rounded(metric.scale * value) for value, _, _ in estimates],
                "error_y": errors(metric, estimates),
                "line": {
                    "color": list(COLOURS.values())[i % len(COLOURS)],
                    "dash": DASHES[i % len(DASHES)],
                },
                "marker": {"symbol": list(MARKERS.values())[i % len(MARKERS)], "size": 9},
                "text": [html.escape(group.label) for group in groups],
                "customdata": [link(group.entries[0].path) for group in groups],
                "hovertemplate": f"%{{text}}<br>%{{y}} {metric.unit} at weight "
                "%{x}<extra></extra>",
            }
        )
    return layout(
        lines,
        320,
        axis("weight of the forward KL"),
        axis(""),
        f"{metric.title} ({metric.unit})",
        legend=True,
    )


def sweep_prefix(part: GridPart) -> str:
    recipe = part.groups[0].entries[0].recipe
    return f"{recipe.objective.prefix} prefix" if isinstance(recipe, Recipe) else ""


def windows(
    runs: Sequence[Entry], labels: dict[Path, str], visible: set[Path], link: Link
) -> Figure:
    """The window over steps of the runs with a gate, and a mark for each decision with the numbers
    behind it."""
    traces: list[dict[str, Any]] = []
    for run, line in zip(runs, line_styles(runs), strict=True):
        rows = thin(run.metrics)
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


def before_and_after(metric: Metric, pairs: Sequence[BeforeAndAfter], link: Link) -> Figure:
    """A metric before and after GRPO, a row a start, the best end on top."""
    shown = [
        p for p in pairs if metric.key in p.before.summaries and metric.key in p.after.summaries
    ][::-1]
    lines = [textwrap.wrap(pair.after.label, 26) for pair in shown]
    names = ["<br>".join(html.escape(line) for line in each) for each in lines]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [
                x
                for p in shown
                for x in (*(rounded(metric.scale * v) for v in end_values(p, metric)), None)
            ],
            "y": [y for name in names for y in (name, name, None)],
            "line": {"color": COLOURS["model"], "width": 2},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]
    for i, (when, symbol) in enumerate((("before", "circle-open"), ("after", "circle"))):
        groups: list[Group] = [(p.before, p.after)[i] for p in shown]
        summaries = [group.summaries[metric.key] for group in groups]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": when,
                "x": [rounded(metric.scale * summary.value) for summary in summaries],
                "y": names,
                "marker": {
                    "size": 11,
                    "symbol": symbol,
                    "color": COLOURS["GRPO"],
                    "line": {"width": 2},
                },
                "customdata": [link(group.entries[0].path) for group in groups],
                "hovertemplate": f"%{{y}}<br>{when}: %{{x}} {metric.unit}<extra></extra>",
            }
        )
    return layout(
        traces,
        130 + sum(12 + 16 * len(each) for each in lines),
        axis(f"{metric.title} ({metric.unit})"),
        axis(""),
        legend=True,
    )


def end_values(pair: BeforeAndAfter, metric: Metric) -> tuple[float, float]:
    return pair.before.summaries[metric.key].value, pair.after.summaries[metric.key].value


def layout(
    traces: list[dict[str, Any]],
    height: int,
    x: dict[str, Any],
    y: dict[str, Any],
    title: str = "",
    legend: bool = False,
) -> Figure:
    """A figure without colours of its own for text and background: the page sets them."""
    return {
        "title": title,
        "data": traces,
        "layout": {
            "height": height,
            "margin": {"t": 26, "l": 50, "r": 12, "b": 44},
            "xaxis": x,
            "yaxis": y,
            "showlegend": legend,
            "legend": {"orientation": "h", "y": -0.18, "yanchor": "top", "maxheight": 0.35},
            "hovermode": "closest",
        },
    }


def axis(title: str, kind: str = "-") -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 8}, "type": kind, "automargin": True}


def rounded(value: float | None) -> float | None:
    """Five digits, which is more than a screen shows; they make up most of the file."""
    return None if value is None else float(f"{value:.5g}")
