"""The report's figures: from entries to plotly's JSON, as plain data that the page draws in its own
colours.

Names that users chose are escaped, because plotly reads some HTML. `meta` (of a line) and
`customdata` (of a mark) are the links to run folders.
"""

import html
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from potstill.report.comparison import BeforeAndAfter, GridPart, Group, forward_weight
from potstill.report.metrics import Metric, stored
from potstill.runs.results import Entry

Figure = dict[str, Any]
Link = Callable[[Path], str]


class Style(NamedTuple):
    """How a run looks in every figure."""

    colour: str
    dash: str
    symbol: str


Styles = dict[Path, Style]

# Colours by Okabe and Ito, which colour-blind readers tell apart, on white and on black alike.
# Marks and dashes change with them, so that nothing is told by colour alone.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
GREY = "#888888"
# How many marks of a figure bear their names, and the corners at which neighbours have them.
NUM_NAMED_MARKS = 12
CORNERS = ("top right", "bottom left", "bottom right", "top left")


class Row(NamedTuple):
    """A row of a ranking: its name, its value with the ends of its interval, and where it leads."""

    label: str
    path: Path
    href: str
    value: float
    low: float | None
    high: float | None


def style_at(group: int, seed: int) -> Style:
    """The style of a run: colour and mark are its group's, the dash changes with the seed too.

    The first six groups differ in all of them, and those that share a colour in mark and dash.
    """
    num = len(COLOURS)
    other = group + group // num
    return Style(COLOURS[group % num], DASHES[(other + seed) % num], MARKERS[other % num])


def line_of(style: Style) -> dict[str, Any]:
    """Plotly's line in this style."""
    return {"color": style.colour, "dash": style.dash, "width": 1.8}


def trade_off(
    avg: Metric,
    other: Metric,
    entries: Sequence[Entry],
    labels: dict[Path, str],
    named: dict[Path, str],
    styles: Styles,
    link: Link,
) -> Figure:
    """Accuracy against another metric, a mark a run with its intervals.

    `named` are the runs whose marks bear a name, as long as these are few.
    """
    found = []
    for entry in entries:
        x, y = stored(entry, other), stored(entry, avg)
        if x is not None and y is not None:
            found.append((entry, x, y))
    found.sort(key=lambda each: each[1][0])
    firsts = [entry for entry, _, _ in found if entry.path in named]
    corners = {entry.path: CORNERS[i % len(CORNERS)] for i, entry in enumerate(firsts)}
    is_named = len(firsts) <= NUM_NAMED_MARKS
    marks = {
        "type": "scatter",
        "mode": "markers+text" if is_named else "markers",
        "textposition": [corners.get(entry.path, CORNERS[0]) for entry, _, _ in found],
        "cliponaxis": False,
        "x": [rounded(other.scale * x[0]) for _, x, _ in found],
        "y": [rounded(avg.scale * y[0]) for _, _, y in found],
        "error_x": errors(other, [x for _, x, _ in found]),
        "error_y": errors(avg, [y for _, _, y in found]),
        "marker": {
            "size": 10,
            "color": [styles[entry.path].colour for entry, _, _ in found],
            "symbol": [styles[entry.path].symbol for entry, _, _ in found],
        },
        "text": [wrapped(named.get(entry.path, ""), 20) for entry, _, _ in found],
        "hovertext": [html.escape(labels[entry.path]) for entry, _, _ in found],
        "customdata": [link(entry.path) for entry, _, _ in found],
        "hovertemplate": f"%{{hovertext}}<br>{avg.title} %{{y:.1f}} %<br>{other.title} %{{x}} "
        f"{other.unit}<extra></extra>",
    }
    kind = "log" if other.temperature is None else "linear"
    x_axis, y_axis = axis(f"{other.title} ({other.unit})", kind), axis(f"{avg.title} (%)")
    return layout([marks], 400, x_axis, y_axis, f"{avg.title} against {other.title}")


def wrapped(text: str, width: int) -> str:
    """The text in lines, as plotly writes it."""
    return "<br>".join(html.escape(line) for line in textwrap.wrap(text, width))


def ranking_bars(title: str, rows: Sequence[Row], styles: Styles) -> Figure:
    """A quantity of groups or runs as a mark and an interval a row, the first on top."""
    names = [wrapped(row.label, 24) for row in rows]
    low_ends = [row.value if row.low is None else row.low for row in rows]
    high_ends = [row.value if row.high is None else row.high for row in rows]
    bars = {
        "type": "data",
        "array": [rounded(h - row.value) for h, row in zip(high_ends, rows, strict=True)],
        "arrayminus": [rounded(row.value - low) for low, row in zip(low_ends, rows, strict=True)],
        "thickness": 2,
        "width": 5,
        "color": GREY,
    }
    marks = {
        "type": "scatter",
        "mode": "markers+text",
        "x": [rounded(row.value) for row in rows],
        "y": names,
        "error_x": bars,
        "text": [f"{row.value:.4g}" for row in rows],
        "textposition": "top center",
        "marker": {
            "size": 12,
            "color": [styles[row.path].colour for row in rows],
            "symbol": [styles[row.path].symbol for row in rows],
        },
        "customdata": [row.href for row in rows],
        "hovertemplate": "%{y}<br>%{x}<extra></extra>",
    }
    height = 100 + sum(42 + 14 * name.count("<br>") for name in names)
    # The first row on top, with room above it for its value.
    places = {"range": [len(rows) - 0.5, -0.75]}
    return layout([marks], height, axis(title), axis("", "category") | places, title)


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
        "color": GREY,
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
                    "color": COLOURS[i % len(COLOURS)],
                    "dash": DASHES[i % len(DASHES)],
                },
                "marker": {"symbol": MARKERS[i % len(MARKERS)], "size": 9},
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
    return f"{recipe.objective.prefix} prefix" if recipe is not None else ""


def before_and_after(metric: Metric, pairs: Sequence[BeforeAndAfter], link: Link) -> Figure:
    """A metric before and after reinforcement learning, a row a start, the best end on top."""
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
            "line": {"color": GREY, "width": 2},
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
                    "color": COLOURS[0],
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
