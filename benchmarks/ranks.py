"""Weak scaling: the seconds of a step on 1, 2 and 4 ranks with equal work a rank.

Each run is `torchrun` with gloo on this machine, one thread a rank, on the shipped pair with
student prefixes (`opd`): as many prompts a rank, and responses of up to the window. A figure is the
median of a run's steps but the first two, the smallest of its rounds; the sizes take turns. The
ratio to one rank is what sharding, gathering and waiting cost, and where there are fewer cores than
ranks, what sharing them does.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro


def main(
    ranks: tuple[int, ...] = (1, 2, 4),
    prompts_a_rank: int = 16,
    window: int = 48,
    steps: int = 8,
    rounds: int = 2,
) -> None:
    """Run every size in turns, and print a line a size."""
    seconds: dict[int, list[float]] = {num: [] for num in ranks}
    parts: dict[int, dict[str, float]] = {}
    for _ in range(rounds):
        for num in ranks:
            found = run(num, prompts_a_rank, window, steps)
            seconds[num].append(found["seconds"])
            parts[num] = found
    one = min(seconds[ranks[0]])
    print(f"{os.cpu_count()} cores, {prompts_a_rank} prompts a rank, window {window}, CPU, gloo")
    for num in ranks:
        least, each = min(seconds[num]), parts[num]
        about = ", ".join(f"{name} {value:.3f}" for name, value in each.items() if value)
        print(f"{num} ranks: {least:.3f} s a step, {least / one:.2f} of one rank ({about})")


def run(num_ranks: int, prompts_a_rank: int, window: int, steps: int) -> dict[str, float]:
    """Medians of a run's timed parts, a step."""
    with tempfile.TemporaryDirectory(prefix="potstill-ranks-") as folder:
        out = Path(folder) / "run"
        fields = {
            "out": out,
            "train.steps": steps,
            "train.prompts_per_step": prompts_a_rank * num_ranks,
            "train.checkpoint_every": steps,
            "window.tokens": window,
            "data.num_prompts": 512,
            "evaluation.source": "multiplication",
            "evaluation.num_problems": 1,
            "evaluation.num_responses": 1,
        }
        overrides = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
        command += [str(num_ranks), "-m", "potstill", "train", "demo", "--method", "opd"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *overrides], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{num_ranks} ranks: {done.stderr[-2000:]}")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        names = ("seconds", "rollout_seconds", "teacher_seconds", "student_seconds")
        return {name: statistics.median(row.get(name) or 0.0 for row in rows[2:]) for name in names}


if __name__ == "__main__":
    tyro.cli(main)
