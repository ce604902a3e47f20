"""Grading mathematical answers: the last closed box against the gold, by math-verify, in processes that can be killed.

What a model writes is untrusted: an exponent tower, a megabyte of digits or a crafted expression can occupy sympy for
ever. So each pair is compared in a worker process with a limit on time and memory; one that exceeds either scores 0,
is counted, and costs one worker, which is replaced. Nothing is ever read from the prose around the box.

Run as a module this file is the worker: a JSON line with gold and answer in, one with the verdict out.
"""

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Seconds for one pair; an honest one takes milliseconds.
SECONDS = 5.0
# Until a worker has imported sympy.
START_SECONDS = 120.0
MEMORY_BYTES = 2 * 2**30
# No final answer is longer, and parsing takes more than linear time.
MAX_CHARACTERS = 1000

Kind = Literal["latex", "integer"]
Note = Literal["right", "wrong", "no box", "unparsed", "too long", "timeout", "crash"]


@dataclass(frozen=True, slots=True)
class Grade:
    """The score of a response in [0, 1], the final answer it gave (None: none), and what was noted in grading."""

    score: float
    answer: str | None = None
    note: Note | str = ""


_BRACES = re.compile(r"\\f?boxed\s*\{|\\[{}]|[{}]")


def closed_boxes(text: str) -> list[tuple[int, int]]:
    r"""Where the contents of all closed `\boxed{...}` begin and end (characters), in the order of their ends.

    One pass: an unclosed box costs nothing, however many there are, and does not hide the others.
    """
    found: list[tuple[int, int]] = []
    # Of each open brace: where its box's contents begin, or -1 for a brace that is no box.
    opened: list[int] = []
    for match in _BRACES.finditer(text):
        token = match[0]
        if token[0] == "\\" and len(token) > 2:
            opened.append(match.end())
        elif token == "{":
            opened.append(-1)
        elif token == "}" and opened:
            start = opened.pop()
            if start >= 0:
                found.append((start, match.start()))
    return found


def last_box(text: str) -> str | None:
    r"""What the closed `\boxed{...}` that begins last holds, or None."""
    boxes = closed_boxes(text)
    if not boxes:
        return None
    start, end = max(boxes)
    return text[start:end].strip()


def box_end(text: str) -> int | None:
    r"""Where the first closed `\boxed{...}` ends (characters), or None."""
    boxes = closed_boxes(text)
    return boxes[0][1] + 1 if boxes else None


def integer(text: str) -> int | None:
    """An integer as contests write it: leading zeros, thin spaces and thousands separators allowed."""
    plain = re.sub(r"\\[,!;: ]|[{},$\s]", "", text)
    return int(plain) if re.fullmatch(r"[+-]?\d{1,30}", plain) else None


def gsm8k_gold(answer: str) -> str:
    """The number after the last `####` of a GSM8K solution, without separators. Raises ValueError without one."""
    _, marker, gold = answer.rpartition("####")
    if not marker or not gold.strip():
        raise ValueError(f"a GSM8K answer ends with `#### NUMBER`, and this one does not: {answer[-80:]!r}")
    return gold.strip().replace(",", "").replace("$", "")


def compare(gold: str, answer: str) -> Note:
    """Whether two LaTeX expressions are equal. For workers alone: it may not return."""
    from math_verify import parse, verify

    # Wrapped, as LaTeX is not looked for outside of dollars; the time limit is the caller's.
    expected, given = (parse(f"${text}$", parsing_timeout=None) for text in (gold, answer))  # pyright: ignore
    if not given:
        return "right" if answer == gold else "unparsed"
    return "right" if verify(expected, given, timeout_seconds=None) else "wrong"


class Grader:
    """Worker processes that compare answers; use as a context manager, or close it."""

    def __init__(self, num_workers: int | None = None, seconds: float = SECONDS):
        self.num_workers = num_workers or min(os.cpu_count() or 1, 8)
        self.seconds = seconds
        self.idle: list[subprocess.Popen] = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        """Stop all workers."""
        for worker in self.idle:
            _stop(worker)
        self.idle.clear()

    def grade(self, golds: Sequence[str], responses: Sequence[str], kind: Kind = "latex") -> list[Grade]:
        """One grade for each response, in their order; equal pairs are compared once."""
        answers = [last_box(response) for response in responses]
        pairs = list(zip(golds, answers, strict=True))
        notes: dict[tuple[str, str | None], Note] = {pair: _at_once(*pair, kind) for pair in pairs}
        waiting = [pair for pair, note in notes.items() if note == ""]  # pyright: ignore[reportUnnecessaryComparison]
        if waiting:
            notes |= self._compare_all(waiting)
        return [Grade(float(notes[pair] == "right"), pair[1], notes[pair]) for pair in pairs]

    def _compare_all(self, pairs: Sequence[tuple[str, str | None]]) -> dict[tuple[str, str | None], Note]:
        waiting, notes = deque(pairs), {}
        busy: dict[subprocess.Popen, tuple[tuple[str, str | None], float]] = {}
        with selectors.DefaultSelector() as ready, contextlib.ExitStack() as stack:
            # Whatever goes wrong, no worker is left with half a question.
            stack.callback(lambda: [_stop(worker) for worker in busy])
            while waiting or busy:
                while waiting and len(busy) < self.num_workers:
                    pair = waiting.popleft()
                    worker = self.idle.pop() if self.idle else _start()
                    assert worker.stdin is not None and worker.stdout is not None
                    try:
                        worker.stdin.write(json.dumps([*pair, self.seconds]).encode() + b"\n")
                    except BrokenPipeError:
                        # It died in the meantime, of nothing that we asked it.
                        _stop(worker)
                        waiting.appendleft(pair)
                        continue
                    busy[worker] = pair, time.monotonic() + self.seconds
                    ready.register(worker.stdout, selectors.EVENT_READ, worker)
                nearest = min(deadline for _, deadline in busy.values())
                done = {key.data for key, _ in ready.select(max(nearest - time.monotonic(), 0))}
                for worker, (pair, deadline) in list(busy.items()):
                    if worker not in done and time.monotonic() < deadline:
                        continue
                    line = worker.stdout.readline() if worker in done and worker.stdout else b""
                    ready.unregister(worker.stdout)  # pyright: ignore[reportArgumentType]
                    del busy[worker]
                    if line:
                        notes[pair] = json.loads(line)
                        self.idle.append(worker)
                    else:
                        notes[pair] = "crash" if worker in done else "timeout"
                        _stop(worker)
        return notes


def _at_once(gold: str, answer: str | None, kind: Kind) -> Note:
    """The verdict where no comparison of expressions is needed; "" where one is."""
    if answer is None:
        return "no box"
    if len(answer) > MAX_CHARACTERS:
        return "too long"
    if kind == "integer":
        return "right" if integer(answer) == integer(gold) is not None else "wrong"
    return "right" if answer == gold else ""  # pyright: ignore[reportReturnType]


def majority(grades: Sequence[Grade]) -> float:
    """The score of the answer that most responses gave, the first of those where several did; 0 without answers."""
    counts = Counter(grade.answer for grade in grades if grade.answer is not None)
    if not counts:
        return 0.0
    (most, _), *_ = counts.most_common(1)
    return next(grade.score for grade in grades if grade.answer == most)


def _start() -> subprocess.Popen:
    """A worker that is ready. It has no terminal, no network of ours and nothing of the model."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "potstill.grading"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # Unbuffered: what select sees is all there is.
        bufsize=0,
    )
    assert worker.stdout is not None
    with selectors.DefaultSelector() as ready:
        ready.register(worker.stdout, selectors.EVENT_READ)
        if not ready.select(START_SECONDS) or worker.stdout.readline() != b"ready\n":
            _stop(worker)
            raise RuntimeError("a grading process does not start; is math-verify installed?")
    return worker


def _stop(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _work() -> None:
    """The worker's loop.

    Its parent keeps the time; should that be killed, the worker's own alarm ends it, a second after its time is over.
    """
    import logging
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "w")
    # Whatever a library prints must not look like a verdict.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    compare("1", "2")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        *pair, seconds = json.loads(line)
        # The signal is not handled: its default ends the process whatever it is doing.
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        try:
            verdict = compare(*pair)
        # sympy raises errors of every kind on what is no expression; whichever it is, there is nothing to compare.
        except Exception:
            verdict = "unparsed"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=answers, flush=True)


if __name__ == "__main__":
    _work()
