"""From a data source to prompts: rows, or a task's problems, as examples; these as tokens.

Everything about the prompts is checked here, before any work is done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from potstill.models.templates import ChatTemplate
from potstill.prompts.chat import render_examples
from potstill.prompts.encoding import Encoding, Room, TooLong, close_completion, fit_prompts
from potstill.prompts.rows import Asked, make_examples
from potstill.tasks import Task, is_table, make_task
from potstill.tasks.tables import read_table_rows, sources
from potstill.types import DataError, Example, Prompt

# A task makes any number of problems; this many when the recipe does not say.
DEFAULT_TASK_PROMPTS = 4096


def load_task(
    source: str, *, split: str, num_examples: int | None, seed: int
) -> tuple[Task, list[Example]]:
    """A task and some of its examples, from one object: a task may grade by what it knows of those
    that it made.

    Raises DataError.
    """
    try:
        task = make_task(source)
        return task, task.examples(split, num_examples or DEFAULT_TASK_PROMPTS, seed)
    except ValueError as error:
        raise DataError(f"data source {source!r}: {error}") from None


def load_examples(
    source: str | Sequence[str],
    *,
    split: str = "train",
    num_examples: int | None = None,
    prompt_column: str = "prompt",
    prompt_template: str | None = None,
    seed: int = 0,
    teacher_column: str | None = None,
    teacher_template: str | None = None,
    config: str | None = None,
    train_on: Literal["last", "all"] = "last",
) -> list[Example]:
    """Examples of a task, of data files, or of a data set that `datasets` loads (a hub id or a
    folder).

    A row has `prompt` (a string or chat messages), `prompt` and `completion`, or `messages` whose
    last one is the assistant's. The completion of `messages` is the assistant's last turn, or by
    `train_on` all that follows its first one. `tools`, `answer`, `level` and `id` are kept when
    present.
    `prompt_template` is filled in from columns and takes the place of `prompt_column`.
    `teacher_column` holds the teacher's own prompts, or `teacher_template` makes them. Raises
    DataError.
    """
    asked = Asked(
        column=prompt_column,
        template=prompt_template,
        teacher_column=teacher_column,
        teacher_template=teacher_template,
        train_on=train_on,
    )
    options: Any = {"split": split, "num_examples": num_examples, "seed": seed, "config": config}
    return examples_of(source, asked, **options)


def examples_of(
    source: str | Sequence[str],
    asked: Asked,
    *,
    split: str = "train",
    num_examples: int | None = None,
    seed: int = 0,
    config: str | None = None,
) -> list[Example]:
    """Examples as `load_examples` has them, by what is asked for in rows. Raises DataError."""
    if isinstance(source, str) and not is_table(source):
        return load_task(source, split=split, num_examples=num_examples, seed=seed)[1]
    for name in sources(source):
        if not is_table(name):
            raise DataError(
                f"{source!r} has the task {name!r} among its tables; give files and data sets, "
                "or a task alone"
            )
    rows = read_table_rows(
        source, asked.columns(), num_rows=num_examples, split=split, config=config
    )
    if not rows:
        raise DataError(f"{source!r} has no rows; give a data source with at least one prompt")
    if num_examples is not None and num_examples > len(rows):
        raise DataError(
            f"{num_examples} examples are asked of {source!r}, which has {len(rows)}; ask for at "
            "most that many"
        )
    return make_examples(rows, asked)


def make_prompts(
    examples: Sequence[Example],
    tokenizer,
    *,
    template: Literal["chat", "raw"] | None,
    max_completion: int,
    context_length: int | None,
    end_ids: Sequence[int] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    date: str | None = None,
    max_prompt_tokens: int | None = None,
    too_long: TooLong | None = None,
) -> list[Prompt]:
    """Tokenise examples and see to it that each prompt leaves room for `max_completion` tokens.
    Raises DataError.

    `template` is "chat", "raw" or None (chat for messages, raw for strings); `template_arguments`
    and `date` are what chat templates are told. With the `end_ids` of a run, its own first, every
    example must have a completion, which is closed by one of them. `too_long` says what becomes of
    prompts that are longer than there is room for.
    """
    if not examples:
        raise DataError("the prompt list is empty; give at least one prompt")
    chat_template = ChatTemplate(tokenizer, template_arguments, date)
    is_chat = [_is_chat(example, tokenizer, template) for example in examples]
    chats = [example for example, chat in zip(examples, is_chat, strict=True) if chat]
    texts = iter(render_examples(chats, chat_template, end_ids))
    encoding = Encoding(tokenizer)
    prompts = []
    for example, chat in zip(examples, is_chat, strict=True):
        text = next(texts) if chat else None
        if text is None and example.tools:
            raise DataError(
                f"{example.name} has tools and is taken as it is, so no model would read them; "
                'set data.template = "chat", or leave the tools out'
            )
        token_ids = (
            encoding.start_of(str(example.prompt)) if text is None else encoding.encode(text.prompt)
        )
        if not token_ids:
            raise DataError(f"{example.name} has no tokens: {example.prompt!r}")
        completion_ids, trained = None, None
        if end_ids is not None:
            completion_ids, trained = close_completion(
                example, text, encoding, chat_template, end_ids
            )
        prompt = Prompt(
            example=example, token_ids=token_ids, completion_ids=completion_ids, trained=trained
        )
        prompts.append(prompt)
    room = Room(max_completion, context_length, max_prompt_tokens, too_long)
    return fit_prompts(prompts, "student", room, encoding)


def with_teacher_prompts(
    prompts: list[Prompt],
    tokenizer,
    *,
    max_prompt_tokens: int | None = None,
    too_long: TooLong | None = None,
    **options,
) -> list[Prompt]:
    """The prompts with what the teacher reads, rendered by its own tokenizer; arguments and errors
    as make_prompts.

    Prompts are left out where the teacher's are too long.
    """
    room = Room(
        options.pop("max_completion"), options.pop("context_length"), max_prompt_tokens, too_long
    )
    examples = [
        replace(p.example, prompt=p.example.teacher_prompt or p.example.prompt) for p in prompts
    ]
    if options["template"] == "raw":
        # The recipe says of the teacher that it reads no chat.
        examples = [replace(example, tools=None) for example in examples]
    asked = make_prompts(examples, tokenizer, max_completion=0, context_length=None, **options)
    both = [
        replace(prompt, teacher_ids=own.token_ids)
        for prompt, own in zip(prompts, asked, strict=True)
    ]
    return fit_prompts(both, "teacher", room, Encoding(tokenizer))


def prompt_notes(
    num_examples: int,
    prompts: Sequence[Prompt],
    tokenizer,
    template: Literal["chat", "raw"] | None,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[str]:
    """Lines for the user: what was left out, cut or not added, and what no template reads."""
    notes = []
    as_it_is = [p for p in prompts if isinstance(p.example.prompt, str) and template != "chat"]
    if template is None and tokenizer.chat_template and as_it_is:
        notes.append(
            'warning: the prompts are taken as they are; template = "chat" would render them '
            "with the chat template"
        )
    if (num := num_examples - len(prompts)) > 0:
        notes.append(f"warning: {num:,} of {num_examples:,} prompts are too long and left out")
    if num := sum(prompt.num_cut > 0 for prompt in prompts):
        notes.append(
            f"warning: {num:,} of {len(prompts):,} prompts are too long and lost tokens at their "
            "beginning"
        )
    encoding = Encoding(tokenizer)
    start = "".join(map(str, tokenizer.convert_ids_to_tokens(list(encoding.start_ids))))
    if start and (num := sum(str(p.example.prompt).startswith(start) for p in as_it_is)):
        notes.append(
            f"warning: {num:,} prompts begin with {start} already; the tokenizer's own is not added"
        )
    if unread := ChatTemplate(tokenizer, template_arguments).unread_arguments():
        notes.append(f"warning: the chat template reads no argument {', '.join(map(repr, unread))}")
    return notes


def _is_chat(example: Example, tokenizer, template: Literal["chat", "raw"] | None) -> bool:
    """Whether an example is rendered. Raises DataError where it must be and cannot."""
    is_list = not isinstance(example.prompt, str)
    if template == "raw" and is_list:
        raise DataError(
            f'{example.name} is a list of messages, and data.template is "raw"; use "chat"'
        )
    if not is_list and template != "chat":
        return False
    if not tokenizer.chat_template:
        instead = "give prompts that are strings" if is_list else 'set template = "raw"'
        raise DataError(
            f"{example.name} needs a chat template and the tokenizer has none; choose a "
            f"tokenizer that has one, or {instead}"
        )
    return True
