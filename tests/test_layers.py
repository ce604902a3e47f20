"""Modules that read and judge runs answer at once: none of them waits for torch."""

import subprocess
import sys

READERS = ["claims", "comparison", "figures", "findings", "page", "terminal", "viewer"]
REPORT = [f"report.{name}" for name in READERS]
RUNS = ["runs.results", "runs.run_folder", "statistics"]
STUDY = ["study.estimates", "study.file", "study.items", "study.planning", "study.run"]
OTHERS = ["answers", "config", "console.progress", "files", "tasks", "tasks.tables", "types"]


PROGRAM = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"potstill.{name}")
    if found := {"torch", "transformers"} & set(sys.modules):
        sys.exit(f"{name} loads {found}")
"""


def test_what_reads_and_reports_loads_without_torch():
    """In a fresh interpreter, so that what other tests have loaded does not count."""
    modules = [*REPORT, *RUNS, *STUDY, *OTHERS]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *modules], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
