"""The embedded task: n-digit x 1-digit multiplication, worked column by column.

A prompt is `_347*6=`; a response is a trace and an answer, `7*6=42+0=42|4*6+4=28|:20|#2082.`. Each
column is written in one of three styles (long `x*b=pp+c=rr`, mid `x*b+c=rr`, short `:rr`), `~`
retracts the column before it, and `?` after the answer starts the derivation again. The last `#...`
is what counts. One character is one token.

The answers have up to five digits, so guessing scores about 0; a column is easy and a whole trace
is not, so accuracy falls with the number of digits, which is the difficulty level.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from potstill.answers.grading import Grade
from potstill.types import Example

DIGITS = (2, 3, 4)
ANSWER = re.compile(r"#(\d+)")
# A fifth of the 720 problems with two digits is held out, and the levels take turns.
MAX_TEST_PROBLEMS = 390
# A retracted column is tried again at most this often, which bounds the length of a trace.
MAX_RETRIES = 3


@dataclass(frozen=True, kw_only=True)
class TraceAuthor:
    """How one author of traces behaves. Probabilities; `styles` are those of long, mid and short
    columns."""

    styles: tuple[float, float, float]
    retract_right: float
    retract_wrong: float
    restart: float
    error: float
    train_on_errors: bool = False


# The latent persona is drawn once per trace, so a student has to infer it from what is already
# written.
TRACE_AUTHORS: dict[str, tuple[TraceAuthor, ...]] = {
    "persona": (
        TraceAuthor(
            styles=(0.1, 0.3, 0.6), retract_right=0.02, retract_wrong=0.98, restart=0.02, error=0.12
        ),
        TraceAuthor(
            styles=(0.4, 0.35, 0.25), retract_right=0.1, retract_wrong=0.98, restart=0.1, error=0.12
        ),
        TraceAuthor(
            styles=(0.7, 0.2, 0.1), retract_right=0.4, retract_wrong=0.98, restart=0.3, error=0.12
        ),
    ),
    "novice": (
        TraceAuthor(
            styles=(0.4, 0.35, 0.25),
            retract_right=0.1,
            retract_wrong=0.5,
            restart=0.1,
            error=0.2,
            train_on_errors=True,
        ),
    ),
}


def is_test_problem(a: int, b: int) -> bool:
    """A fifth of all problems, chosen by hash, is held out: the same ones for every seed and
    machine."""
    return hashlib.sha256(f"{a}*{b}".encode()).digest()[0] % 5 == 0


def write_column(
    rng: random.Random, writer: TraceAuthor, x: int, b: int, carry: int
) -> tuple[str, int, bool]:
    """One column, its two-digit result as written, and whether that result is right."""
    result = x * b + carry
    right = rng.random() >= writer.error
    written = (
        result
        if right
        else rng.choice([r for r in range(100) if r != result and _differ_in_one(r, result)])
    )
    style = rng.choices(("long", "mid", "short"), writer.styles)[0]
    if style == "long":
        text = f"{x}*{b}={x * b:02d}+{carry}={written:02d}"
    elif style == "mid":
        text = f"{x}*{b}+{carry}={written:02d}"
    else:
        text = f":{written:02d}"
    return text, written, right


def _differ_in_one(r: int, s: int) -> bool:
    return (r // 10 != s // 10) != (r % 10 != s % 10)


def write_trace(
    rng: random.Random, writer: TraceAuthor, a: int, b: int
) -> tuple[tuple[str, bool], ...]:
    """A completion as (text, is it trained on) segments; wrong columns are not, unless the writer
    trains on them."""
    segments: list[tuple[str, bool]] = []
    for attempt in range(2):
        carry, answer = 0, ""
        for x in (int(digit) for digit in reversed(str(a))):
            text, written, right = write_column(rng, writer, x, b, carry)
            segments.append((text, right or writer.train_on_errors))
            for _ in range(MAX_RETRIES):
                if rng.random() >= (writer.retract_right if right else writer.retract_wrong):
                    break
                text, written, right = write_column(rng, writer, x, b, carry)
                segments += [("~", True), (text, right or writer.train_on_errors)]
            segments.append(("|", True))
            carry, answer = written // 10, f"{written % 10}{answer}"
        segments.append((f"#{carry or ''}{answer}", True))
        if attempt == 0 and rng.random() < writer.restart:
            segments.append(("?", True))
        else:
            break
    return (*segments, (".", True))


class Multiplication:
    """The task for `data.source = "multiplication"`, or `"multiplication:WRITER"` with completions
    by that writer."""

    def __init__(self, writer: str | None = None):
        if writer is not None and writer not in TRACE_AUTHORS:
            raise ValueError(
                f"multiplication has no writer {writer!r}; choose one of {sorted(TRACE_AUTHORS)}"
            )
        self.writer = writer

    def examples(self, split: str, num_examples: int, seed: int) -> list[Example]:
        """Problems of the split, digits in turn, drawn with replacement for "train" and without for
        "test"."""
        if split not in ("train", "test"):
            raise ValueError(f'multiplication has no split {split!r}; choose "train" or "test"')
        if split == "test" and num_examples > MAX_TEST_PROBLEMS:
            raise ValueError(
                f"{num_examples} held-out problems are asked for; at most {MAX_TEST_PROBLEMS} "
                "are distinct"
            )
        rng = random.Random(f"multiplication/{split}/{seed}")
        examples: list[Example] = []
        seen: set[tuple[int, int]] = set()
        while len(examples) < num_examples:
            num_digits = DIGITS[len(examples) % len(DIGITS)]
            a, b = rng.randrange(10 ** (num_digits - 1), 10**num_digits), rng.randint(2, 9)
            if is_test_problem(a, b) != (split == "test"):
                continue
            if split == "test" and (a, b) in seen:
                continue
            seen.add((a, b))
            completion = None
            if self.writer is not None:
                completion = write_trace(rng, rng.choice(TRACE_AUTHORS[self.writer]), a, b)
            examples.append(
                Example(
                    id=f"{split}-{len(examples)}",
                    prompt=f"{a:_>4}*{b}=",
                    completion=completion,
                    answer=str(a * b),
                    level=f"{num_digits} digits",
                )
            )
        return examples

    def grade(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Grade]:
        """1 when the last `#digits` of the response is the product, else 0."""
        given = [(ANSWER.findall(response) or [None])[-1] for response in responses]
        return [
            Grade(float(a == example.answer), a) for example, a in zip(examples, given, strict=True)
        ]

    def answer_end(self, response: str) -> int | None:
        """Where the first finished answer ends (characters), or None."""
        match = re.search(r"#\d+\.", response)
        return match.end() if match else None
