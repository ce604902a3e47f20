"""One self-contained HTML file from run folders and evaluation files. Reads files only; needs no torch.

Every number in it is read from a file that it names, and text that a model wrote is escaped.
"""

import html
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.config import METHODS
from potstill.reader import reader_data
from potstill.results import Entry, read_entry
from potstill.runlog import RunError

COLOURS = {"sft": "#4477aa", "dagger": "#228833", "offline-rl": "#ccbb44", "opd": "#ee6677"}
OTHER_COLOURS = ("#66ccee", "#aa3377", "#999933", "#882255", "#44aa99", "#332288")
GREYS = ("#bbbbbb", "#555555")
SYMBOLS = ("circle", "diamond", "square", "cross")
CURVES = (
    ("forward_kl", "forward KL (nats a token)"),
    ("reverse_kl", "reverse KL (nats a token)"),
    ("student_entropy_before_answer", "student entropy up to the answer (nats)"),
    ("length", "completion length (tokens)"),
    ("truncation", "share of completions cut by the window"),
    ("grad_norm", "gradient norm before clipping"),
)
# What controllers move, shown where it moves in any run.
CONTROLLED = (("window", "window (tokens)"), ("forward_weight", "weight of the forward KL"))


def table(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison, for the terminal and for the report."""
    temperatures = sorted({row["temperature"] for entry in entries for row in entry.evals}, reverse=True)
    num_responses = max((row["num_responses"] for entry in entries for row in entry.evals), default=1)
    k = min(8, num_responses)
    header = ["model"]
    for temperature in temperatures:
        header += [f"Avg@{num_responses} T={temperature:g}", f"Pass@{k} T={temperature:g}"]
    header += ["entropy", "length", "truncated", "loss tokens", "seconds"]
    rows = []
    for entry in entries:
        by_temperature = {row["temperature"]: row for row in entry.evals}
        cells = [entry.name]
        for temperature in temperatures:
            row = by_temperature.get(temperature)
            cells += [_percent(row["avg"]), _percent(row["pass"][str(k)])] if row else ["", ""]
        first = by_temperature.get(temperatures[0]) if temperatures else None
        cells += (
            [_number(first["entropy"], 3), _number(first["length"], 0), _percent(first["truncation"])]
            if first
            else [""] * 3
        )
        cells += [
            f"{entry.num_loss_tokens:,}" if entry.num_loss_tokens else "",
            f"{entry.seconds:.0f}" if entry.seconds else "",
        ]
        rows.append(cells)
    return header, rows


def level_table(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of Avg by difficulty level, for tasks that have levels."""
    levels = sorted({level for entry in entries for row in entry.evals for level in row["levels"] if level})
    rows = []
    for entry in entries if levels else ():
        for row in entry.evals:
            estimates = [row["levels"].get(level) for level in levels]
            cells = [_percent(estimate["avg"]) if estimate else "" for estimate in estimates]
            rows.append([entry.name, f"{row['temperature']:g}", *cells])
    return ["model", "T", *levels], rows


def print_table(entries: Sequence[Entry]) -> None:
    """The comparison on the terminal: a column for each model, intervals under the values."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    header, rows = table(entries)
    (_, *names), *quantities = zip(header, *rows, strict=True)
    quantities = [(name, *cells) for name, *cells in quantities if any(cells)]
    shown = Table(show_lines=True)
    shown.add_column(min_width=max(len(name) for name, *_ in quantities))
    for name, *column in zip(names, *(cells for _, *cells in quantities), strict=True):
        width = max(len(line) for cell in column for line in cell.replace(" [", "\n[").split("\n"))
        shown.add_column(Text(name), justify="right", min_width=width)
    for name, *cells in quantities:
        shown.add_row(name, *(Text(cell.replace(" [", "\n[")) for cell in cells))
    # A table that is folded to a narrow window cannot be read; a cut one cannot either, so it keeps its width.
    needed = Console(width=10_000).measure(shown).minimum
    Console(width=max(Console().width, needed)).print(shown)
    print(table_note(entries))


def table_note(entries: Sequence[Entry]) -> str:
    """What the table's numbers are of, in a line; a warning when they are not of the same thing."""
    rows = [row for entry in entries for row in entry.evals]
    if not rows:
        return "No evaluation was found."
    first = rows[0]
    note = (
        f"{first['num_problems']} held-out problems, {first['num_responses']} responses each, at most "
        f"{first['settings']['max_tokens']} tokens; accuracy and truncation in %; [95 % bootstrap interval over "
        "problems]; entropy (nats a token), length and truncation at the highest temperature; seconds of training."
    )
    compared = ("source", "split", "template", "num_problems", "num_responses", "max_tokens", "seed")
    differing = [name for name in compared if any(row["settings"][name] != first["settings"][name] for row in rows)]
    if differing:
        note += f" WARNING: the evaluations differ in {', '.join(differing)}, so their numbers cannot be compared."
    return note


def _percent(estimate: Sequence[float]) -> str:
    value, low, high = (100 * x for x in estimate)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _number(estimate: Sequence[float], digits: int) -> str:
    value, low, high = estimate
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write the report over run folders and evaluation files; returns its path. Raises RunError."""
    import jinja2
    from plotly.offline import get_plotlyjs

    entries = [read_entry(path) for path in paths]
    if not entries:
        raise RunError("a report needs at least one run folder or evaluation file")
    header, rows = table(entries)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("potstill", "templates"), autoescape=True)
    runs = [entry for entry in entries if entry.metrics]
    colours = colour_by_path(entries)
    text = environment.get_template("report.html").render(
        grid=grid(entries),
        header=header,
        rows=rows,
        paths=[str(entry.path) for entry in entries],
        note=table_note(entries),
        levels=level_table(entries),
        figures=[figure for figure in (curves(runs, colours), trade_off(entries, colours)) if figure],
        reader=reader_data(runs),
        plotly=get_plotlyjs(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    return out


def colour_by_path(entries: Sequence[Entry]) -> dict[Path, str]:
    """One colour an entry: a corner's own for its first run, then others in turn; greys for models without a run."""
    others, greys = itertools.cycle(OTHER_COLOURS), itertools.cycle(GREYS)
    colours: dict[Path, str] = {}
    for entry in entries:
        own = COLOURS.get(entry.cell or "")
        if not entry.metrics:
            colours[entry.path] = next(greys)
        else:
            colours[entry.path] = own if own and own not in colours.values() else next(others)
    return colours


def grid(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The corners with their runs' first-temperature results, in reading order."""
    cells = []
    for key, method in METHODS.items():
        found = [entry for entry in entries if entry.cell == key and entry.evals]
        lines = []
        for entry in found:
            for row in entry.evals:
                lines.append(f"T={row['temperature']:g}: Avg@{row['num_responses']} {_percent(row['avg'])} %")
            lines.append(f"entropy {_number(entry.evals[0]['entropy'], 3)} nats")
        cells.append({"key": key, "method": method, "lines": lines, "colour": COLOURS[key]})
    return cells


def curves(runs: Sequence[Entry], colours: dict[Path, str]) -> str:
    """Training curves of all runs, one panel a quantity, as an HTML fragment."""
    if not runs:
        return ""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    shown = [(name, title) for name, title in CURVES if any(name in run.metrics[0] for run in runs)]
    shown += [each for each in CONTROLLED if any(len({row.get(each[0]) for row in run.metrics}) > 1 for run in runs)]
    num_rows = math.ceil(len(shown) / 2)
    figure = make_subplots(rows=num_rows, cols=2, subplot_titles=[title for _, title in shown], vertical_spacing=0.09)
    for i, (name, _) in enumerate(shown):
        for run in runs:
            figure.add_trace(
                go.Scatter(
                    x=[row["step"] for row in run.metrics],
                    y=[row.get(name) for row in run.metrics],
                    name=html.escape(run.name),
                    legendgroup=str(run.path),
                    showlegend=i == 0,
                    line={"color": colours[run.path], "width": 1.5},
                ),
                row=i // 2 + 1,
                col=i % 2 + 1,
            )
    figure.update_layout(height=290 * num_rows, template="plotly_white", margin={"t": 60, "l": 50, "r": 20, "b": 40})
    figure.update_layout(legend={"orientation": "h", "y": 1.06})
    figure.update_xaxes(title_text="step", row=num_rows)
    return figure.to_html(include_plotlyjs=False, full_html=False)


def trade_off(entries: Sequence[Entry], colours: dict[Path, str]) -> str:
    """Accuracy against entropy, a point for each model and temperature, with intervals, as an HTML fragment."""
    if not any(entry.evals for entry in entries):
        return ""
    import plotly.graph_objects as go

    figure = go.Figure()
    temperatures = sorted({row["temperature"] for entry in entries for row in entry.evals}, reverse=True)
    symbols = dict(zip(temperatures, SYMBOLS * len(temperatures), strict=False))
    for entry in entries:
        avg = [row["avg"] for row in entry.evals]
        figure.add_trace(
            go.Scatter(
                x=[row["entropy"][0] for row in entry.evals],
                y=[100 * value for value, _, _ in avg],
                error_y={
                    "type": "data",
                    "array": [100 * (high - value) for value, _, high in avg],
                    "arrayminus": [100 * (value - low) for value, low, _ in avg],
                },
                mode="markers",
                marker={
                    "size": 11,
                    "color": colours[entry.path],
                    "symbol": [symbols[row["temperature"]] for row in entry.evals],
                },
                name=html.escape(entry.name),
            )
        )
    figure.update_layout(
        height=460,
        template="plotly_white",
        title="Accuracy against entropy of the responses: "
        + ", ".join(f"{symbol} at T={temperature:g}" for temperature, symbol in symbols.items()),
        xaxis_title="token entropy (nats)",
        yaxis_title="Avg (%)",
    )
    return figure.to_html(include_plotlyjs=False, full_html=False)
