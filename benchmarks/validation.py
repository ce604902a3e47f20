"""The share of a run that its validations take by default, on the shipped pair.

Each run is of the demo's sizes and validates as it does by default. Seconds are those of the run's
logs: wall time of each step and of each validation, the first one with what the teacher writes.
"""

import tempfile
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

import potstill
from potstill.config import load_recipe
from potstill.runs.run_folder import read_rows

CASES = {
    "OPD": {},
    "SFT": {"objective.prefix": "teacher", "objective.kl": "forward"},
    "dataset": {"data.source": "multiplication:persona", "objective.prefix": "dataset"},
    "OPD, 8 prompts a step": {"train.prompts_per_step": 8},
}


def main(threads: int = 1, steps: int = 120, cases: tuple[str, ...] = tuple(CASES)) -> None:
    """Train, and print how long validations took."""
    torch.set_num_threads(threads)
    table = Table(title="validation by default")
    for name in ("run", "steps", "validations", "a step (s)", "first (s)", "later (s)", "share"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for name in cases:
        with tempfile.TemporaryDirectory() as folder:
            fields = {"out": f"{folder}/run", "evaluation": {}, "train.steps": steps}
            run = potstill.train(load_recipe("demo", fields | CASES[name]), quiet=True).folder
            table.add_row(name, *_measured(run))
    Console().print(table)


def _measured(run: Path) -> list[str]:
    of_steps = [row["seconds"] for row in read_rows(run / "metrics.jsonl")]
    spent = [row["seconds"] for row in read_rows(run / "validation.jsonl")]
    if not spent:
        return [str(len(of_steps)), "0", f"{sum(of_steps) / len(of_steps):.2f}", "", "", "0.0 %"]
    later = spent[1:]
    share = sum(spent) / (sum(of_steps) + sum(spent))
    return [
        str(len(of_steps)),
        str(len(spent)),
        f"{sum(of_steps) / len(of_steps):.2f}",
        f"{spent[0]:.2f}",
        f"{sum(later) / len(later):.2f}",
        f"{100 * share:.1f} %",
    ]


if __name__ == "__main__":
    tyro.cli(main)
