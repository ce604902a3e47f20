"""The cost of a step after the window has grown in mid-run, beside a run whose window was as long
from the start.

The two take turns, several rounds; what is compared is the time of all steps at the long window
over their loss tokens. A growing window reallocates the sampler's cache and the loss's tiles at
most once, so the ratio should be 1.
"""

import datetime
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import tyro

from potstill.config import load_recipe
from potstill.runs.run_folder import read_rows
from potstill.training.loop import train

SHORT, LONG, BEFORE, STEPS = 16, 128, 10, 30


def main(
    rounds: int = 3,
    threads: int = 1,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measure, print the ratio, and write the numbers to a JSON file."""
    torch.set_num_threads(threads)
    shared = {
        "train.schedule": "constant",
        "train.lr": 1e-5,
        "evaluation": {},
        "train.checkpoint_every": 1000,
    }
    grows = {"window.schedule": "linear", "window.start": SHORT, "window.over_steps": BEFORE + 1}
    cases = {"fixed": {"train.steps": STEPS}, "grown": grows | {"train.steps": BEFORE + STEPS}}
    milliseconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, overrides in cases.items():
            folder = Path(tempfile.mkdtemp(prefix="potstill-window-"))
            train(
                load_recipe("demo", shared | overrides | {"out": str(folder / "run")}), quiet=True
            )
            # The first step at a window is left out: it may allocate.
            rows = [r for r in read_rows(folder / "run/metrics.jsonl") if r["window"] == LONG][1:]
            tokens = sum(row["num_loss_tokens"] for row in rows)
            milliseconds[name].append(1000 * sum(row["seconds"] for row in rows) / tokens)
            shutil.rmtree(folder)
    fixed, grown = (min(milliseconds[name]) for name in ("fixed", "grown"))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{datetime.date.today()}: {versions}, {threads} thread{'s' * (threads > 1)}")
    print(
        f"milliseconds a loss token at window {LONG}: fixed {fixed:.4f}, grown from {SHORT} "
        f"{grown:.4f}"
    )
    print(f"ratio {grown / fixed:.3f}")
    if json_file is not None:
        json_file.write_text(json.dumps({**milliseconds, "ratio": grown / fixed}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
