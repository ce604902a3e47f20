"""Controllers: the forward weight and the window of the next step, from what the steps so far have
shown.

Each is a pure function from settings, a frozen state and numbers to a new state and a decision.
States are plain data, which the checkpoint keeps. What they look at is the student's entropy up to
the first answer or stop. A loop after it has an entropy of nearly zero and most of the tokens, so
that the entropy of all tokens would tell of the loop alone (docs/theory.md, section 8).
"""

import itertools
import math
from dataclasses import dataclass

from potstill.config import HIGHER_IS_BETTER, Goal, WeightSchedule, Window
from potstill.runs.schema import GateAction, GateDecision


@dataclass(frozen=True, slots=True)
class WeightState:
    """The forward weight in use, and the entropy of the first step once there is one."""

    weight: float
    first_entropy: float | None = None


def scheduled_weight(schedule: WeightSchedule, start: float, step: int, num_steps: int) -> float:
    """The forward weight of step 0, 1, ... by a schedule of steps alone."""
    if schedule.schedule == "steps":
        return [start, *(weight for at, weight in schedule.at_steps if at <= step)][-1]
    if schedule.schedule in ("linear", "cosine"):
        done = min(step / max((schedule.over_steps or num_steps) - 1, 1), 1.0)
        if schedule.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return start + (schedule.end_weight - start) * done
    return start


def next_weight(
    schedule: WeightSchedule, state: WeightState, entropy: float, teacher_entropy: float
) -> WeightState:
    """The weight after a step with these entropies (nats) and schedule = "entropy": `rate` at most,
    with a dead band.

    Below the floor the weight rises, above floor + band it falls, each by how far the entropy is
    off relative to the floor, times `rate`; in between it stays.
    """
    first = entropy if state.first_entropy is None else state.first_entropy
    unit = {"first": first, "absolute": 1.0, "teacher": teacher_entropy}[schedule.reference]
    floor, ceiling = schedule.floor * unit, (schedule.floor + schedule.band) * unit
    miss = max(floor - entropy, 0.0) - max(entropy - ceiling, 0.0)
    change = schedule.rate * max(-1.0, min(miss / floor, 1.0)) if floor > 0 else 0.0
    low, high = schedule.bounds
    return WeightState(min(max(state.weight + change, low), high), first)


@dataclass(frozen=True, slots=True)
class BestState:
    """The best validation so far: after which step, its value, and how many came since that were
    not better."""

    step: int | None = None
    value: float | None = None
    num_since: int = 0


def next_best(goal: Goal, state: BestState, step: int, value: float) -> BestState:
    """The best validation once there is one more. Equal is not better."""
    sign = -1 if goal in HIGHER_IS_BETTER else 1
    if state.value is None or sign * value < sign * state.value:
        return BestState(step, value)
    return BestState(state.step, state.value, state.num_since + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A measurement of the student's own rollouts on held-out prompts at a window.

    Entropies in nats a token up to the first answer or stop, shares of responses that were cut by
    the window (of the student's and of the teacher's), and the share of responses that are loops.
    """

    entropy: float
    teacher_entropy: float | None
    truncation: float
    teacher_truncation: float
    repetition: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowState:
    """The window in use, probes passed in a row there, whether it may still grow, and the first
    probe's entropy.

    `teacher_truncation` is the share of the teacher's responses that this window cuts, once it is
    known.
    """

    tokens: int
    num_passed: int = 0
    frozen: bool = False
    first_entropy: float | None = None
    teacher_truncation: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The result of a probe: the window from now on, why, and the numbers."""

    action: GateAction
    window: int
    failed: tuple[str, ...]
    threshold: float
    probe: Probe

    def as_row(self) -> GateDecision:
        """Plain data for the run log."""
        return {
            "action": self.action,
            "window": self.window,
            "failed": list(self.failed),
            "threshold": self.threshold,
            "entropy": self.probe.entropy,
            "teacher_entropy": self.probe.teacher_entropy,
            "truncation": self.probe.truncation,
            "teacher_truncation": self.probe.teacher_truncation,
            "repetition": self.probe.repetition,
        }

    def __str__(self) -> str:
        probe = self.probe
        text = (
            f"window {self.action}, now {self.window}: entropy {probe.entropy:.3f} (threshold "
            f"{self.threshold:.3f}), truncation {probe.truncation:.0%} (teacher "
            f"{probe.teacher_truncation:.0%}), repetition {probe.repetition:.0%}"
        )
        return text + (f"; failed: {', '.join(self.failed)}" if self.failed else "")


def rungs(window: Window) -> tuple[int, ...]:
    """The windows of the ladder, the first one included; doubling up to the cap where the recipe
    has none."""
    if window.ladder is not None:
        return (window.start, *window.ladder)
    doubled = itertools.takewhile(
        lambda n: n < window.tokens, (window.start * 2**i for i in itertools.count())
    )
    return (*doubled, window.tokens)


def first_window(window: Window) -> WindowState:
    """The state before the first step."""
    return WindowState(tokens=window.tokens if window.schedule == "fixed" else window.start)


def scheduled_window(window: Window, step: int, num_steps: int) -> int:
    """The window of step 0, 1, ... by schedule = "linear"."""
    done = min(step / max((window.over_steps or num_steps) - 1, 1), 1.0)
    return round(window.start + (window.tokens - window.start) * done)


def is_probe_due(window: Window, state: WindowState, step: int, reuse: int) -> bool:
    """Whether the gate looks before this step, which begins a set of rollouts that serves `reuse`
    steps.

    It does so when a multiple of `check_every` has come since the last set began, while anything
    can still change.
    """
    if window.schedule != "entropy-gated":
        return False
    is_open = state.tokens < window.tokens or window.step_back
    crossed = step == 0 or step // window.check_every > (step - reuse) // window.check_every
    return crossed and is_open and not (state.frozen and window.sticky)


def decide(window: Window, state: WindowState, probe: Probe) -> tuple[WindowState, Decision]:
    """One decision of the gate. The first probe sets the reference and counts for nothing else but
    its other gates.

    All gates passed: one more in a row, and with `patience` of them the next window of the ladder.
    Any gate failed: the window freezes, for good if sticky, one step down the ladder if it may step
    back.
    """
    first = probe.entropy if state.first_entropy is None else state.first_entropy
    unit = {"first": first, "absolute": 1.0, "teacher": probe.teacher_entropy or 0.0}[
        window.reference
    ]
    threshold = window.threshold * unit
    gates = {
        "entropy": probe.entropy >= threshold,
        "truncation": probe.truncation - probe.teacher_truncation <= window.max_truncation,
        "repetition": probe.repetition <= window.max_repetition,
    }
    failed = tuple(name for name, passed in gates.items() if not passed)
    ladder = rungs(window)
    place = ladder.index(state.tokens)
    tokens, num_passed, frozen = state.tokens, 0, state.frozen
    action: GateAction = "hold"
    if failed:
        frozen, action = True, "freeze"
        if window.step_back and place > 0:
            tokens, action = ladder[place - 1], "step back"
    elif not (state.frozen and window.sticky):
        frozen = False
        num_passed = state.num_passed + (state.first_entropy is not None)
        if num_passed >= window.patience and tokens < window.tokens:
            tokens, num_passed, action = ladder[place + 1], 0, "climb"
    truncation = probe.teacher_truncation if tokens == state.tokens else None
    new = WindowState(
        tokens=tokens,
        num_passed=num_passed,
        frozen=frozen,
        first_entropy=first,
        teacher_truncation=truncation,
    )
    return new, Decision(
        action=action, window=tokens, failed=failed, threshold=threshold, probe=probe
    )
