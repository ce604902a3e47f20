"""Rows as examples: what their columns hold, checked row by row."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from potstill.tasks.filling import columns_of, filled
from potstill.tasks.tables import DataRow, make_row, with_own_ids
from potstill.types import DataError, Example, Message

# Columns beside the prompt's.
COLUMNS = ("messages", "completion", "tools", "answer", "id")
LEVEL = "level"
# Keys that an assistant's message may have instead of content.
INSTEAD_OF_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Where rows have what the student and the teacher are asked: a column, or a template that is
    filled in from columns.

    Without a column and a template of its own the teacher is asked what the student is. Of a row's
    `messages` the assistant's last turn is the completion, or all that follows its first one.
    """

    column: str = "prompt"
    template: str | None = None
    teacher_column: str | None = None
    teacher_template: str | None = None
    train_on: Literal["last", "all"] = "last"
    level_column: str = LEVEL

    def columns(self) -> list[str]:
        """All columns that are read, each once."""
        names = [self.column, self.level_column, *COLUMNS]
        if self.teacher_column is not None:
            names.append(self.teacher_column)
        for template in (self.template, self.teacher_template):
            names += [] if template is None else columns_of(template)
        return list(dict.fromkeys(names))


def make_examples(rows: Iterable[DataRow | Example], asked: Asked) -> list[Example]:
    """Each row as an example with an id of its own. Raises DataError."""
    return with_own_ids(
        [
            row if isinstance(row, Example) else example_from_row(row, i, asked)
            for i, row in enumerate(rows)
        ]
    )


def rows_of_objects(prompts: Sequence[Any], prompt_column: str) -> list[DataRow | Example]:
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
    rows: list[DataRow | Example] = []
    for i, given in enumerate(prompts):
        values = {prompt_column: given} if isinstance(given, str | list) else given
        if not isinstance(values, dict | Example):
            raise DataError(
                f"prompts[{i}] is {given!r}; give a string, a list of messages, a row or an Example"
            )
        is_row = isinstance(values, dict)
        if is_row and {"role", "content"} <= values.keys() and prompt_column not in values:
            raise DataError(
                f"prompts[{i}] is one message, {given!r}; a prompt is a list of messages: give "
                "[[message, ...], ...]"
            )
        rows.append(make_row(f"prompts[{i}]", values, list(values)) if is_row else values)
    return rows


def example_from_row(row: DataRow, place: int, asked: Asked) -> Example:
    """A row as an example, whose id is its place where it has none; raises DataError that names the
    row."""
    where, values = row.where, row.values
    prompt, completion = _prompt_and_completion(row, asked)
    answer = values.get("answer")
    return Example(
        id=str(values.get("id", place)),
        prompt=prompt,
        completion=_completion(completion, where),
        answer=None if answer is None else str(answer),
        level=_level(row, asked.level_column),
        teacher_prompt=_teacher_prompt(row, asked),
        tools=tools_of(values["tools"], where) if "tools" in values else None,
        where=where,
        source=row.source,
    )


def _level(row: DataRow, column: str) -> str:
    """The level of a row; none where it is empty, or where no column was asked for and none is
    there."""
    if column != LEVEL and column not in row.names:
        raise DataError(
            f"{row.where} has no column {column!r}, only {', '.join(sorted(row.names))}; name one "
            "of them with data.level_column"
        )
    return str(row.values.get(column, ""))


def _prompt_and_completion(row: DataRow, asked: Asked) -> tuple[Any, Any]:
    """The prompt, checked, and what the row has as completion."""
    where, values, column = row.where, row.values, asked.column
    completion = values.get("completion")
    completion = messages_of(completion, where) if isinstance(completion, list) else completion
    if asked.template is not None:
        return filled(asked.template, row, "data.prompt_template"), completion
    if "messages" in values and column not in values:
        return _parted(messages_of(values["messages"], where), where, asked.train_on)
    if column not in values and column in row.names:
        raise DataError(
            f"{where}: {column!r} is empty; each row needs a prompt: remove the row or fill it"
        )
    if column not in values:
        raise DataError(
            f"{where} has no column {column!r} (nor `messages`), only "
            f"{', '.join(sorted(row.names))}; name the column with data.prompt_column"
        )
    prompt = values[column]
    prompt = messages_of(prompt, where) if isinstance(prompt, list) else prompt
    if not prompt or not isinstance(prompt, str | tuple):
        raise DataError(
            f"{where}: {column!r} is {prompt!r}; it must be a non-empty string or list of messages"
        )
    return prompt, completion


def _parted(
    messages: tuple[Message, ...], where: str, train_on: Literal["last", "all"]
) -> tuple[tuple[Message, ...], tuple[Message, ...] | None]:
    """A chat as the prompt and the completion, which is of the assistant's messages at the end, or
    of all from its first one on. A chat that waits for an answer is a prompt alone."""
    roles = [message["role"] for message in messages]
    if roles[-1] in ("user", "tool") and train_on == "last":
        return messages, None
    if roles[-1] != "assistant":
        raise DataError(
            f"{where}: the last of `messages` is by {roles[-1]!r}; it must be the assistant's turn"
        )
    if train_on == "all":
        num_given = roles.index("assistant")
    else:
        num_given = len(roles)
        while num_given and roles[num_given - 1] == "assistant":
            num_given -= 1
    if num_given == 0:
        raise DataError(
            f"{where}: the first of `messages` is the assistant's; one before it must be the prompt"
        )
    return messages[:num_given], messages[num_given:]


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


def _teacher_prompt(row: DataRow, asked: Asked) -> Any:
    if asked.teacher_template is not None:
        return filled(asked.teacher_template, row, "teacher.prompt_template")
    if asked.teacher_column is None:
        return None
    where, column = row.where, asked.teacher_column
    prompt = row.values.get(column)
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
