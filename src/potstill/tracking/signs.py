"""Signs in a run's numbers that something goes wrong, each said once, with what helps.

A sign is a function of the first and of the last rows of `metrics.jsonl`, and of nothing else: a
run that is resumed is told what it would have been told, and no number depends on it. Means over
`SPAN` steps are compared, as the numbers of a single step are of few rollouts.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median, stdev

from potstill.runs.schema import StepMetrics, StepNumber, value_in

# Steps whose mean is compared. With 8 rollouts a step it is of 80, where a share has a standard
# error of at most 0.06.
SPAN = 10
# Steps at either end by which it is judged whether anything was learnt.
LONG_SPAN = 25
# The student's entropy as a share of the teacher's on the same tokens. A student that is sharper
# than its teacher by a fifth is usual with the reverse KL; at half it has dropped choices that the
# teacher keeps, and the window's gate closes at half as well.
ENTROPY_SHARE = 0.5
# Nats: below this the teacher itself has made up its mind, and shares of its entropy mean nothing.
LOW_ENTROPY = 0.02
# Growth of the share of responses that the window cuts: five standard errors of a mean over SPAN.
TRUNCATION_GROWTH = 0.3
# How many times smaller zlib makes a response, on average. Prose is at 1 to 2.5 by its length and a
# loop at 10 and more, so that 4 is reached when a fifth are loops.
LOOPING = 4.0
# The gradient's norm as a multiple of its median before. Between steps it varies by a factor of 2
# or 3; a single outlier is clipped and does no harm, so that several must come close together.
SPIKE, NUM_SPIKES = 5.0, 3
# The least that the loss should have fallen, as a share of what it was. It is said that it has not
# only when the steps' spread leaves no doubt (two standard errors).
LEAST_FALL = 0.1
# Share of completion tokens without a loss, where that is of spans.
MUCH_LEFT_OUT = 0.5
# Nats a token: with less to learn a student is its teacher.
LITTLE_LOSS = 0.005

Rows = Sequence[StepMetrics]
Sign = Callable[[Rows, Rows], str | None]


class Watch:
    """A run's first and last rows, and the signs that were seen in them."""

    def __init__(self, signs: Mapping[str, Sign], rows: Iterable[StepMetrics] = ()):
        self.signs = signs
        self.first: list[StepMetrics] = []
        self.recent: deque[StepMetrics] = deque(maxlen=LONG_SPAN)
        self.seen: set[str] = set()
        for row in rows:
            self.after(row)

    def after(self, row: StepMetrics) -> list[str]:
        """The warnings that are due after this step, each for the first time."""
        if len(self.first) < LONG_SPAN:
            self.first.append(row)
        self.recent.append(row)
        found = []
        for name in self.signs.keys() - self.seen:
            warning = self.signs[name](self.first, list(self.recent))
            if warning is not None:
                self.seen.add(name)
                found.append(f"warning: after step {row['step']}: {warning}")
        return sorted(found)


def fallen_entropy(first: Rows, recent: Rows) -> str | None:
    """The student's entropy before the answer has fallen through the teacher's."""
    student = _mean(recent[-SPAN:], "student_entropy_before_answer")
    teacher = _mean(recent[-SPAN:], "teacher_entropy_before_answer")
    student_first = _mean(first[:SPAN], "student_entropy_before_answer")
    teacher_first = _mean(first[:SPAN], "teacher_entropy_before_answer")
    if student is None or teacher is None or student_first is None or teacher_first is None:
        return None
    began_above = student_first > ENTROPY_SHARE * teacher_first
    if not began_above or student >= ENTROPY_SHARE * teacher or teacher < LOW_ENTROPY:
        return None
    return (
        f"the student's entropy before the answer is {student:.3f} nats and the teacher's "
        f"{teacher:.3f} on the same tokens: it has stopped to try what the teacher would. A "
        'forward KL keeps entropy: objective.kl = "mixed", or weight_schedule.schedule = '
        '"entropy"'
    )


def jumped_truncation(first: Rows, recent: Rows) -> str | None:
    """The window cuts far more of the student's responses than it did."""
    before, after = first[:SPAN], recent[-SPAN:]
    share, share_first = _mean(after, "truncation"), _mean(before, "truncation")
    if share is None or share_first is None or not _student_writes(after):
        return None
    has_shrunk = min(row["window"] for row in after) < max(row["window"] for row in before)
    if has_shrunk or share - share_first < TRUNCATION_GROWTH:
        return None
    return (
        f"the window cuts {share:.0%} of the student's responses and cut {share_first:.0%} at "
        "first: they do not end. Read samples.jsonl; a lower train.lr or a forward KL keeps the "
        "ends, and `potstill doctor` compares the end tokens of both models"
    )


def loops(first: Rows, recent: Rows) -> str | None:
    """Many of the student's responses are loops, and were not at first."""
    ratio, ratio_first = _mean(recent[-SPAN:], "zlib_ratio"), _mean(first[:SPAN], "zlib_ratio")
    if ratio is None or ratio_first is None or not _student_writes(recent):
        return None
    if not ratio_first < LOOPING <= ratio:
        return None
    return (
        f"the student's responses repeat themselves (zlib makes them {ratio:.1f} times smaller, "
        f"{ratio_first:.1f} times at first). Read samples.jsonl; a lower train.lr, a shorter "
        'window.tokens or window.schedule = "entropy-gated" helps'
    )


def spiking_gradient(first: Rows, recent: Rows) -> str | None:
    """The gradient's norm leaps again and again."""
    norms = [row["grad_norm"] for row in recent]
    before, after = norms[:-SPAN], norms[-SPAN:]
    if len(before) < SPAN:
        return None
    usual = median(before)
    spikes = [norm for norm in after if norm > SPIKE * usual]
    if len(spikes) < NUM_SPIKES:
        return None
    return (
        f"the gradient's norm was above {SPIKE:g} times its median of {usual:.3g} in "
        f"{len(spikes)} of the last {SPAN} steps (up to {max(spikes):.3g}). Lower train.lr or "
        "train.max_grad_norm, or raise train.warmup_steps"
    )


def nothing_learnt(first: Rows, recent: Rows) -> str | None:
    """The loss is what it was at first."""
    # The value of a policy gradient's loss says nothing of what was learnt.
    if recent[-1]["step"] < first[0]["step"] + 2 * LONG_SPAN - 1 or "reward" in recent[-1]:
        return None
    if {_measured_by(row) for row in recent} != {_measured_by(row) for row in first}:
        return None
    before, after = [row["loss"] for row in first], [row["loss"] for row in recent]
    fall = fmean(before) - fmean(after)
    doubt = 2 * math.hypot(stdev(before), stdev(after)) / math.sqrt(LONG_SPAN)
    if fmean(before) < LITTLE_LOSS or fall + doubt >= LEAST_FALL * fmean(before):
        return None
    return (
        f"the loss has not fallen by a tenth in {recent[-1]['step']} steps ({fmean(before):.4g} at "
        f"first, {fmean(after):.4g} now, with a train.lr of {recent[-1]['lr']:.3g}). If it rose, "
        "lower train.lr, else raise it; `potstill doctor` says whether the teacher knows more "
        "than the student here"
    )


def much_left_out(first: Rows, recent: Rows) -> str | None:
    """Most of what the student writes is in no span, and has no loss."""
    left_out = _mean(recent[-SPAN:], "left_out")
    if left_out is None or left_out < MUCH_LEFT_OUT:
        return None
    return (
        f"{left_out:.0%} of the completion tokens of the last {SPAN} steps had no loss, as no span "
        "is around them: the window cut it, or what is written is no text for both tokenizers. "
        "Raise window.tokens, or begin with a student that writes text"
    )


SIGNS: dict[str, Sign] = {
    "entropy": fallen_entropy,
    "truncation": jumped_truncation,
    "loops": loops,
    "gradient": spiking_gradient,
    "loss": nothing_learnt,
    "spans": much_left_out,
}


def _mean(rows: Rows, name: StepNumber) -> float | None:
    """The mean over SPAN steps; None where there are fewer, or one does not know."""
    values = [value_in(row, name) for row in rows]
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(rows) >= SPAN else None


def _student_writes(rows: Rows) -> bool:
    """Whether the responses are the student's, at least some of them."""
    return all(row["prefix"] in ("student", "mixed") for row in rows)


def _measured_by(row: StepMetrics) -> tuple[float | None, ...]:
    """The settings that must be the same for two losses to be compared."""
    return value_in(row, "window"), value_in(row, "forward_weight")
