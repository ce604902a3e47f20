"""The paper's two remedies on the embedded task: KL mixing and the entropy-gated window, three seeds, two step budgets.

Student prefixes everywhere. Reverse KL with a short, a long and a gated window; then forward weights from 0 to 1 at the
long window (0 is reverse KL, 1 is forward KL). Runs that are there are not repeated, so the command can be stopped and
given again. Prints tables in Markdown: means over the seeds, in brackets the means of both ends of the seeds' 95 %
bootstrap intervals over problems, then the seeds' own values.
"""

import datetime
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import tyro

from potstill.config import load_recipe
from potstill.demo import Job, run_jobs
from potstill.runlog import check_folder, is_done, read_rows

SEEDS = (0, 1, 2)
STEPS = (120, 360)
SHORT, LONG = 24, 128
REVERSE, MIXED = {"objective.kl": "reverse"}, {"objective.kl": "mixed"}


def cases(steps: int) -> dict[str, dict]:
    """What a run of so many steps changes in the demo recipe, by name."""
    gate = {
        "window.schedule": "entropy-gated",
        "window.start": 16,
        "window.check_every": steps // 12,
        "window.num_probes": 32,
        "window.patience": 1,
    }
    return {
        f"reverse KL, window {SHORT}": {**REVERSE, "window.tokens": SHORT},
        f"reverse KL, window {LONG}": REVERSE,
        f"reverse KL, gated 16 to {LONG}": REVERSE | gate,
        **{f"forward weight {w:g}": MIXED | {"objective.forward_weight": w} for w in (0.2, 0.5, 0.8)},
        "forward KL": {"objective.kl": "forward"},
    }


def main(out: Path = Path("runs/remedies"), jobs: int | None = None, steps: tuple[int, ...] = STEPS) -> None:
    """Run what is missing and print the tables."""
    started = time.perf_counter()
    waiting, folders = [], {}
    for num_steps in steps:
        for name, overrides in cases(num_steps).items():
            for seed in SEEDS:
                folder = out / f"{name.replace(' ', '-').replace(',', '')}-{num_steps}-{seed}"
                settings = {
                    "objective.prefix": "student",
                    "train.steps": num_steps,
                    "train.seed": seed,
                    "data.seed": seed,
                    "evaluation.num_problems": 120,
                    **overrides,
                }
                recipe = load_recipe("demo", settings | {"out": str(folder)})
                check_folder(recipe)
                folders[num_steps, name, seed] = folder
                if not is_done(folder, recipe):
                    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
                    waiting.append(Job(folder.name, ("train", "demo", "--out", str(folder), *arguments), folder))
    out.mkdir(parents=True, exist_ok=True)
    run_jobs(waiting, jobs or os.cpu_count() or 1, out, max(steps))
    for num_steps in steps:
        print(f"\n**{num_steps} steps**\n")
        print_table({name: [folders[num_steps, name, seed] for seed in SEEDS] for name in cases(num_steps)})
    print(
        f"\n{datetime.date.today()}: Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores, {time.perf_counter() - started:.0f} s"
    )


def print_table(runs: dict[str, list[Path]]) -> None:
    columns = [
        ("Avg@16 T=1", lambda r: r[1.0]["avg"], 100, 1),
        ("Pass@8 T=1", lambda r: r[1.0]["pass"]["8"], 100, 1),
        ("Avg@16 T=0.6", lambda r: r[0.6]["avg"], 100, 1),
        ("Pass@8 T=0.6", lambda r: r[0.6]["pass"]["8"], 100, 1),
        ("entropy", lambda r: r[1.0]["entropy"], 1, 3),
        ("entropy before the answer", lambda r: r[1.0]["entropy_before_answer"], 1, 3),
        ("length", lambda r: r[1.0]["length"], 1, 0),
        ("cut, %", lambda r: r[1.0]["truncation"], 100, 1),
    ]
    names = [name for name, *_ in columns]
    print("| run | " + " | ".join([*names, "last window", "GFLOPs"]) + " |")
    print("|---" * (len(names) + 3) + "|")
    for name, folders in runs.items():
        evals = [{row["temperature"]: row for row in read_rows(folder / "evals.jsonl")} for folder in folders]
        last = [read_rows(folder / "metrics.jsonl")[-1] for folder in folders]
        cells = []
        for _, pick, factor, digits in columns:
            values, lows, highs = zip(*(pick(each) for each in evals), strict=True)
            mean, low, high = (factor * statistics.mean(each) for each in (values, lows, highs))
            each = ", ".join(f"{factor * value:.{digits}f}" for value in values)
            cells.append(f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}] ({each})")
        cells.append(", ".join(str(row["window"]) for row in last))
        cells.append(", ".join(f"{row['total_flops'] / 1e9:,.0f}" for row in last))
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    tyro.cli(main)
