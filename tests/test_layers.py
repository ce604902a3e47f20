"""Modules that read and judge runs answer at once: none of them waits for torch."""

import subprocess
import sys

import pytest

READERS = ["claims", "comparison", "figures", "findings", "page", "terminal", "viewer"]
REPORT = [f"report.{name}" for name in READERS]
RUNS = ["runs.results", "runs.run_folder", "statistics"]
STUDY = ["study.estimates", "study.file", "study.items", "study.planning", "study.run"]
OTHERS = ["answers", "config", "console.progress", "files", "tasks", "tasks.tables", "types"]


@pytest.mark.parametrize("module", [*REPORT, *RUNS, *STUDY, *OTHERS])
def test_it_loads_without_torch(module):
    """In a fresh interpreter, so that what other tests have loaded does not count."""
    program = (
        f"import sys, potstill.{module}; print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert loaded == "set()\n"
