"""Seconds that a step takes, by part, from some of its rollouts."""

import time
from collections.abc import Sequence

import torch

from potstill.checks.finding import Finding, Written
from potstill.config import Recipe
from potstill.doctor.writing import WritingTime
from potstill.models.distributed import World
from potstill.training.gradients import accumulate_gradients
from potstill.training.metrics import Stopwatch
from potstill.training.setup import Setup
from potstill.training.step import lean_passes
from potstill.types import Rollout

# Seconds for the rollouts that are learnt from.
LEARNING_SECONDS = 15.0


def speed(
    recipe: Recipe, setup: Setup, world: World, written: Written, rollouts: WritingTime
) -> Finding:
    """How long a step takes without its update, and which part dominates."""
    # The first pass of a process is slower than others.
    shortest = [min(written.step, key=_num_tokens)]
    began = time.perf_counter()
    _learn(recipe, setup, world, shortest)
    seconds_a_token = (time.perf_counter() - began) / _num_tokens(shortest[0])
    num, left = 0, LEARNING_SECONDS / seconds_a_token
    while num < len(written.step) and left > 0:
        left -= _num_tokens(written.step[num])
        num += 1
    clock = _learn(recipe, setup, world, written.step[:num])
    share = num / len(written.step) * rollouts.share
    # The rest of responses that time has cut is taken to be as slow; those that end take less.
    parts = {
        "rollout": rollouts.seconds / rollouts.share * rollouts.writing_grows,
        "teacher": clock.seconds["teacher_seconds"] / share * rollouts.learning_grows,
        "student": clock.seconds["student_seconds"] / share * rollouts.learning_grows,
    }
    total = sum(parts.values())
    dominant = max(parts, key=lambda part: parts[part])
    about = "at most about" if rollouts.learning_grows > 1 else "about"
    says = (
        f"{about} {total:.3g} s a step, {_duration(total * recipe.train.steps)} in all: "
        + ", ".join(f"{part} {value / total:.0%}" for part, value in parts.items())
    )
    measured = {f"{part}_seconds": value for part, value in parts.items()}
    measured |= {"seconds": total, "dominant": dominant, "num_rollouts": num}
    return Finding(check="speed", level="ok", says=says, measured=measured)


@torch.enable_grad()
def _learn(recipe: Recipe, setup: Setup, world: World, rollouts: Sequence[Rollout]) -> Stopwatch:
    """The gradient of these rollouts, which is thrown away, and the time that its parts took."""
    clock, student = Stopwatch(world.device), setup.student
    student.train(recipe.student.dropout)
    try:
        with lean_passes(setup, recipe.train):
            accumulate_gradients(
                setup,
                setup.loss,
                list(rollouts),
                settings=recipe.train,
                step=0,
                world=world,
                clock=clock,
            )
    finally:
        student.zero_grad(set_to_none=True)
        student.eval()
    return clock


def _num_tokens(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + len(rollout.completion_ids)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
