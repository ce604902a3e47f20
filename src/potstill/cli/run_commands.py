"""The commands about many runs: `potstill report` and `study`, one function for each."""

import sys
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from potstill.cli.overrides import refuse_overrides
from potstill.console.printable import say


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
) -> None:
    """Run a grid of distillations, each once, and write one report of all.

    Prints the plan with estimated time and disk first. The same command goes on after a kill; what
    crashed is done again. Exits with 1 if anything crashed.

    Args:
        study: A TOML file, or the name of a shipped study such as quick.
        jobs: Processes side by side; by default one a core, or one where there is a GPU.
        dry_run: Print the plan, run by run, and stop.
        report: Write report.html into the study's folder at the end.
    """
    from potstill.cli.app import main
    from potstill.study.file import read_study_file
    from potstill.study.run import run_study

    refuse_overrides(overrides)
    found = read_study_file(study)
    is_whole = run_study(found, main, jobs, dry_run)
    if report and not dry_run:
        from potstill.report.page import write_report
        from potstill.report.terminal import print_summary

        page = write_report([found.out], found.out / "report.html")
        print_summary(page)
        say(f"Open {page} for grids, claims, curves and rollouts.")
    if not is_whole:
        sys.exit(1)
