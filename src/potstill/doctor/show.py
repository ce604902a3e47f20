"""An examination as a table of 100 columns, or as JSON."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from potstill.checks.finding import Finding, Level
from potstill.console.printable import WIDTH, plain, say
from potstill.doctor.examine import Report

LEVEL_SIGNS: dict[Level, tuple[str, str]] = {
    "ok": ("OK", "green"),
    "warning": ("warning", "yellow"),
    "error": ("ERROR", "bold red"),
    "skipped": ("-", "dim"),
    "failed": ("unknown", "yellow"),
}


def print_report(report: Report) -> None:
    """The table of findings, and the verdict as the last line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=plain(f"{report.method}: {report.out}"), width=WIDTH, show_lines=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("measured, and what to do")
    for finding in report.findings:
        sign, style = LEVEL_SIGNS[finding.level]
        table.add_row(plain(finding.check), plain(sign, style), _about(finding))
    Console(width=WIDTH).print(table)
    say(report.verdict)


def print_json(report: Report) -> None:
    """The report as one JSON object, on standard output."""
    say(json.dumps(report.as_data(), indent=1, ensure_ascii=False))


def _about(finding: Finding):
    text = plain(finding.says)
    if finding.fix:
        text.append_text(plain(f"\n-> {finding.fix}", "bold"))
    return text


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Show what is being done: one live line on a terminal, else a line each on standard error."""
    if not sys.stderr.isatty():
        yield lambda text: say(f"{text} ...", error=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(plain(text))
