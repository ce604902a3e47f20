"""Rollouts for an examination: the first step's, as many and as long as there is time for."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from potstill.checks.finding import Written
from potstill.config import Recipe
from potstill.engines.make import engine_for, engine_spec
from potstill.engines.protocol import Engine
from potstill.models import distributed
from potstill.models.distributed import World
from potstill.objectives.reward import with_credit
from potstill.prompts.mixture import step_places
from potstill.rollouts.prefixes import Writing, from_one, write_rollouts
from potstill.rollouts.spans import with_readings
from potstill.rollouts.text import responses
from potstill.training.controllers import first_window
from potstill.training.setup import Setup, writing_of
from potstill.training.state import writes_in_another_type
from potstill.types import Prompt, Rollout, Writer

# Seconds for each writer, and tokens to guess by how long it takes.
WRITING_SECONDS, TRIAL_TOKENS = 12.0, 8
# Prompts that are enough, and those that are left where the models are slow: a few long responses
# say more than many beginnings.
ENOUGH, FEW = 16, 4


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds to read the prompts of some rows, and to write one token of all of them."""

    prompts: float
    token: float

    def seconds(self, num_tokens: int) -> float:
        return self.prompts + num_tokens * self.token

    def most_tokens(self, seconds: float) -> int:
        return int(max(seconds - self.prompts, 0.0) / self.token)


@dataclass(frozen=True, kw_only=True)
class WritingTime:
    """Seconds that rollouts to a `share` of a step's prompts took.

    Where they were cut for want of time, whole ones would take at most so many times as long to
    write (`writing_grows`) and to learn from (`learning_grows`); else both are 1.
    """

    seconds: float
    share: float
    writing_grows: float
    learning_grows: float


def write_first_step(
    recipe: Recipe, setup: Setup, tell: Callable[[str], None]
) -> tuple[Written, WritingTime]:
    """The rollouts that the first step trains on, and those of each model by itself, by the engines
    of the recipe."""
    with ExitStack() as stack:
        engines = _engines(recipe, setup, stack)
        window = first_window(recipe.window).tokens
        return _write(recipe, setup, writing_of(recipe, setup, engines, window), tell)


def _write(
    recipe: Recipe, setup: Setup, writing: Writing, tell: Callable[[str], None]
) -> tuple[Written, WritingTime]:
    per_step, window = recipe.rollouts_per_step, writing.window
    tell("timing how fast the models write")
    num, pace = _rows_and_pace(recipe, setup, writing)
    if pace.seconds(window) * per_step / num <= WRITING_SECONDS:
        num = per_step
    prompts, seeds = _first_prompts(recipe, setup, num)
    cap = min(window, max(pace.most_tokens(WRITING_SECONDS), TRIAL_TOKENS, _least(recipe)))
    writing = dataclasses.replace(writing, window=cap)
    tell(f"writing {num} rollouts of up to {cap} tokens")
    began = time.perf_counter()
    step = with_readings(write_rollouts(writing, prompts, seeds), setup.loss.translation)
    seconds = time.perf_counter() - began
    if setup.grader is not None:
        texts = responses(step, setup.student.tokenizer)
        step = with_credit(step, texts, setup.grader, setup.loss.reward)
    alone: dict[Writer, list[Rollout]] = {"student": [], "teacher": []}
    for who in writing.engines:
        if recipe.objective.prefix == who:
            alone[who] = step
            continue
        tell(f"writing with the {who} alone")
        alone[who] = from_one(who, writing, prompts[:ENOUGH], seeds[:ENOUGH])
    if setup.cache is not None:
        alone["teacher"] = step if recipe.objective.prefix == "teacher" else []
    written = Written(
        step=step,
        student=alone["student"],
        teacher=alone["teacher"],
        window=cap,
        is_whole=cap == window,
    )
    num_read = sum(len(prompt.token_ids) for prompt in prompts) / num
    timing = WritingTime(
        seconds=seconds,
        share=num / per_step,
        writing_grows=pace.seconds(window) / pace.seconds(cap),
        learning_grows=(num_read + window) / (num_read + cap),
    )
    return written, timing


def _rows_and_pace(recipe: Recipe, setup: Setup, writing: Writing) -> tuple[int, Pace]:
    """How many prompts are written to, and the pace of the slower model at so many."""
    num, pace = 0, Pace(prompts=0.0, token=0.0)
    for most in (ENOUGH, FEW):
        num = min(recipe.rollouts_per_step, most)
        given = _first_prompts(recipe, setup, num)
        paces = [_pace(writing, who, *given) for who in writing.engines]
        pace = max(paces, key=lambda each: each.seconds(writing.window))
        if pace.seconds(writing.window) <= WRITING_SECONDS:
            break
    return num, pace


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
    size = recipe.reward.group_size
    indices = step_places(len(setup.prompts), setup.mixture, per_step, 0, seed)
    prompts = [setup.prompts[indices[number // size]] for number in range(num)]
    return prompts, [(seed, 0, number) for number in range(num)]


def _engines(recipe: Recipe, setup: Setup, stack: ExitStack) -> dict[Writer, Engine]:
    """An engine for each model that writes, until the stack is closed; their logs do not stay."""
    prefix = recipe.objective.prefix
    alone = World(0, 1, setup.student.device)
    is_another = writes_in_another_type(recipe, setup)
    models: dict[Writer, Any] = {
        "student": distributed.shard(setup.student, alone, in_bfloat16=is_another)
    }
    if setup.compared is not None and setup.compared.decoder is not None:
        models["teacher"] = setup.compared.decoder
    engines: dict[Writer, Engine] = {}
    for who, model in models.items():
        # As in a run: what writes no prefixes writes here.
        spec = engine_spec(recipe) if who == "student" or prefix in ("teacher", "mixed") else None
        place: dict[str, Any] = {"folder": None, "max_tokens": setup.longest}
        engines[who] = stack.enter_context(engine_for(spec, model, **place))
    return engines


def _pace(
    writing: Writing, who: Writer, prompts: list[Prompt], seeds: list[tuple[int, ...]]
) -> Pace:
    """The pace of one model over its first tokens, where no row ends."""
    trial = dataclasses.replace(writing, end_ids=(), cache=None)
    seconds = []
    # The first pass of a process is slower than others, and is not counted.
    for num_tokens, num_rows in ((1, 1), (1, len(prompts)), (1 + TRIAL_TOKENS, len(prompts))):
        of_length = dataclasses.replace(trial, window=num_tokens)
        began = time.perf_counter()
        from_one(who, of_length, prompts[:num_rows], seeds[:num_rows])
        seconds.append(time.perf_counter() - began)
    _, read, whole = seconds
    # On a busy machine the shorter trial may take longer.
    token = max(whole - read, whole / 10) / TRIAL_TOKENS
    return Pace(prompts=read, token=token)
