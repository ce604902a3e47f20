"""Potstill commands as forks of one process that has loaded everything, to be killed or hindered at
an exact place.

That process has one thread, as a fork of one with more may hang. The process of the tests may have
more.

A file-system event is what Python tells of a change inside the work folder: a file opened to be
written, a rename, a removal, a new folder. Events are counted in order, so that a place in a
command has a number. `python forked.py` is the process that has loaded everything; it forks once a
line of its standard input.
"""

import ctypes
import errno
import fcntl
import importlib
import json
import mmap
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from waiting import SECONDS

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PIPE_BYTES = 1 << 20
CAP_DAC = 0b110
"""The two rights by which root reads and writes what modes forbid: CAP_DAC_OVERRIDE and
CAP_DAC_READ_SEARCH."""


@dataclass(frozen=True)
class Trouble:
    """The trouble that a command meets. By default there is none.

    `event`: at the event of this number (from 1, of those whose path contains `where`) it is
    killed. With `torn` bytes it is killed by its first write after the event that passes so many
    bytes, of which the first `torn` are in the file. With `error` the operation fails with this
    name of `errno`, and so does each later one. `seconds`: it is killed after so long. `limits`:
    what `resource.setrlimit` takes; of RLIMIT_AS what is added to what the process has. `bound`:
    file modes bind even root.
    """

    event: int | None = None
    where: str = ""
    torn: int | None = None
    error: str | None = None
    seconds: float | None = None
    limits: dict[str, int] = field(default_factory=dict)
    bound: bool = False

    def __str__(self) -> str:
        made = [f"{name}={value!r}" for name, value in asdict(self).items() if value]
        return f"Trouble({', '.join(made)})"


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, or minus the signal that killed it; how many events it had;
    what it printed."""

    code: int
    events: int
    seconds: float
    out: str
    err: str

    @property
    def is_killed(self) -> bool:
        return self.code < 0

    @property
    def last_line(self) -> str:
        return (self.err.strip().splitlines() or [""])[-1]


class Forks:
    """The process that has loaded everything. To be closed."""

    def __init__(self, scratch: Path):
        tests = Path(__file__).parents[1]
        # Functions of test files are called by the names of their modules.
        paths = [tests.parent / "src", tests, *(path for path in tests.iterdir() if path.is_dir())]
        one_thread = {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        settings = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "COLUMNS": "200",
            "TMPDIR": str(scratch),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | one_thread | settings,
            text=True,
        )

    def run(self, folder: Path, argv: list[str], trouble: Trouble | None = None) -> Ended:
        """Run a command in a folder until it ends, with every process that it began."""
        return self._ask(folder, argv, trouble, [{}])

    def call(
        self,
        folder: Path,
        function: Callable,
        *arguments: str | int,
        trouble: Trouble | None = None,
    ) -> Ended:
        """Call a function of a test file, by its name, as `run` does a command."""
        return self._ask(folder, [name_of(function), *arguments], trouble, [{}])

    def run_ranks(
        self, folder: Path, argv: Sequence, num_ranks: int, *, trouble: Trouble | None = None
    ) -> Ended:
        """The same on several ranks, which find each other as `torchrun` has them do it.

        Each rank counts its own events.
        """
        from torch.distributed import TCPStore

        # The store takes a port that is free and keeps it; ranks that were told a number would race
        # for it.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
        }
        shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
        return self._ask(folder, argv, trouble, ranks)

    def _ask(
        self,
        folder: Path,
        argv: Sequence[str | int],
        trouble: Trouble | None,
        ranks: list[dict[str, str]],
    ) -> Ended:
        """Ask for a process a rank, and wait for how they end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"argv": argv, "folder": str(folder.resolve()), "ranks": ranks}
        print(
            json.dumps(request | {"trouble": asdict(trouble or Trouble())}),
            file=self.process.stdin,
            flush=True,
        )
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=SECONDS)
        self.process.stdout.close()


def name_of(function: Callable) -> str:
    """The text that stands for a function of a test file where a command could."""
    return f"{function.__module__}:{function.__name__}"


def serve() -> None:
    """Load everything, then fork once a line of standard input and answer with a line."""
    import torch

    torch.set_num_threads(1)
    import conftest  # noqa: F401

    from potstill.models.language_model import load_model

    load_model("potstill:base")
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(_fork(**json.loads(line))), file=answers, flush=True)
    # Nothing is left to do, and taking apart all that was loaded takes seconds.
    os._exit(0)


def _fork(
    argv: list, folder: str, trouble: dict[str, Any], ranks: list[dict[str, str]]
) -> dict[str, Any]:
    """One command, and how it ended: a process for each rank, with its environment."""
    counter = mmap.mmap(-1, 8)
    # Pipes, as no limit on files is one on them; what a command prints fits in.
    pipes = {name: os.pipe() for name in ("out", "err")}
    for _, to_write in pipes.values():
        fcntl.fcntl(to_write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    started = time.perf_counter()
    children = []
    for environment in ranks:
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(environment)
            _execute(argv, folder, [pipes["out"][1], pipes["err"][1]], Trouble(**trouble), counter)
    codes = [_wait(child, trouble["seconds"]) for child in children]
    code = next((code for code in codes if code), 0)
    ended = {
        "code": code,
        "seconds": time.perf_counter() - started,
        "events": struct.unpack("q", counter)[0],
    }
    for name, (to_read, to_write) in pipes.items():
        os.close(to_write)
        with os.fdopen(to_read, "rb") as said:
            ended[name] = said.read().decode(errors="replace")
    return ended


def _wait(child: int, seconds: float | None) -> int:
    """The child's exit code, once nothing of its session is left."""
    if seconds is not None:
        ends = time.perf_counter() + seconds
        while (
            time.perf_counter() < ends
            and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ends = time.monotonic() + 60
    while left := _members(child):
        if time.monotonic() > ends:
            raise RuntimeError(f"processes are left a minute after a command's end: {left}")
        time.sleep(0.02)
    return code


def _members(session: int) -> list[str]:
    """The processes of a session, by what they run."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            state, _, _, of_session = (
                Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:4]
            )
            if int(of_session) == session and state != "Z":
                found.append(Path(entry.path, "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _execute(
    argv: list, folder: str, outputs: list[int], trouble: Trouble, counter: mmap.mmap
) -> None:
    """In the child: the command, with its trouble. Does not return."""
    os.setsid()
    os.chdir(folder)
    for number, output in enumerate(outputs, 1):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2)
    )
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, value in trouble.limits.items():
        used = _memory() if name == "RLIMIT_AS" else 0
        resource.setrlimit(getattr(resource, name), (used + value, used + value))
    if trouble.bound:
        _give_up_rights()
    _count_events(folder, trouble, counter)
    from potstill.cli.app import main

    code = 0
    try:
        test_file, _, function = argv[0].partition(":")
        if function:
            getattr(importlib.import_module(test_file), function)(*argv[1:])
        else:
            main(argv)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _count_events(folder: str, trouble: Trouble, counter: mmap.mmap) -> None:
    num = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal num
        if event not in CHANGES or not _is_inside(folder, arguments[0]):
            return
        if event == "open" and not (arguments[2] or 0) & TO_WRITE:
            return
        if trouble.where not in os.fsdecode(arguments[0]):
            return
        num += 1
        struct.pack_into("q", counter, 0, num)
        if trouble.event is None or num < trouble.event:
            return
        if trouble.error is not None:
            number = getattr(errno, trouble.error)
            raise OSError(number, os.strerror(number), str(arguments[0]))
        if num > trouble.event:
            return
        if trouble.torn is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            # The kernel writes the part of this write that is below the limit; the next write ends
            # the process.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            path = Path(os.fsdecode(arguments[0]))
            there = (
                path.stat().st_size
                if event == "open" and arguments[2] & os.O_APPEND and path.exists()
                else 0
            )
            resource.setrlimit(resource.RLIMIT_FSIZE, (there + trouble.torn, there + trouble.torn))

    sys.addaudithook(hook)


def _is_inside(folder: str, path: object) -> bool:
    """Relative paths are: they are to the folder, where the process is, or to one that is being
    removed."""
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    text = os.fsdecode(path)
    return not os.path.isabs(text) or text.startswith(folder + "/")


def _memory() -> int:
    """Bytes of address space that this process has."""
    found = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _give_up_rights() -> None:
    """Let file modes bind this process, even as root."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    if libc.capget(header, data) or libc.capset(header, _without(data.raw)):
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")


def _without(raw: bytes) -> bytes:
    words = list(struct.unpack("6I", raw))
    for i in (0, 1, 2):
        words[i] &= ~CAP_DAC
    return struct.pack("6I", *words)


if __name__ == "__main__":
    serve()
