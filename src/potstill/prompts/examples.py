"""From a data source to prompts: rows, or a task's problems, as examples; these as tokens.

Everything about the prompts is checked here, before any work is done.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from potstill.models.templates import ChatTemplate
from potstill.prompts.chat import render_examples
from potstill.prompts.encoding import Encoding, Room, TooLong, close_completion, fit_prompts
from potstill.tasks import Task, is_table, make_task
from potstill.tasks.tables import Row, make_row, read_rows, sources, with_own_ids
from potstill.types import DataError, Example, Message, Prompt

# A task makes any number of problems; this many when the recipe does not say.
DEFAULT_TASK_PROMPTS = 4096
# Columns beside the prompt's.
COLUMNS = ("messages", "completion", "tools", "answer", "level", "id")
# What an assistant's message may have with no content.
INSTEAD_OF_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")


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
    seed: int = 0,
    teacher_column: str | None = None,
    config: str | None = None,
) -> list[Example]:
    """Examples of a task, of data files, or of a data set that `datasets` loads (a hub id or a
    folder).

    A row has `prompt` (a string or chat messages), `prompt` and `completion`, or `messages` whose
    last ones are the assistant's; `tools`, `answer`, `level` and `id` are kept when present.
    `teacher_column` holds the teacher's own prompts. Raises DataError.
    """
    if isinstance(source, str) and not is_table(source):
        return load_task(source, split=split, num_examples=num_examples, seed=seed)[1]
    for name in sources(source):
        if not is_table(name):
            raise DataError(
                f"{source!r} has the task {name!r} among its tables; give files and data sets, "
                "or a task alone"
            )
    columns = [prompt_column, *COLUMNS, *([] if teacher_column is None else [teacher_column])]
    rows = read_rows(source, columns, num_rows=num_examples, split=split, config=config)
    if not rows:
        raise DataError(f"{source!r} has no rows; give a data source with at least one prompt")
    if num_examples is not None and num_examples > len(rows):
        raise DataError(
            f"{num_examples} examples are asked of {source!r}, which has {len(rows)}; ask for at "
            "most that many"
        )
    return make_examples(rows, prompt_column, teacher_column)


def make_examples(
    rows: Iterable[Row | Example], prompt_column: str = "prompt", teacher_column: str | None = None
) -> list[Example]:
    """Each row as an example with an id of its own. Raises DataError."""
    return with_own_ids(
        [
            row
            if isinstance(row, Example)
            else example_from_row(row, i, prompt_column, teacher_column)
            for i, row in enumerate(rows)
        ]
    )


def rows_of_objects(prompts: Sequence[Any], prompt_column: str) -> list[Row | Example]:
    """Rows of a list from Python: strings and lists of messages are prompts, dicts rows, Examples
    stay as they are.

    Raises DataError.
    """
    if isinstance(prompts, str):
        raise DataError(
            f"prompts is the string {prompts[:40]!r}; give a list of strings, rows or Examples"
        )
    if not isinstance(prompts, Iterable):
        raise DataError(f"prompts is {prompts!r}; give a list of strings, rows or Examples")
    rows: list[Row | Example] = []
    for i, given in enumerate(prompts):
        values = {prompt_column: given} if isinstance(given, str | list) else given
        if not isinstance(values, dict | Example):
            raise DataError(
                f"prompts[{i}] is {given!r}; give a string, a list of messages, a row or an Example"
            )
        is_row = isinstance(values, dict)
        rows.append(make_row(f"prompts[{i}]", values, list(values)) if is_row else values)
    return rows


def example_from_row(
    row: Row, place: int, prompt_column: str = "prompt", teacher_column: str | None = None
) -> Example:
    """A row as an example, whose id is its place where it has none; raises DataError that names the
    row."""
    where, values = row.where, row.values
    if "messages" in values and prompt_column not in values:
        messages = messages_of(values["messages"], where)
        num_given = len(messages)
        while num_given and messages[num_given - 1]["role"] == "assistant":
            num_given -= 1
        prompt, completion = messages[:num_given], messages[num_given:]
        if not completion:
            role = messages[-1]["role"]
            raise DataError(
                f"{where}: the last of `messages` is by {role!r}; it must be the assistant's turn"
            )
    elif prompt_column in values:
        prompt, completion = values[prompt_column], values.get("completion")
        prompt = messages_of(prompt, where) if isinstance(prompt, list) else prompt
        completion = messages_of(completion, where) if isinstance(completion, list) else completion
    elif prompt_column in row.names:
        raise DataError(
            f"{where}: {prompt_column!r} is empty; each row needs a prompt: remove the row or "
            "fill it"
        )
    else:
        raise DataError(
            f"{where} has no column {prompt_column!r} (nor `messages`), only "
            f"{', '.join(sorted(row.names))}; name the column with data.prompt_column"
        )
    if not prompt or not isinstance(prompt, str | tuple):
        raise DataError(
            f"{where}: {prompt_column!r} is {prompt!r}; it must be a non-empty string or list of "
            "messages"
        )
    answer = values.get("answer")
    return Example(
        id=str(values.get("id", place)),
        prompt=prompt,
        completion=_completion(completion, where),
        answer=None if answer is None else str(answer),
        level=str(values.get("level", "")),
        teacher_prompt=None
        if teacher_column is None
        else _teacher_prompt(values.get(teacher_column), where, teacher_column),
        tools=tools_of(values["tools"], where) if "tools" in values else None,
        where=where,
    )


def _completion(completion: Any, where: str) -> Any:
    """A completion as an example has it: segments, or messages of which the first and the last are
    the assistant's."""
    if completion is None or isinstance(completion, tuple):
        for message in (completion[0], completion[-1]) if completion else ():
            if message["role"] != "assistant":
                raise DataError(
                    f"{where}: `completion` begins or ends with a message by "
                    f"{message['role']!r}; its first and its last must be the assistant's, so "
                    "put what comes before them into the prompt"
                )
        return completion
    if not isinstance(completion, str):
        raise DataError(
            f"{where}: `completion` is {completion!r}; it must be a string or list of messages"
        )
    return ((completion, True),)


def _teacher_prompt(prompt: Any, where: str, column: str) -> Any:
    prompt = messages_of(prompt, where) if isinstance(prompt, list) else prompt
    if not prompt or not isinstance(prompt, str | tuple):
        raise DataError(
            f"{where}: {column!r} is {prompt!r}; teacher.prompt_column must name a column of "
            "non-empty strings or lists of messages"
        )
    return prompt


def messages_of(value: Any, where: str) -> tuple[Message, ...]:
    """A list of messages, without nulls and otherwise as it is. Raises DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: messages are {value!r}; give a non-empty list of {{role, content}}"
        )
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{where}: {message!r} is no message; each needs a `role` and `content` as strings"
            )
        content = message.get("content")
        if isinstance(content, str) or (
            content is None and any(message.get(key) for key in INSTEAD_OF_CONTENT)
        ):
            continue
        if not isinstance(content, list) or not all(_is_text_part(part) for part in content):
            raise DataError(
                f"{where}: `content` of a message by {message['role']!r} is {str(content)[:80]}; "
                "each needs `role` and `content` as a string or a list of text parts, or else "
                "tool_calls or reasoning_content"
            )
    return tuple(
        {key: item for key, item in message.items() if item is not None} for message in value
    )


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type", "text") == "text"
        and isinstance(part.get("text"), str)
    )


def tools_of(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The tools of a row: JSON schemas, or their JSON as a string. Raises DataError."""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{where}: `tools` is {str(value)[:80]!r}; give a list of JSON schemas, or its JSON "
            "as a string"
        )
    return tuple(tools)


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
        token_ids = (
            encoding.start_of(str(example.prompt)) if text is None else encoding.encode(text.prompt)
        )
        if not token_ids:
            raise DataError(f"{example.name} has no tokens: {example.prompt!r}")
        completion = (None, None)
        if end_ids is not None:
            completion = close_completion(example, text, encoding, chat_template, end_ids)
        prompts.append(Prompt(example, token_ids, *completion))
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
