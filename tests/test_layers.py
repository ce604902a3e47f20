"""What reads and judges runs answers at once: none of it waits for torch."""

import subprocess
import sys

import pytest

READERS = ["claims", "comparison", "figures", "findings", "reader", "report", "results", "runlog", "statistics"]
RECIPES = ["config", "estimates", "planning", "study", "study_file", "tables", "tasks", "types"]
OTHERS = ["answers", "files", "progress"]


@pytest.mark.parametrize("module", [*READERS, *RECIPES, *OTHERS])
def test_it_loads_without_torch(module):
    """In a fresh interpreter, so that what other tests have loaded does not count."""
    program = f"import sys, potstill.{module}; print({{'torch', 'transformers'}} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert loaded == "set()\n"
