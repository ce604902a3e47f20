"""Progress of long work: a live line on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from potstill.console.printable import plain, printable, say

# Seconds between plain lines where there is no terminal.
PLAIN_INTERVAL = 5.0
# Seconds that a step takes before it is said what it is at: on the bar, and as a line each so many
# seconds where there is no terminal.
LONG_ON_BAR, LONG_IN_LOG = 1.0, 10.0


class StepDisplay:
    """Progress of a training run: step, tokens/s, the numbers of the step, time left."""

    def __init__(self, num_steps: int, start: int, quiet: bool, flops: float | None = None):
        self.num_steps = num_steps
        self.flops = flops
        self.start = start
        self.quiet = quiet
        self.live = sys.stderr.isatty() and not quiet
        self.began = self.last_step = self.last_line = self.last_part = time.perf_counter()
        self.num_done, self.shown = start, ""
        self.num_tokens = 0

    def __enter__(self):
        if self.live:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self.progress = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=16),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
            )
            self.progress.start()
            self.task = self.progress.add_task(
                "first step", total=self.num_steps, completed=self.start
            )
        return self

    def __exit__(self, *error):
        if self.live:
            self.progress.stop()

    def note(self, *lines: str) -> None:
        """Print lines above the bar."""
        for line in lines if not self.quiet else ():
            if self.live:
                self.progress.console.print(plain(line))
            else:
                say(line, error=True)

    def lap(self) -> float:
        """Seconds of the step that ends now."""
        now = time.perf_counter()
        seconds, self.last_step = now - self.last_step, now
        return seconds

    def doing(self, what: str) -> None:
        """Show what the present step is at, where it takes long."""
        now = time.perf_counter()
        if self.quiet or now - self.last_step < (LONG_ON_BAR if self.live else LONG_IN_LOG):
            return
        if self.live:
            self.progress.update(self.task, description=f"{what}  {self.shown}")
        elif now - self.last_part >= LONG_IN_LOG:
            self.last_part = now
            say(f"step {self.num_done + 1}/{self.num_steps}: {what}", error=True)

    def update(self, step: int, *, num_tokens: int, total_flops: float, numbers: str) -> None:
        """Show a finished step: tokens/s, its `numbers` as text, and the time left."""
        if self.quiet:
            return
        now = time.perf_counter()
        num_steps = self.num_steps
        if self.flops is not None:
            # As many as the operations so far promise.
            promised = math.ceil(step * self.flops / total_flops)
            num_steps = min(num_steps, max(promised, step))
        self.num_tokens += num_tokens
        shown = f"{self.num_tokens / (now - self.began):,.0f} tok/s  {numbers}"
        self.num_done, self.shown = step, shown
        if self.live:
            self.progress.update(self.task, completed=step, total=num_steps, description=shown)
        elif now - self.last_line >= PLAIN_INTERVAL or step in (self.start + 1, num_steps):
            self.last_line = now
            left = (now - self.began) / (step - self.start) * (num_steps - step)
            say(f"step {step}/{num_steps}  {shown}  {left:.0f} s left", error=True)


class CacheDisplay:
    """Progress over the rollouts of a cache: tokens/s, bytes a token, time left."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.live = sys.stderr.isatty() and not quiet

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.live and hasattr(self, "progress"):
            self.progress.stop()

    def begin(self, num_there: int, num_rollouts: int) -> None:
        """Say what there is already and how many rollouts are to be done."""
        self.total, self.done, self.num_tokens, self.num_bytes = num_rollouts, 0, 0, 0
        self.began = self.last_line = time.perf_counter()
        if num_there and not self.quiet:
            say(f"{num_there:,} completions are there already", error=True)
        if self.live:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (MofNCompleteColumn(), BarColumn(bar_width=16), TimeRemainingColumn())
            self.progress = Progress(
                *columns,
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
            )
            self.progress.start()
            self.task = self.progress.add_task("first shard", total=num_rollouts)

    def update(self, *, num_rollouts: int, num_tokens: int, num_bytes: int) -> None:
        """Show what finished shards hold."""
        if self.quiet:
            return
        self.done += num_rollouts
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes
        now = time.perf_counter()
        shown = (
            f"{self.num_tokens / (now - self.began):,.0f} tok/s  "
            f"{self.num_bytes / self.num_tokens:,.1f} bytes/token"
        )
        if self.live:
            self.progress.update(self.task, completed=self.done, description=shown)
        elif now - self.last_line >= PLAIN_INTERVAL or self.done == self.total:
            self.last_line = now
            left = (now - self.began) / self.done * (self.total - self.done)
            say(f"rollout {self.done}/{self.total}  {shown}  {left:.0f} s left", error=True)


@contextmanager
def token_bar(
    title: str, num_rows: int, num_done: int, quiet: bool
) -> Iterator[Callable[[int], None]]:
    """A bar over decoded responses; yields what is told how many a batch had."""
    if quiet or not sys.stderr.isatty():
        yield lambda num: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(printable(title)), total=num_rows, completed=num_done)
        yield lambda num: progress.advance(task, num)
