"""The commands about many runs: `potstill runs`, `report` and `study`, one function for each."""

import json
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from potstill.cli.overrides import refuse_overrides
from potstill.config import RecipeError
from potstill.console.printable import WIDTH, one_line, say
from potstill.runs.listing import ListedRun, list_runs
from potstill.runs.quantities import SHOWN

# Columns of the widest name and method in the table of runs.
NAME_WIDTH, METHOD_WIDTH = 28, 18
LEGEND = (
    "loss: of the last step; Avg: right answers (%) at the first temperature; time: of all steps"
)


def runs(
    overrides: dict[str, Any],
    folder: Positional[Path],
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """List the runs in a folder: how far each is, and its last numbers.

    Args:
        folder: A folder with run folders in it, however deep.
        as_json: Print JSON instead of a table, with an object a run.
    """
    refuse_overrides(overrides)
    found = list_runs(folder)
    if as_json:
        say(json.dumps([_plain(run) for run in found], indent=1))
        return
    say(*_table(folder, found), LEGEND)


def report(
    overrides: dict[str, Any], paths: Positional[tuple[Path, ...]], out: Path = Path("report.html")
) -> None:
    """Write one HTML file that compares runs, and print a summary.

    The numbers are also in `results.json` beside it.

    Args:
        paths: Run folders, study folders, and JSON files that `potstill evaluate --out` wrote.
        out: The file to write.
    """
    from potstill.report.page import write_report
    from potstill.report.terminal import print_summary

    refuse_overrides(overrides)
    page = write_report(paths, out)
    print_summary(page)
    say(f"wrote {page}")


def study(
    overrides: dict[str, Any],
    study: Positional[str],
    jobs: int | None = None,
    dry_run: bool = False,
    report: bool = True,
    on: Literal["here", "slurm", "local"] = "here",
    options: tuple[str, ...] = (),
) -> None:
    """Run a grid of distillations, each once, and write one report of all.

    Prints the plan with estimated time and disk first. The same command goes on after a kill; what
    crashed is done again. Exits with 1 if anything crashed.

    Args:
        study: A TOML file, or the name of a shipped study such as quick.
        jobs: Processes side by side; by default one a core, or one where there is a GPU. On a
            cluster, jobs at once; by default all.
        dry_run: Print the plan, run by run, and stop.
        report: Write report.html into the study's folder at the end.
        on: Where the runs are: processes here, which end with the command; jobs of Slurm, or
            processes of submitit's, which go on without it and are found again.
        options: Of submitit, for slurm and local: timeout_min=600 slurm_partition=gpu
            gpus_per_node=1 and the like.
    """
    from potstill.cli.app import main
    from potstill.study.cluster import Cluster, read_options
    from potstill.study.file import read_study_file
    from potstill.study.run import run_study

    refuse_overrides(overrides)
    found = read_study_file(study)
    if options and on == "here":
        raise RecipeError(
            "--options is set and --on is here, which has none; choose slurm or local"
        )
    cluster = None if on == "here" else Cluster(on, read_options(options))
    is_whole = run_study(found, main, jobs, dry_run, cluster)
    if report and not dry_run:
        from potstill.report.page import write_report
        from potstill.report.terminal import print_summary

        page = write_report([found.out], found.out / "report.html")
        print_summary(page)
        say(f"Open {page} for grids, claims, curves and rollouts.")
    if not is_whole:
        sys.exit(1)


def _plain(run: ListedRun) -> dict[str, Any]:
    """A run as plain data; a number that is not finite is null, as JSON has none."""
    best = run.best
    return {
        "name": run.name,
        "folder": str(run.folder),
        "method": run.method,
        "state": run.state,
        "step": run.step,
        "num_steps": run.num_steps,
        "loss": _finite(run.loss),
        "evaluations": [{"temperature": t, "avg": _finite(avg)} for t, avg in run.avgs],
        "best_validation": best and {**best._asdict(), "value": _finite(best.value)},
        "seconds": round(run.seconds, 1),
        "trouble": run.trouble,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _table(folder: Path, found: Sequence[ListedRun]) -> list[str]:
    """A line a run, named by its place in the folder; a long name has a line of its own, as have
    troubles."""
    names = [
        one_line(run.folder.relative_to(folder) if run.folder != folder else run.name)
        for run in found
    ]
    cells = [("method", "step", "state", "loss", "Avg", "time"), *map(_cells, found)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    margin = max(len(name) for name in ["run", *names] if len(name) <= NAME_WIDTH)
    lines = _wrapped(f"{len(found)} {'run' if len(found) == 1 else 'runs'} in {folder}")
    for name, row, run in zip(["run", *names], cells, [None, *found], strict=True):
        if len(name) > margin:
            lines += _wrapped(name)
            name = ""
        columns = [
            cell.ljust(width) for cell, width in zip((name, *row), (margin, *widths), strict=True)
        ]
        lines.append("  ".join(columns).rstrip())
        if run is not None and run.best is not None:
            shown, value = SHOWN[run.best.quantity], run.best.value
            text = f"{shown.title}: {shown.scale * value:.{shown.digits}f}"
            lines += _wrapped(f"best validation, after step {run.best.step}: {text}", "  ")
        if run is not None and run.trouble is not None:
            lines += _wrapped(run.trouble, "  ")
    return lines


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        one_line(text),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def _cells(run: ListedRun) -> tuple[str, ...]:
    method = one_line(run.method or "")
    return (
        method if len(method) <= METHOD_WIDTH else f"{method[: METHOD_WIDTH - 3]}...",
        "" if run.num_steps is None else f"{run.step}/{run.num_steps}",
        run.state,
        "" if run.loss is None else f"{run.loss:.4g}",
        f"{100 * run.avgs[0][1]:.1f}" if run.avgs else "",
        "" if run.num_steps is None else _duration(run.seconds),
    )


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:33 and 2:33."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
