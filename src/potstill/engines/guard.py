"""A process that keeps a server company: it ends the server's whole group with the process that
started it, however that ends, and whatever of the group outlives the server.

Run as a file: `guard.py PARENT COMMAND...`, as the first process of a session. Needs the standard
library alone.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

EVERY_SECONDS = 0.2
# Seconds that the server has to end by itself.
SERVER_SECONDS = 5.0


def keep_company() -> None:
    parent, *command = sys.argv[1:]
    # The group is told to end, and this process sees to it that it does.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server = subprocess.Popen(command, preexec_fn=_heed_signals)
    while server.poll() is None and os.getppid() == int(parent):
        time.sleep(EVERY_SECONDS)
    os.killpg(0, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(SERVER_SECONDS)
    # Itself included.
    os.killpg(0, signal.SIGKILL)


def _heed_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    keep_company()
