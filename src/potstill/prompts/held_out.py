"""Prompts of validation, which are never trained on: of the data, of its task, or of their own
source."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from potstill.config import DEFAULT_PROMPTS, PART, Recipe, Window, steps_between
from potstill.prompts.examples import examples_of, load_task
from potstill.prompts.prepare import as_read, asked_of
from potstill.tasks import Task, is_table
from potstill.types import DataError, Example, Prompt

# Problems that are made for each one that is wanted, as some are trained on or evaluated.
SPARE = 2


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Prompts to validate on, the task that scores responses to them, and where an answer ends.

    `origin` says in words where they come from.
    """

    prompts: list[Prompt]
    task: Task | None
    answer_end: Callable[[str], int | None]
    origin: str


def validation_prompts(
    recipe: Recipe, prompts: list[Prompt], *, student, teacher, is_given: bool, date: str
) -> tuple[list[Prompt], HeldOut | None, list[str]]:
    """The prompts that are left to train on, those of validation where there is one, and lines for
    the user.

    `is_given` says that the prompts are no task's, whatever the recipe names. Raises DataError
    where validation is asked for and cannot be had; by default there is none then.
    """
    validation = recipe.validation
    if validation.num_prompts == 0:
        return prompts, None, []
    reason = None if validation.is_asked_for else _why_not(recipe, teacher)
    if reason is None:
        try:
            kept, found = _held_out(
                recipe, prompts, student=student, teacher=teacher, is_given=is_given, date=date
            )
        except DataError as error:
            if validation.is_asked_for:
                raise
            reason = str(error)
        else:
            return (
                kept,
                found,
                [
                    _described(
                        found, len(prompts) - len(kept), every_steps(recipe, recipe.train.steps)
                    )
                ],
            )
    # As many as leave at least half of few prompts to train on.
    num = min(DEFAULT_PROMPTS, len(prompts) // 2) if _can_be_asked_for(recipe, teacher) else 0
    advice = f"; validation.num_prompts = {num} asks for one" if num else ""
    return (
        prompts,
        None,
        [f"no validation: {reason}{advice}"],
    )


def every_steps(recipe: Recipe, num_steps: int) -> int | None:
    """Steps between validations while a run has so many steps; None where by default there is
    none."""
    writes = (
        recipe.objective.prefix != "dataset"
        and recipe.teacher.cache is None
        and recipe.rollouts.reuse == 1
    )
    return steps_between(
        recipe.validation,
        num_steps=num_steps,
        prompts_per_step=recipe.train.prompts_per_step,
        window=recipe.window.tokens,
        writes=writes,
    )


def _why_not(recipe: Recipe, teacher) -> str | None:
    """The reason why there is no validation unless it is asked for; None where there is one by
    default."""
    if recipe.objective.kl == "none":
        return "there is no teacher, and the scores of each step are in the log"
    if teacher is None or not teacher.can_score or teacher.decoder is None:
        return "no live teacher scores what the student writes"
    if recipe.teacher.follows_every is not None:
        return "the teacher follows the student"
    # As it was begun: an extension leaves what is trained on as it was.
    if every_steps(recipe, recipe.train.steps_at_first) is None:
        return "the run is so short that it would take more than a twentieth of it"
    return None


def _can_be_asked_for(recipe: Recipe, teacher) -> bool:
    """Whether there could be a validation: a cache takes the teacher's own text and its states."""
    if teacher is None or teacher.can_score:
        return True
    return recipe.objective.prefix == "teacher" and teacher.head is not None


def _described(found: HeldOut, num_taken: int, every: int | None) -> str:
    taken = f"; {num_taken:,} prompts of the data are not trained on" if num_taken else ""
    return (
        f"validation: {len(found.prompts):,} prompts, {found.origin}, every {every:,} steps{taken}"
    )


def _held_out(
    recipe: Recipe, prompts: list[Prompt], *, student, teacher, is_given: bool, date: str
) -> tuple[list[Prompt], HeldOut]:
    """The prompts that are left to train on, and those of validation. Raises DataError."""
    validation = recipe.validation
    max_tokens = validation.cap(recipe.window.tokens)
    num = DEFAULT_PROMPTS if validation.num_prompts is None else validation.num_prompts
    has_task = not is_given and not is_table(recipe.data.origin)
    can_score = teacher is None or teacher.can_score
    if validation.source is None and not (has_task and can_score):
        kept, held = hold_out_of(prompts, num, is_default=not validation.is_asked_for)
        _refuse_without_room(held, max_tokens, student, teacher)
        task = task_of_data(recipe) if has_task else None
        origin = "held out of the data"
        return kept, HeldOut(prompts=held, task=task, answer_end=_answer_end(task), origin=origin)
    if not can_score:
        raise DataError(
            "validation.source is set and the teacher is a cache, which knows its own prompts "
            "alone; remove it, and validation.num_prompts are held out of those"
        )
    if validation.source is None:
        task, examples, origin = _problems(recipe, prompts, num)
    else:
        task, examples = _of_source(recipe, validation.num_prompts)
        origin = (
            f"from {validation.source}"
            if isinstance(validation.source, str)
            else "from their own files"
        )
    trained = {prompt.token_ids for prompt in prompts}
    given = {"end_ids": None, "max_completion": max_tokens, "date": date}
    found = as_read(examples, recipe, student, teacher, **given)
    if both := [prompt for prompt in found if prompt.token_ids in trained]:
        raise DataError(
            f"{len(both)} of {len(found)} validation prompts are trained on too (the first is "
            f"{both[0].example.name}); remove them from one of both"
        )
    return prompts, HeldOut(prompts=found, task=task, answer_end=_answer_end(task), origin=origin)


def task_of_data(recipe: Recipe) -> Task:
    """The task of the data, which has made the problems that it is to grade."""
    data = recipe.data
    return load_task(
        str(data.origin), split=data.split, num_examples=data.num_prompts, seed=data.seed
    )[0]


def _answer_end(task: Task | None) -> Callable[[str], int | None]:
    return (lambda text: None) if task is None else task.answer_end


def hold_out_of(
    prompts: list[Prompt], num: int, is_default: bool = False
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts without `num` different ones that are taken out, wherever they stand, and these.

    Which ones depends on how many prompts there are, and not on the seed: runs on the same data
    validate on the same. By default no more than a twentieth of the data is taken. Raises
    DataError.
    """
    if is_default and num * PART > len(prompts):
        raise DataError(
            f"{num} prompts would be more than a twentieth of the {len(prompts):,} that there are"
        )
    taken: dict[tuple[int, ...], Prompt] = {}
    for place in random.Random("validation").sample(range(len(prompts)), len(prompts)):
        if len(taken) < num:
            taken.setdefault(prompts[place].token_ids, prompts[place])
    kept = [prompt for prompt in prompts if prompt.token_ids not in taken]
    if not kept or len(taken) < num:
        raise DataError(
            f"validation takes {num} prompts out of {len(prompts):,}, and none is left to train "
            "on; lower validation.num_prompts, give more prompts, or name others in "
            "validation.source"
        )
    return kept, list(taken.values())


def _refuse_without_room(prompts: Sequence[Prompt], max_tokens: int, student, teacher) -> None:
    """Raise DataError for a prompt that leaves no room for a longer completion than training's."""
    lengths = [model.context_length for model in (student, teacher) if model is not None]
    room = min((length for length in lengths if length is not None), default=math.inf)
    for prompt in prompts:
        length = max(len(prompt.ids_of("student")), len(prompt.ids_of("teacher")))
        if length + max_tokens > room:
            raise DataError(
                f"{prompt.example.name} has {length} tokens, which with validation.max_tokens = "
                f"{max_tokens} is more than the context of {room}; lower validation.max_tokens"
            )


def _of_source(recipe: Recipe, num: int | None) -> tuple[Task | None, list[Example]]:
    """The examples of `validation.source`: so many, or as many as there are up to the default; its
    task, if it is one.

    Raises DataError.
    """
    validation, data = recipe.validation, recipe.data
    source = validation.source
    assert source is not None
    split = validation.split or "test"
    if isinstance(source, str) and not is_table(source):
        return load_task(source, split=split, num_examples=num or DEFAULT_PROMPTS, seed=data.seed)
    asked = asked_of(data, recipe.teacher)
    examples = examples_of(source, asked, split=split, num_examples=num)
    return None, examples[: num or DEFAULT_PROMPTS]


def _problems(
    recipe: Recipe, prompts: Sequence[Prompt], num: int
) -> tuple[Task, list[Example], str]:
    """A task, and `num` of its problems that are neither trained on nor evaluated. Raises
    DataError.

    They are of its test split where that has enough, else those that come after the training's.
    """
    source, evaluation = str(recipe.data.origin), recipe.evaluation
    known = [prompt.example for prompt in prompts]
    num_evaluated = 0
    if evaluation.source == source:
        num_evaluated = evaluation.num_problems
        known += load_task(
            source, split=evaluation.split, num_examples=num_evaluated, seed=evaluation.seed
        )[1]
    texts = {repr(example.prompt) for example in known}
    error = None
    for split, seed, num_more, origin in (
        ("test", evaluation.seed, num_evaluated, "problems of the test split"),
        (
            recipe.data.split,
            recipe.data.seed,
            len(prompts),
            "problems that come after those that are trained on",
        ),
    ):
        for spare in (SPARE * num, num):
            try:
                task, examples = load_task(
                    source, split=split, num_examples=num_more + spare, seed=seed
                )
            except DataError as refused:
                error = refused
                continue
            fresh = {repr(e.prompt): e for e in examples if repr(e.prompt) not in texts}
            if len(fresh) >= num:
                return task, list(fresh.values())[:num], origin
    reason = f" ({error})" if error is not None else ""
    raise DataError(
        f"{source!r} has no {num} problems beside those of training and evaluation{reason}; lower "
        "validation.num_prompts, or name others in validation.source"
    )


def hold_out(window: Window, prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and the last ones, which the length gate probes with and which are
    nowhere else.

    Raises DataError when too few are left.
    """
    if window.schedule != "entropy-gated":
        return prompts, []
    num = window.num_probes
    probes = prompts[-num:]
    held_out = {prompt.token_ids for prompt in probes}
    kept = [prompt for prompt in prompts[:-num] if prompt.token_ids not in held_out]
    if not kept:
        raise DataError(
            f"window.num_probes is {num} and there are {len(prompts)} prompts: none is left to "
            "train on; lower it or give more prompts"
        )
    return kept, probes
