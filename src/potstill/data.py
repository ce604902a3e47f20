"""From a data source to prompts: rows or a task's problems as examples; chat templates; validation.

Everything about the prompts is checked here, before any work is done.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from potstill.config import is_table
from potstill.tables import DataError, Row, make_row, read_rows, with_own_ids
from potstill.tasks import make_task
from potstill.types import Example, Prompt

# A task makes any number of problems; this many when the recipe does not say.
DEFAULT_TASK_PROMPTS = 4096
# Columns beside the prompt's.
COLUMNS = ("messages", "completion", "answer", "level", "id")


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
    """Examples of a task, of data files, or of a data set that `datasets` loads (a hub id or a folder).

    A row has `prompt` (a string or chat messages), `prompt` and `completion`, or `messages` whose last one is the
    assistant's; `answer`, `level` and `id` are kept when present. `teacher_column` holds the teacher's own prompts.
    Raises DataError.
    """
    if isinstance(source, str) and not is_table(source):
        try:
            return make_task(source).examples(split, num_examples or DEFAULT_TASK_PROMPTS, seed)
        except ValueError as error:
            raise DataError(f"data source {source!r}: {error}") from None
    columns = [prompt_column, *COLUMNS, *([] if teacher_column is None else [teacher_column])]
    rows = read_rows(source, columns, num_rows=num_examples, split=split, config=config)
    if not rows:
        raise DataError(f"{source!r} has no rows; give a data source with at least one prompt")
    if num_examples is not None and num_examples > len(rows):
        raise DataError(
            f"{num_examples} examples are asked of {source!r}, which has {len(rows)}; ask for at most that many"
        )
    return make_examples(rows, prompt_column, teacher_column)


def make_examples(
    rows: Iterable[Row | Example], prompt_column: str = "prompt", teacher_column: str | None = None
) -> list[Example]:
    """Each row as an example with an id of its own. Raises DataError."""
    return with_own_ids(
        [
            row if isinstance(row, Example) else example_from_row(row, i, prompt_column, teacher_column)
            for i, row in enumerate(rows)
        ]
    )


def rows_of_objects(prompts: Sequence[Any], prompt_column: str) -> list[Row | Example]:
    """Rows of a list from Python: strings and lists of messages are prompts, dicts rows, Examples stay as they are.

    Raises DataError.
    """
    if isinstance(prompts, str):
        raise DataError(f"prompts is the string {prompts[:40]!r}; give a list of strings, rows or Examples")
    rows: list[Row | Example] = []
    for i, given in enumerate(prompts):
        values = {prompt_column: given} if isinstance(given, str | list) else given
        if not isinstance(values, dict | Example):
            raise DataError(f"prompts[{i}] is {given!r}; give a string, a list of messages, a row or an Example")
        is_row = isinstance(values, dict)
        rows.append(make_row(f"prompts[{i}]", values, list(values)) if is_row else values)
    return rows


def example_from_row(row: Row, place: int, prompt_column: str = "prompt", teacher_column: str | None = None) -> Example:
    """A row as an example, whose id is its place where it has none; raises DataError that names the row."""
    where, values = row.where, row.values
    if "messages" in values and prompt_column not in values:
        *prompt, last = _messages(values["messages"], where)
        if last["role"] != "assistant":
            raise DataError(f"{where}: the last of `messages` is by {last['role']!r}; it must be the assistant's turn")
        prompt, completion = tuple(prompt), last["content"]
    elif prompt_column in values:
        prompt, completion = values[prompt_column], values.get("completion")
        if isinstance(prompt, list):
            prompt = _messages(prompt, where)
        if isinstance(completion, list):
            completion = _messages(completion, where)[-1]["content"]
    elif prompt_column in row.names:
        raise DataError(f"{where}: {prompt_column!r} is empty; each row needs a prompt: remove the row or fill it")
    else:
        raise DataError(
            f"{where} has no column {prompt_column!r} (nor `messages`), only {', '.join(sorted(row.names))}; "
            "name the column with data.prompt_column"
        )
    if not prompt or not isinstance(prompt, str | tuple):
        raise DataError(f"{where}: {prompt_column!r} is {prompt!r}; it must be a non-empty string or list of messages")
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"{where}: `completion` is {completion!r}; it must be a string or list of messages")
    teacher_prompt = None
    if teacher_column is not None:
        teacher_prompt = values.get(teacher_column)
        teacher_prompt = _messages(teacher_prompt, where) if isinstance(teacher_prompt, list) else teacher_prompt
        if not teacher_prompt or not isinstance(teacher_prompt, str | tuple):
            raise DataError(
                f"{where}: {teacher_column!r} is {teacher_prompt!r}; teacher.prompt_column must name a column of "
                "non-empty strings or lists of messages"
            )
    answer = values.get("answer")
    return Example(
        id=str(values.get("id", place)),
        prompt=prompt,
        completion=None if completion is None else ((completion, True),),
        answer=None if answer is None else str(answer),
        level=str(values.get("level", "")),
        teacher_prompt=teacher_prompt,
    )


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages are {value!r}; give a non-empty list of {{role, content}}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{where}: {message!r} is no message; each needs `role` and `content` strings")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def make_prompts(
    examples: list[Example],
    tokenizer,
    *,
    template: str | None,
    max_completion: int,
    context_length: int | None,
    end_id: int | None = None,
) -> list[Prompt]:
    """Tokenise examples and check that each prompt leaves room for `max_completion` tokens. Raises DataError.

    `template` is "chat", "raw" or None (chat for messages, raw for strings). With an `end_id` every example must have a
    completion, and the id is put after it.
    """
    if not examples:
        raise DataError("the prompt list is empty; give at least one prompt")
    prompts = []
    for example in examples:
        token_ids = _prompt_ids(example, tokenizer, template)
        if not token_ids:
            raise DataError(f"prompt {example.id!r} has no tokens: {example.prompt!r}")
        if context_length is not None and len(token_ids) + max_completion > context_length:
            raise DataError(
                f"prompt {example.id!r} has {len(token_ids)} tokens, which with {max_completion} for the completion is "
                f"more than the context of {context_length}; shorten the prompt or lower the completion cap"
            )
        if end_id is None:
            prompts.append(Prompt(example, token_ids))
            continue
        if example.completion is None:
            raise DataError(
                f'prompt {example.id!r} has no completion, which objective.prefix = "dataset" needs; add the column'
            )
        completion_ids: list[int] = []
        trained: list[bool] = []
        for text, is_trained in example.completion:
            ids = tokenizer.encode(text, add_special_tokens=False)
            completion_ids += ids
            trained += [is_trained] * len(ids)
        prompts.append(Prompt(example, token_ids, (*completion_ids, end_id), (*trained, True)))
    return prompts


def with_teacher_prompts(
    prompts: list[Prompt], tokenizer, *, template: str | None, max_completion: int, context_length: int | None
) -> list[Prompt]:
    """The prompts with what the teacher reads, rendered by its own tokenizer; arguments and errors as make_prompts."""
    examples = [replace(p.example, prompt=p.example.teacher_prompt or p.example.prompt) for p in prompts]
    asked = make_prompts(
        examples, tokenizer, template=template, max_completion=max_completion, context_length=context_length
    )
    return [replace(prompt, teacher_ids=own.token_ids) for prompt, own in zip(prompts, asked, strict=True)]


def template_warning(prompts: list[Prompt], tokenizer, template: str | None) -> str | None:
    """A line for the user when string prompts are taken as they are by a model that has a chat template."""
    if template is None and tokenizer.chat_template and any(isinstance(p.example.prompt, str) for p in prompts):
        return 'warning: the prompts are taken as they are; template = "chat" would render them with the chat template'
    return None


def _prompt_ids(example: Example, tokenizer, template: str | None) -> tuple[int, ...]:
    is_chat = not isinstance(example.prompt, str)
    if template == "raw" and is_chat:
        raise DataError(f'prompt {example.id!r} is a list of messages, and data.template is "raw"; use "chat"')
    if not is_chat and template != "chat":
        return tuple(tokenizer.encode(example.prompt))
    if not tokenizer.chat_template:
        raise DataError(
            f'prompt {example.id!r} needs a chat template and the tokenizer has none; set data.template = "raw"'
        )
    messages = list(example.prompt) if is_chat else [{"role": "user", "content": example.prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer.encode(text, add_special_tokens=False))
