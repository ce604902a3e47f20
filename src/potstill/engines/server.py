"""A server in a process of its own: started, watched and ended. It ends with this process, however
that ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from potstill.engines.calls import is_healthy
from potstill.engines.protocol import EngineError

LOOK_SECONDS = 0.1
# Seconds that a server has to end by itself.
END_SECONDS = 10.0
# Characters of the log that an error quotes.
QUOTED = 300
ERROR = re.compile(r"(?:^| ERROR .*\] )(\w*Error: .+)")
GUARD = str(Path(__file__).with_name("guard.py"))
# Variables by which torchrun's processes find each other, and not the server's.
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
OF_RANKS += ("MASTER_ADDR", "MASTER_PORT", "ROLE_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


class Server:
    """A command that serves HTTP at a port of this machine, with its output in a log."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        self.command, self.environment, self.log = list(command), dict(environment), log
        self.process: subprocess.Popen[bytes] | None = None
        self.url, self.log_start = "", 0

    def start(self, seconds: float) -> None:
        """Start the command with a free port, and wait until it serves. Raises EngineError with the
        end of the log."""
        self.stop()
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        kept = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-I", GUARD, str(os.getpid()), *self.command, "--port", str(port)],
                env=kept | self.environment,
                # Python looks for modules where it is started, first of all.
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + seconds
        while not is_healthy(self.url):
            if not self.is_alive:
                raise EngineError(f"the engine ended before it served; {self.end_of_log()}")
            if time.monotonic() > deadline:
                self.stop()
                raise EngineError(
                    f"the engine did not serve within engine.timeout = {seconds:g} seconds; "
                    f"{self.end_of_log()}"
                )
            time.sleep(LOOK_SECONDS)

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, patience: float = END_SECONDS) -> None:
        """End the whole group of processes, by force where it does not by itself."""
        if self.process is None:
            return
        group, self.process = self.process, None
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(group.pid, number)
            with suppress(subprocess.TimeoutExpired):
                group.wait(patience)
        group.wait()

    def end_of_log(self) -> str:
        """The first error that the server has logged, and its log's place and end, on one line."""
        data = self.log.read_bytes()[self.log_start :] if self.log.exists() else b""
        lines = data.decode(errors="replace").splitlines()
        error = next((found[1] for line in lines if (found := ERROR.search(line))), None)
        end = " ".join(" ".join(lines).split())[-QUOTED:]
        said = "" if error is None else f" says first: {error[:QUOTED]}; it"
        return f"the log {str(self.log)!r}{said} ends: {end}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
