"""The prompts of a run: what its recipe names, or what Python gives, as both models read it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from potstill.config import Data, Recipe, TeacherSpec
from potstill.prompts.examples import (
    examples_of,
    make_prompts,
    prompt_notes,
    with_teacher_prompts,
)
from potstill.prompts.overview import length_table
from potstill.prompts.rows import LEVEL, Asked, make_examples, rows_of_objects
from potstill.prompts.system import system_notes, with_system
from potstill.tasks import is_table
from potstill.tasks.tables import blank_lines, sources, with_own_ids
from potstill.types import Example, Prompt

# So many examples have their texts compared where two tokenizers differ.
NUM_TEXTS = 200


def prepare_prompts(
    recipe: Recipe,
    student,
    teacher,
    *,
    end_ids: Sequence[int],
    date: str,
    given: Sequence[Any] | None = None,
) -> tuple[list[Prompt], list[str]]:
    """Prompts that fit both models, and lines for the user about them.

    `given` takes the place of `data.source`. `end_ids` are what ends a completion, the first of
    them a document. Raises DataError.
    """
    data = recipe.data
    # A teacher that is not there reads no prompts.
    spec = recipe.teacher if teacher is not None else TeacherSpec()
    examples = _examples(data, spec, given)
    notes = _about_blank_lines(data.origin) if given is None else []
    closing_ids = end_ids if recipe.objective.prefix == "dataset" else None
    prompts = as_read(
        examples,
        recipe,
        student,
        teacher,
        end_ids=closing_ids,
        max_completion=recipe.window.tokens,
        date=date,
    )
    names = ["from Python"] if given is not None else sources(data.origin)
    notes += length_table(names, examples, prompts, recipe.window.tokens)
    notes += system_notes(examples, data.system) + prompt_notes(
        len(examples), prompts, student.tokenizer, data.template, data.template_arguments
    )
    return prompts, notes


def texts_of(recipe: Recipe, given: Sequence[Any] | None = None) -> list[str]:
    """The texts of a run's first prompts and completions, as they are before any template."""
    texts: list[str] = []
    for example in _examples(recipe.data, recipe.teacher, given)[:NUM_TEXTS]:
        for part in (example.prompt, example.completion or ()):
            if isinstance(part, str):
                texts.append(part)
                continue
            # Messages of a chat, or segments that are trained on or not.
            contents = [it.get("content") if isinstance(it, dict) else it[0] for it in part]
            texts += [content for content in contents if isinstance(content, str)]
    return texts


def _examples(data: Data, spec: TeacherSpec, given: Sequence[Any] | None) -> list[Example]:
    """The examples of the data's source, or those that are given. Raises DataError."""
    if given is None:
        return _load(data, spec)
    rows = rows_of_objects(given, data.prompt_column)
    return make_examples(rows, asked_of(data, spec))


def asked_of(data: Data, teacher: TeacherSpec) -> Asked:
    """Where the rows of a recipe's data have what both models are asked."""
    return Asked(
        column=data.prompt_column,
        template=data.prompt_template,
        teacher_column=teacher.prompt_column,
        teacher_template=teacher.prompt_template,
        train_on=data.train_on,
        level_column=data.level_column,
    )


def _load(data: Data, teacher: TeacherSpec) -> list[Example]:
    """The examples of the data's source, or of its several sources one after the other. Raises
    DataError."""
    asked = asked_of(data, teacher)
    if not data.sources:
        return examples_of(
            data.source,
            asked,
            split=data.split,
            num_examples=data.num_prompts,
            seed=data.seed,
            config=data.config,
        )
    examples = []
    for place, each in enumerate(data.sources):
        its_own = asked
        if each.prompt_column is not None or each.prompt_template is not None:
            column = each.prompt_column or data.prompt_column
            its_own = replace(asked, column=column, template=each.prompt_template)
        if each.level is not None:
            its_own = replace(its_own, level_column=LEVEL)
        found = examples_of(
            each.source,
            its_own,
            split=each.split or "train",
            num_examples=each.num_prompts,
            config=each.config,
        )
        examples += [
            replace(example, source=place, level=each.level or example.level) for example in found
        ]
    return with_own_ids(examples)


def as_read(
    examples: Sequence[Example],
    recipe: Recipe,
    student,
    teacher,
    *,
    end_ids: Sequence[int] | None,
    max_completion: int,
    date: str,
) -> list[Prompt]:
    """Examples as prompts that both models of a run read, with room for completions. Raises
    DataError.

    With `end_ids` each example must have a completion, which one of them closes.
    """
    data = recipe.data
    examples = with_system(examples, data.system, data.template)
    options: dict[str, Any] = {
        "max_completion": max_completion,
        "template_arguments": data.template_arguments,
        "date": date,
        "max_prompt_tokens": data.max_prompt_tokens,
        "too_long": data.too_long,
    }
    lengths = [
        m.context_length
        for m in (student, teacher)
        if m is not None and m.context_length is not None
    ]
    prompts = make_prompts(
        examples,
        student.tokenizer,
        template=data.template,
        context_length=min(lengths, default=None),
        end_ids=end_ids,
        **options,
    )
    asks_otherwise = (
        recipe.teacher.template is not None
        or recipe.objective.signal == "spans"
        or any(e.teacher_prompt is not None for e in examples)
    )
    if teacher is not None and asks_otherwise:
        prompts = with_teacher_prompts(
            prompts,
            teacher.tokenizer,
            template=recipe.teacher.template or data.template,
            context_length=teacher.context_length,
            **options,
        )
    return prompts


def _about_blank_lines(source: str | Sequence[str]) -> list[str]:
    if not is_table(source):
        return []
    return [
        f"{file} has {num:,} blank lines, which are no prompts"
        for file, num in blank_lines(source).items()
    ]
