"""Grading mathematical answers: the last closed box against the gold, in processes that can be
killed.

What a model writes is untrusted: an exponent tower, a megabyte of digits or a crafted expression
can take long to compare. So each pair is compared in a worker process with a limit on time and
memory; one that exceeds either scores 0, is counted, and costs one worker, which is replaced.
Nothing is ever read from the prose around the box.

Run as a module this file is the worker: a JSON line with gold, answer and seconds in, one with the
verdict out.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from potstill.answers.boxes import last_box

# The grammar of answers takes a tenth of a second to load, which a help text does not wait for.
if TYPE_CHECKING:
    from potstill.answers import Rule

    GradeRule = Rule | Literal["no box", "too long", "timeout", "crash"]

# Seconds for one pair; an honest one takes milliseconds.
PAIR_SECONDS = 5.0
# Until a worker has started.
START_SECONDS = 120.0
GRADER_BYTES = 2 * 2**30
# No final answer is longer, and parsing takes more than linear time.
MAX_ANSWER_CHARACTERS = 1000

AnswerKind = Literal["latex", "integer"]
AnswerPair = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Grade:
    """The score of a response in [0, 1], the final answer it gave (None: none), and as a note the
    rule that decided."""

    score: float
    answer: str | None = None
    note: "GradeRule | Literal['']" = ""


def gsm8k_gold(answer: str) -> str:
    """The number after the last `####` of a GSM8K solution, without separators. Raises ValueError
    without one."""
    _, marker, gold = answer.rpartition("####")
    if not marker or not gold.strip():
        raise ValueError(
            f"a GSM8K answer ends with `#### NUMBER`, and this one does not: {answer[-80:]!r}"
        )
    return gold.strip().replace(",", "").replace("$", "")


class Grader:
    """Worker processes that compare answers; use as a context manager, or close it."""

    def __init__(self, num_workers: int | None = None, seconds: float = PAIR_SECONDS):
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

    def grade(
        self, golds: Sequence[str], responses: Sequence[str], kind: AnswerKind = "latex"
    ) -> list[Grade]:
        """One grade for each response, in their order; equal pairs are compared once."""
        answers = [last_box(response) for response in responses]
        pairs = list(zip(golds, answers, strict=True))
        at_once = {pair: _at_once(*pair, kind) for pair in pairs}
        decided = {pair: verdict for pair, verdict in at_once.items() if verdict is not None}
        decided |= self._compare_all([pair for pair, verdict in at_once.items() if verdict is None])
        return [Grade(float(decided[pair][0]), pair[1], decided[pair][1]) for pair in pairs]

    def _compare_all(
        self, pairs: Sequence[AnswerPair]
    ) -> "dict[AnswerPair, tuple[bool, GradeRule]]":
        waiting, decided = deque(pairs), {}
        busy: dict[subprocess.Popen, tuple[AnswerPair, float]] = {}
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
                        decided[pair] = tuple(json.loads(line))
                        self.idle.append(worker)
                    else:
                        decided[pair] = (False, "crash" if worker in done else "timeout")
                        _stop(worker)
        return decided


def _at_once(gold: str, answer: str | None, kind: AnswerKind) -> "tuple[bool, GradeRule] | None":
    """The verdict where no expressions are compared; None where they are."""
    if answer is None:
        return False, "no box"
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return False, "too long"
    if kind == "integer":
        from potstill.answers import integer

        return integer(answer) == integer(gold) is not None, "integer"
    return (True, "same text") if answer == gold != "" else None


def majority(grades: Sequence[Grade]) -> float:
    """The score of the answer that most responses gave, the first of those where several did; 0
    without answers."""
    counts = Counter(grade.answer for grade in grades if grade.answer is not None)
    if not counts:
        return 0.0
    (most, _), *_ = counts.most_common(1)
    return next(grade.score for grade in grades if grade.answer == most)


def _start() -> subprocess.Popen:
    """A worker that is ready. It has no terminal, no network of ours and nothing of the model."""
    worker = subprocess.Popen(
        # -P: the files of the current folder are no modules of ours.
        [sys.executable, "-P", "-m", "potstill.answers.grading"],
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
            raise RuntimeError(
                "a grading process does not start; run `python -P -m potstill.answers.grading` "
                "to see why"
            )
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

    Its parent keeps the time; should that be killed, the worker's own alarm ends it, a second after
    its time is over.
    """
    import resource
    import signal

    from potstill.answers import Verdict, compare

    resource.setrlimit(resource.RLIMIT_AS, (GRADER_BYTES, GRADER_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        # The signal is not handled: its default ends the process whatever it is doing.
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        try:
            verdict = compare(gold, answer)
        except (RecursionError, MemoryError):
            verdict = Verdict(False, "not understood")
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    _work()
