"""Several potstill commands as processes side by side: what waits for what, what crashed, how far
all of it is."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from potstill.console.printable import one_line, plain, say
from potstill.files import write_atomically

POLL_SECONDS = 0.25
# Modules that every job would load: parts of transformers load only with a model, which takes
# longer than a small job.
LOADED = [
    "potstill.cli.recipe_commands",
    "potstill.evaluation.scores",
    "potstill.training.loop",
    "transformers.modeling_utils",
]
LOADED += ["transformers.generation.utils", "transformers.models.auto.modeling_auto"]

# Runs one command, given its arguments. A function at the top of a module, as another process loads
# it by its name.
Execute = Callable[[list[str]], None]


class Started(Protocol):
    """A job that was begun, wherever it runs."""

    @property
    def exitcode(self) -> int | None:
        """None until it ends; then 0, or minus the signal that ended it, or another number."""
        ...

    def terminate(self) -> None:
        """End it, where it ends with us."""
        ...

    def join(self) -> None:
        """Wait until it has ended, where it ends with us."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """One potstill command.

    `path` is what it leaves: a run folder, or a file; `needs` are paths of jobs that must be done
    before. Its output goes to `log`. `done` is a file that a job leaves when it is done; where the
    command does not write it, it is written here (`marks`).
    """

    name: str
    arguments: tuple[str, ...]
    path: Path
    log: Path
    done: Path
    marks: bool = False
    needs: tuple[Path, ...] = ()
    num_steps: int = 0


def as_processes(execute: Execute, one_thread: bool) -> Callable[[Job], Started]:
    """A function that begins a job as a process of this machine, which ends when we do. With
    `one_thread` it computes with one thread."""
    # Processes are copies of one that has loaded everything, where the system can do that: loading
    # takes seconds.
    context: Any = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(LOADED)

    def start(job: Job) -> Started:
        given = (execute, job.arguments, job.log, one_thread)
        process = context.Process(target=_execute_apart, args=given)
        process.start()
        return process

    return start


def run_jobs(
    jobs: Sequence[Job],
    start: Callable[[Job], Started],
    *,
    num_parallel: int,
    on_end: Callable[[Job, str | None], None],
) -> None:
    """Run jobs, at most `num_parallel` at a time and each after what it needs; the others go on
    when one crashes.

    `on_end` is told of each job that ends, with None, or the last line of what a crashed one
    printed. What needs a crashed job is not begun.
    """
    waiting = list(jobs)
    running: dict[Job, Started] = {}
    unmet = {job.path for job in jobs}
    with _display(len(jobs)) as show:
        try:
            while waiting or running:
                for job in [job for job in waiting if not unmet & set(job.needs)][
                    : num_parallel - len(running)
                ]:
                    waiting.remove(job)
                    job.log.parent.mkdir(parents=True, exist_ok=True)
                    running[job] = start(job)
                if not running:
                    # The jobs that are left need something that crashed.
                    break
                time.sleep(POLL_SECONDS)
                show(list(running), None)
                for job, process in list(running.items()):
                    if (exitcode := process.exitcode) is None:
                        continue
                    del running[job]
                    crashed = _reason(job.log, exitcode) if exitcode else None
                    if crashed is None:
                        unmet.discard(job.path)
                        if job.marks:
                            write_atomically(job.done, "")
                    show(list(running), (job, crashed))
                    on_end(job, crashed)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.join()


def _execute_apart(
    execute: Execute, arguments: tuple[str, ...], log: Path, one_thread: bool
) -> None:
    """In a process of its own: a potstill command with its output in a file. Ends when the parent
    does, however.

    Everything that a run writes survives that, and an orphan would keep its run folder from the
    next attempt.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if one_thread:
        import torch

        torch.set_num_threads(1)
    execute(list(arguments))


def _reason(log: Path, exitcode: int) -> str:
    """The last line of what it printed, which is its error unless a signal ended it."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    killed = f"killed by signal {-exitcode}, after: " if exitcode < 0 else ""
    return killed + (lines[-1] if lines else "no output")


@contextmanager
def _display(
    num_jobs: int,
) -> Iterator[Callable[[Sequence[Job], tuple[Job, str | None] | None], None]]:
    """A bar over all jobs and one a running job on a terminal, a line when a job ends elsewhere."""
    started, num_ended = time.perf_counter(), 0

    def line(job: Job, crashed: str | None) -> str:
        outcome = f"CRASHED: {crashed} (all of its output is in {job.log})" if crashed else "done"
        return (
            f"[{num_ended}/{num_jobs}] {job.name}: {outcome}, {time.perf_counter() - started:.0f} s"
        )

    def show_lines(running: Sequence[Job], ended: tuple[Job, str | None] | None) -> None:
        nonlocal num_ended
        if ended is not None:
            num_ended += 1
            say(line(*ended), error=True)

    if not sys.stderr.isatty():
        yield show_lines
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (
        TextColumn("{task.description:<40}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *times,
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        whole = progress.add_task("all", total=num_jobs)
        tasks = {}

        def show_bars(running: Sequence[Job], ended: tuple[Job, str | None] | None) -> None:
            nonlocal num_ended
            for job in running:
                if job.path not in tasks:
                    tasks[job.path] = progress.add_task(
                        one_line(job.name)[:40], total=job.num_steps or None
                    )
                progress.update(tasks[job.path], completed=_num_steps_done(job))
            if ended is not None:
                num_ended += 1
                if ended[0].path in tasks:
                    progress.remove_task(tasks.pop(ended[0].path))
                progress.update(whole, completed=num_ended)
                progress.console.print(plain(line(*ended)))

        yield show_bars


def _num_steps_done(job: Job) -> int:
    """There is a line a step; they are counted several times a second, and so not parsed."""
    metrics = job.path / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if job.num_steps and metrics.exists() else 0
