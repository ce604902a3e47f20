"""Rollouts for an examination: the first step's, as many and as long as there is time for."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from potstill.checks.finding import Written
from potstill.config import Recipe
from potstill.prompts.mixture import step_places
from potstill.rollouts.prefixes import Writing, from_one, write_rollouts
from potstill.training.controllers import first_window
from potstill.training.setup import Setup
from potstill.types import Prompt, Rollout, Writer

# Seconds for each writer, prompts that are enough, and tokens to guess by how long it takes.
WRITING_SECONDS, ENOUGH, TRIAL_TOKENS = 12.0, 16, 8


@dataclass(frozen=True, kw_only=True)
class WritingTime:
    """Seconds that the step's rollouts took, where `share` of a step's prompts were written to, up
    to `share_of_window` of its window."""

    seconds: float
    share: float
    share_of_window: float


def write_first_step(
    recipe: Recipe, setup: Setup, tell: Callable[[str], None]
) -> tuple[Written, WritingTime]:
    """The rollouts that the first step trains on, and those of each model by itself."""
    num = min(recipe.train.prompts_per_step, ENOUGH)
    prompts, seeds = _first_prompts(recipe, setup, num)
    window = first_window(recipe.window).tokens
    writers = _writers(setup)
    tell("timing how fast the models write")
    writing = _writing(recipe, setup, window)
    each = {who: _seconds_a_token(writing, who, prompts, seeds) for who in writers}
    slowest = max(each.values())
    if window * slowest * recipe.train.prompts_per_step / num <= WRITING_SECONDS:
        num = recipe.train.prompts_per_step
        prompts, seeds = _first_prompts(recipe, setup, num)
    cap = min(window, max(int(WRITING_SECONDS / slowest), TRIAL_TOKENS, _least(recipe)))
    writing = _writing(recipe, setup, cap)
    tell(f"writing {num} rollouts of up to {cap} tokens")
    began = time.perf_counter()
    step = write_rollouts(writing, prompts, seeds)
    seconds = time.perf_counter() - began
    alone: dict[Writer, list[Rollout]] = {"student": [], "teacher": []}
    for who in writers:
        is_there = recipe.objective.prefix == who
        tell(f"writing with the {who} alone")
        alone[who] = step if is_there else from_one(who, writing, prompts[:ENOUGH], seeds[:ENOUGH])
    if setup.cache is not None:
        alone["teacher"] = step if recipe.objective.prefix == "teacher" else []
    written = Written(
        step=step,
        student=alone["student"],
        teacher=alone["teacher"],
        window=cap,
        is_whole=cap == window,
    )
    timing = WritingTime(
        seconds=seconds,
        share=num / recipe.train.prompts_per_step,
        share_of_window=cap / window,
    )
    return written, timing


def _least(recipe: Recipe) -> int:
    """The smallest window in which two writers can take turns as the recipe says."""
    objective = recipe.objective
    has_turns = objective.prefix == "mixed" and objective.prefix_mix == "handoff"
    return objective.handoff_tokens[1] + 1 if has_turns else 1


def _first_prompts(
    recipe: Recipe, setup: Setup, num: int
) -> tuple[list[Prompt], list[tuple[int, ...]]]:
    """The first of the first step's prompts, with the seed of each rollout."""
    per_step, seed = recipe.train.prompts_per_step, recipe.train.seed
    indices = step_places(len(setup.prompts), setup.mixture, per_step, 0, seed)[:num]
    return [setup.prompts[i] for i in indices], [(seed, 0, place) for place in range(num)]


def _writers(setup: Setup) -> tuple[Writer, ...]:
    can_teacher = setup.teacher is not None and setup.teacher.decoder is not None
    return ("student", "teacher") if can_teacher else ("student",)


def _writing(recipe: Recipe, setup: Setup, window: int) -> Writing:
    models: dict[Writer, Any] = {"student": setup.student.decoder}
    if setup.teacher is not None and setup.teacher.decoder is not None:
        models["teacher"] = setup.teacher.decoder
    return Writing(
        objective=recipe.objective,
        models=models,
        window=window,
        end_ids=setup.ends.stop_ids,
        sampling=recipe.sampling,
        rollouts_per_step=recipe.train.prompts_per_step,
        vocab_size=setup.loss.vocab_size,
        cache=setup.cache,
    )


def _seconds_a_token(
    writing: Writing, who: Writer, prompts: list[Prompt], seeds: list[tuple[int, ...]]
) -> float:
    """Seconds of one token of all rows together, the prompts' share included."""
    trial = Writing(
        objective=writing.objective,
        models=writing.models,
        window=min(TRIAL_TOKENS, writing.window),
        end_ids=(),
        sampling=writing.sampling,
        rollouts_per_step=writing.rollouts_per_step,
        vocab_size=writing.vocab_size,
    )
    from_one(who, trial, prompts[:1], seeds[:1])
    began = time.perf_counter()
    from_one(who, trial, prompts, seeds)
    return (time.perf_counter() - began) / trial.window
