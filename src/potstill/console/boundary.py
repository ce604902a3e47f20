"""The one place where an error becomes a line for the user; what still ends in a traceback is a bug
of potstill.

The package's own errors say what to do already. Here those of the system and of libraries get
there: full disks, rights, damaged files, templates, memory, closed pipes and signals. Imports
nothing heavy, so that it also guards the imports.
"""

import errno
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from potstill.console.printable import one_line

# Advice on an error of the system, beside what it says itself.
ADVICE = {
    errno.ENOSPC: "free some space; what is finished is kept, and the same command goes on",
    errno.EDQUOT: "free some of your quota; what is finished is kept, and the same command goes on",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f); what is finished is kept",
    errno.EACCES: "choose another place, or change its rights",
    errno.EPERM: "choose another place, or change its rights",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; choose another",
    errno.EISDIR: "a file is needed and this is a folder; choose another path",
    errno.EEXIST: "it is there already; choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle; choose another path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "the disk cannot be read or written; what is finished is kept",
    errno.ENOMEM: "use smaller batches, or a machine with more memory",
}
# Errors of libraries that mean bad input, by module and name: none of these libraries is imported
# for it.
OF_FILES = {
    ("safetensors", "SafetensorError"): "the file of weights is damaged or cannot be written",
    ("pydantic_core._pydantic_core", "ValidationError"): "a value cannot be used",
    ("json.decoder", "JSONDecodeError"): "a file is no JSON, or only a part of it",
    ("tomllib", "TOMLDecodeError"): "a file is no TOML",
    ("pyarrow.lib", "ArrowInvalid"): "a data file is damaged",
}
# As gloo and NCCL say it.
LOST_RANK = re.compile(r"timed out|timeout|connection (was )?(closed|reset)", re.IGNORECASE)
# As torch says it, and the system of a library that it cannot map.
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|failed to map segment", re.IGNORECASE
)
# Seconds in which more signals are the same request: a terminal or a scheduler tells every process
# of a group, and a study and torchrun pass on to their processes what these have heard already.
AT_ONCE = 2.0
STOPPED = "stopped"
STOPPED_AND_SAVED = "stopped; the same command goes on from what was saved last"


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end; `saved` says that nothing of its work is lost."""

    def __init__(self, number: int, saved: str | None = None):
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved = saved

    @staticmethod
    def of(stop: KeyboardInterrupt, saved: str) -> "Stopped":
        """The same signal, with what is saved."""
        return Stopped(stop.number if isinstance(stop, Stopped) else signal.SIGINT, saved)


@contextmanager
def saying_when_stopped(saved: Callable[[], str]) -> Iterator[None]:
    """Have a signal that ends the work inside say what is saved, unless that is said already."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if isinstance(stop, Stopped) and stop.saved:
            raise
        raise Stopped.of(stop, saved()) from None


def stopped_after(step: int, number: int) -> Stopped:
    """The error that a loop raises once it has saved its last step."""
    return Stopped(
        number, f"stopped after step {step}, which is saved; the same command goes on from there"
    )


@contextmanager
def boundary() -> Iterator[None]:
    """Let only bugs through: every other error is one line on standard error, and the exit code
    says of which kind.

    2: bad input, or a system that does not let us work; 128 + the number of a signal that ended us,
    as in a shell.
    """
    for stream in (sys.stdout, sys.stderr):
        # For a terminal that knows fewer characters than our tables have.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with ended_by_signals():
            try:
                yield
            except SystemExit:
                sys.stdout.flush()
                raise
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone, as after `| head`; there is nobody to tell.
        _end(None, 128 + signal.SIGPIPE)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else int(signal.SIGINT)
        saved = stop.saved if isinstance(stop, Stopped) else None
        _end(saved or STOPPED, 128 + number)
    except Exception as error:
        line = describe_error(error)
        if line is None:
            raise
        _end(line, 2)


def _end(line: str | None, code: int) -> None:
    with suppress(OSError, ValueError):
        if line is not None:
            print(f"potstill: {one_line(line)}", file=sys.stderr, flush=True)
    # The rest of the buffer cannot be written; Python would say so at its end.
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(code) from None


def describe_error(error: BaseException) -> str | None:
    """One line for an error that is not a bug of potstill; None for one that is."""
    kind = type(error)
    if kind.__module__.startswith("potstill.") and isinstance(error, ValueError | ArithmeticError):
        return str(error)
    where = _where(error)
    if isinstance(error, OSError):
        advice = ADVICE.get(error.errno or 0, "what is finished is kept")
        return f"{where or 'a file'}: {(error.strerror or str(error)).lower()}; {advice}"
    if isinstance(error, UnicodeError):
        return f"{where or 'a file'} is no UTF-8 text ({error}); save it as UTF-8"
    if isinstance(error, RecursionError):
        return f"{where or 'the input'} is nested too deeply"
    if _is_out_of_memory(error):
        return "there is not enough memory; use smaller batches or models. What is finished is kept"
    if isinstance(error, RuntimeError) and "RANK" in os.environ and LOST_RANK.search(str(error)):
        return (
            f"rank {os.environ['RANK']} waited in vain for another rank, which has ended or "
            f"hangs ({error}); look at what that one printed. The same command goes on from what "
            "was saved last"
        )
    if _is_of(kind, "jinja2.exceptions", "TemplateError"):
        return (
            f"a chat template refuses the messages: {error}; set the template to raw, or "
            "change the messages"
        )
    for (module, name), what in OF_FILES.items():
        if _is_of(kind, module, name):
            return f"{where}: {what}: {error}" if where else f"{what}: {error}"
    return None


def _is_of(kind: type, module: str, name: str) -> bool:
    """Whether a class or one of its bases has this name in this module."""
    return any(
        base.__name__ == name and base.__module__.startswith(module) for base in kind.__mro__
    )


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    by_name = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_name or (
        isinstance(error, RuntimeError | ImportError) and OUT_OF_MEMORY.search(text) is not None
    )


def _where(error: BaseException) -> str | None:
    """The path that an error is about: its own, or what `naming` wrote on it."""
    found = getattr(error, "filename", None)
    if found is None:
        return None
    return repr(os.fsdecode(found) if isinstance(found, str | bytes) else str(found))


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Write the path on errors from inside that do not say what they are about."""
    try:
        yield
    except Exception as error:
        if getattr(error, "filename", None) is None:
            error.filename = str(path)  # pyright: ignore[reportAttributeAccessIssue]
        raise


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the command as Ctrl-C does: what is open is closed, and a line
    says how to go on."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with handled(stop, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def stop_asked_for() -> Iterator[Callable[[], int]]:
    """Give a loop a function that says which signal has asked it to stop (0: none), to ask where it
    is whole.

    A later signal ends it at once.
    """
    asked, since = 0, 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked, since
        if not asked:
            asked, since = number, time.monotonic()
            # Not with print: the signal may have come in the middle of one.
            os.write(2, b"potstill: stopping after this step; once more stops at once\n")
        elif time.monotonic() - since >= AT_ONCE:
            raise Stopped(number)

    with handled(note, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield lambda: asked


@contextmanager
def handled(handler, *numbers: int) -> Iterator[None]:
    """Handle signals where nothing else does: in the main thread, and none that are ignored, as
    under nohup."""
    before = {}
    try:
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                # Fails outside of the main thread, where signals never arrive.
                with suppress(ValueError):
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
