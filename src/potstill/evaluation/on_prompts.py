"""Models on prompts of any kind, without a task: what a run's validation measures, and a judge's
score."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from potstill.config import EngineSpec, Evaluation, Objective, Sampling, Train
from potstill.engines.make import engine_for
from potstill.evaluation.quality import STUDENT, TEACHER, Pair, estimates, measure
from potstill.models.language_model import LanguageModel
from potstill.models.probe import ready
from potstill.prompts.examples import load_examples, make_prompts, prompt_notes
from potstill.rollouts.prefixes import Writing, from_one
from potstill.seeds import Stream, stream_key
from potstill.tasks import is_table
from potstill.tasks.own import OwnJudge
from potstill.teachers.ends import end_set, named_end_ids, separate_ids
from potstill.teachers.rope import refuse_crossing
from potstill.teachers.vocabulary import (
    num_named_rows,
    refuse_unshared_ids,
    shared_vocab_size,
)
from potstill.types import DataError, Example, Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class OnPrompts:
    """Prompts to measure models on, with how they write, what scores them, and what judges them.

    Of `settings` the lengths, the ends, the template, the seed and the size of batches are read.
    With an `engine` servers of it write, else this process.
    """

    examples: list[Example]
    source: str
    settings: Evaluation
    teacher: LanguageModel | None = None
    judge: OwnJudge | None = None
    engine: EngineSpec | None = None
    # Rollouts of the teacher, by how it was asked.
    written: dict[Any, list[Rollout]] = field(default_factory=dict)


def read_prompts(source: str, num: int | None) -> list[Example]:
    """The first prompts of a file or data set, by default all. Raises DataError."""
    if not is_table(source):
        raise DataError(
            f"--prompts is the task {source!r}, whose responses can be scored; name it as --source"
        )
    return load_examples(source, num_examples=num)


def evaluate_on_prompts(
    given: LanguageModel | str, asked: OnPrompts, date: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The quantities of `quality.QUANTITIES` that are known of a model, each as value, low and high
    of its 95 % bootstrap interval over prompts; and lines for the user.

    The model writes at temperature 1 from its whole distribution, and so does the teacher. Without
    a teacher there is only what needs none. Raises ModelError or DataError.
    """
    settings, teacher = asked.settings, asked.teacher
    student = ready(given)
    student.eval()
    end_ids = named_end_ids(student.tokenizer, settings.end_tokens) or end_set(student, teacher)
    vocab_size = num_named_rows(student)
    end_class: tuple[int, ...] = ()
    if teacher is not None:
        vocab_size = shared_vocab_size(student, teacher)
        apart = separate_ids(student.tokenizer, end_ids, None)
        end_class = tuple(i for i in end_ids if i < vocab_size and i not in apart)
    prompts = _prompts(student, asked, date)
    if teacher is not None:
        refuse_unshared_ids(prompts, vocab_size, student.tokenizer)
    pair = Pair(
        student=student,
        teacher=teacher,
        vocab_size=vocab_size,
        end_class=end_class if len(end_class) > 1 else (),
        tokens_per_batch=Train().tokens_per_batch,
    )
    writing = Writing(
        objective=Objective(),
        engines={},
        window=settings.max_tokens,
        end_ids=tuple(end_ids),
        sampling=Sampling(batch_size=settings.batch_size),
        rollouts_per_step=len(prompts),
        vocab_size=vocab_size,
    )
    written = _write(STUDENT, student, writing, prompts, asked)
    sums = measure(pair, STUDENT, written, judge=asked.judge)
    if teacher is not None:
        key = (vocab_size, writing.end_ids, tuple(prompt.token_ids for prompt in prompts))
        if key not in asked.written:
            asked.written[key] = _write(TEACHER, teacher, writing, prompts, asked)
        teachers = measure(pair, TEACHER, asked.written[key])
        sums = [mine | theirs for mine, theirs in zip(sums, teachers, strict=True)]
    row = {
        "model": student.name,
        "teacher": None if teacher is None else teacher.name,
        "judge": None if asked.judge is None else asked.judge.source,
        "prompts": asked.source,
        "num_prompts": len(prompts),
        "max_tokens": settings.max_tokens,
        "end_ids": list(end_ids),
        **estimates(sums),
    }
    told = (settings.template, settings.template_arguments)
    return row, prompt_notes(len(asked.examples), prompts, student.tokenizer, *told)


def _write(
    who: Literal["teacher", "student"],
    model: LanguageModel,
    writing: Writing,
    prompts: list[Prompt],
    asked: OnPrompts,
) -> list[Rollout]:
    """The rollouts of one of them; with seed 0 as in a run's validation."""
    keys = [stream_key((0, asked.settings.seed, i), Stream.VALIDATION) for i in range(len(prompts))]
    longest = max(len(prompt.ids_of(who)) for prompt in prompts) + writing.window
    with engine_for(asked.engine, model.model, folder=None, max_tokens=longest) as engine:
        return from_one(who, dataclasses.replace(writing, engines={who: engine}), prompts, keys)


def _prompts(student: LanguageModel, asked: OnPrompts, date: str | None) -> list[Prompt]:
    """The prompts as the student reads them, with room for completions in both contexts."""
    settings = asked.settings
    models = [model for model in (student, asked.teacher) if model is not None]
    lengths = [model.context_length for model in models if model.context_length is not None]
    told: Mapping[str, Any] = settings.template_arguments
    prompts = make_prompts(
        asked.examples,
        student.tokenizer,
        template=settings.template,
        max_completion=settings.max_tokens,
        context_length=min(lengths, default=None),
        template_arguments=told,
        date=date,
    )
    read: Sequence[tuple[int, ...]] = [prompt.token_ids for prompt in prompts]
    for model in models:
        refuse_crossing(model, read, settings.max_tokens, "--max-tokens")
    return prompts
