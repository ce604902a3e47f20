"""The demonstration: the four cells from the shipped pair, side by side, one table and one report."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from potstill.config import METHODS, RecipeError, load_recipe
from potstill.report import print_table, write_report
from potstill.results import read_entry
from potstill.runlog import check_folder, is_done, read_rows

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """One process of the demo: the arguments of its potstill command, and the file or folder it leaves."""

    name: str
    arguments: tuple[str, ...]
    result: Path


def run_demo(out: Path, num_jobs: int | None = None, steps: int | None = None) -> None:
    """Train and evaluate the four cells, evaluate base and teacher, print the table, write `report.html`.

    Finished runs and evaluations found in `out` are reused, unfinished runs are resumed. Raises RunError when `out`
    holds other runs, and RecipeError when a process fails, naming its log.
    """
    started = time.perf_counter()
    num_steps = steps or load_recipe("demo").train.steps
    jobs = []
    # The slowest first, so that both ends of the queue finish together.
    for key in ("dagger", "opd", "offline-rl", "sft"):
        corner = {"objective.prefix": METHODS[key].prefix, "objective.kl": METHODS[key].kl}
        recipe = load_recipe("demo", corner | {"out": str(out / key), "train.steps": num_steps})
        check_folder(recipe)
        arguments = ("train", "demo", "--method", key, "--out", str(out / key), "--train.steps", str(num_steps))
        if not is_done(out / key, recipe):
            jobs.append(Job(key, arguments, out / key))
    for name in ("base", "teacher"):
        result = out / f"{name}.json"
        if not result.exists():
            jobs.append(Job(name, ("evaluate", f"potstill:{name}", "--out", str(result)), result))
    out.mkdir(parents=True, exist_ok=True)
    run_jobs(jobs, num_jobs or os.cpu_count() or 1, out, num_steps)
    results = [out / "base.json", out / "teacher.json", *(out / key for key in METHODS)]
    print_table([read_entry(path) for path in results])
    report = write_report(results, out / "report.html")
    print(f"{time.perf_counter() - started:.0f} s in all. Open {report} for the grid, the curves and some rollouts.")


def run_jobs(jobs: list[Job], num_parallel: int, out: Path, num_steps: int) -> None:
    """Run potstill commands as processes of one thread each, at most `num_parallel` at a time, with their progress."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    waiting, running = list(jobs), {}
    with _Progress([job.name for job in jobs], num_steps) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < num_parallel:
                    job = waiting.pop(0)
                    command = [sys.executable, "-m", "potstill", *job.arguments]
                    with (out / f"{job.name}.log").open("w") as log:
                        running[job] = subprocess.Popen(command, env=one_thread, stdout=log, stderr=log)
                time.sleep(POLL_SECONDS)
                for job, process in list(running.items()):
                    progress.show(job.name, _num_steps_done(job), "running")
                    if process.poll() is None:
                        continue
                    del running[job]
                    log_file = out / f"{job.name}.log"
                    if process.returncode:
                        last_line = (log_file.read_text().strip().splitlines() or ["no output"])[-1]
                        raise RecipeError(f"{job.name} failed: {last_line} (all of its output is in {log_file})")
                    progress.show(job.name, num_steps, "done")
        finally:
            for process in running.values():
                process.terminate()


def _num_steps_done(job: Job) -> int:
    rows = read_rows(job.result / "metrics.jsonl") if not job.result.suffix else []
    return rows[-1]["step"] if rows else 0


class _Progress:
    """A bar a job on a terminal, a line when a job ends elsewhere."""

    def __init__(self, names: list[str], num_steps: int):
        self.live = sys.stderr.isatty()
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=Console(stderr=True))
            self.tasks = {name: self.progress.add_task(name, total=num_steps, start=False) for name in names}

    def __enter__(self):
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *error):
        if self.live:
            self.progress.stop()

    def show(self, name: str, num_steps: int, state: str) -> None:
        if self.live:
            self.progress.start_task(self.tasks[name])
            self.progress.update(self.tasks[name], completed=num_steps)
        elif state == "done":
            print(f"{name}: done", file=sys.stderr, flush=True)
