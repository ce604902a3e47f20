"""Waits for other processes, long as on a machine that is busy, but not for ever."""

import time
from collections.abc import Callable
from subprocess import Popen

# No process here has as much to do; one that has not done it by then never will.
SECONDS = 600


def wait_until(happened: Callable[[], object], process: Popen) -> None:
    """Wait for something that a process does before it ends."""
    ends = time.monotonic() + SECONDS
    while True:
        has_ended = process.poll() is not None
        if happened():
            return
        assert not has_ended, "the process ended before"
        assert time.monotonic() < ends, f"nothing happened in {SECONDS} s"
        time.sleep(0.01)
