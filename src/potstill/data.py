"""From a data source to prompts: tasks, JSONL and Parquet files, hub data sets; chat templates; validation.

Everything about the prompts is checked here, before any work is done.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.config import is_hub_id, is_table
from potstill.tasks import make_task
from potstill.types import Example, Prompt

# A task makes any number of problems; this many when the recipe does not say.
DEFAULT_TASK_PROMPTS = 4096


class DataError(ValueError):
    """Prompts that cannot be used; the message is one line and says what to do."""


def load_examples(
    source: str,
    *,
    split: str = "train",
    num_examples: int | None = None,
    prompt_column: str = "prompt",
    seed: int = 0,
    teacher_column: str | None = None,
) -> list[Example]:
    """Examples of a task, a .jsonl or .parquet file, or a data set that `datasets` loads (a hub id or a folder).

    A row has `prompt` (a string or chat messages), `prompt` and `completion`, or `messages` whose last one is the
    assistant's; `answer`, `level` and `id` are kept when present. `teacher_column` holds the teacher's own prompts.
    Raises DataError.
    """
    if not is_table(source):
        try:
            return make_task(source).examples(split, num_examples or DEFAULT_TASK_PROMPTS, seed)
        except ValueError as error:
            raise DataError(f"data source {source!r}: {error}") from None
    rows = read_table(source, split)
    if not rows:
        raise DataError(f"{source!r} has no rows; give a data source with at least one prompt")
    if num_examples is not None and num_examples > len(rows):
        raise DataError(
            f"{num_examples} examples are asked of {source!r}, which has {len(rows)}; ask for at most that many"
        )
    rows = rows[:num_examples]
    return [example_from_row(row, i, source, prompt_column, teacher_column) for i, row in enumerate(rows)]


def read_table(source: str, split: str, config: str | None = None) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file, or of a split of a hub data set. Raises DataError."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    if is_hub_id(source):
        if Path(source).is_file():
            raise DataError(f"data file {source!r} is of no known kind; give a .jsonl or .parquet file")
        try:
            return datasets.load_dataset(source, config, split=split).to_list()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"data set {source!r} (split {split!r}) cannot be read: {reason}; without the network give a local file"
            ) from None
    if not Path(source).is_file():
        raise DataError(f"data file {source!r} does not exist; give a .jsonl or .parquet file, a task or a hub id")
    if Path(source).stat().st_size == 0:
        return []
    kind = datasets.Dataset.from_parquet if source.endswith(".parquet") else datasets.Dataset.from_json
    try:
        return kind(source, keep_in_memory=True).to_list()
    except (OSError, ValueError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise DataError(f"data file {source!r} cannot be read: {' '.join(str(cause).split())[:200]}") from None


def example_from_row(
    row: dict[str, Any], i: int, source: str, prompt_column: str = "prompt", teacher_column: str | None = None
) -> Example:
    """Row `i` of a data source as an example; raises DataError that names the row."""
    where = f"row {i} of {source!r}"
    if "messages" in row and prompt_column not in row:
        *prompt, last = _messages(row["messages"], where)
        if last["role"] != "assistant":
            raise DataError(f"{where}: the last of `messages` is by {last['role']!r}; it must be the assistant's turn")
        prompt, completion = tuple(prompt), last["content"]
    elif prompt_column in row:
        prompt, completion = row[prompt_column], row.get("completion")
        if isinstance(prompt, list):
            prompt = _messages(prompt, where)
        if isinstance(completion, list):
            completion = _messages(completion, where)[-1]["content"]
    else:
        raise DataError(
            f"{where} has no column {prompt_column!r} (nor `messages`), only {', '.join(sorted(row))}; "
            "name the column with data.prompt_column"
        )
    if not prompt or not isinstance(prompt, str | tuple):
        raise DataError(f"{where}: {prompt_column!r} is {prompt!r}; it must be a non-empty string or list of messages")
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"{where}: `completion` is {completion!r}; it must be a string or list of messages")
    teacher_prompt = None
    if teacher_column is not None:
        teacher_prompt = row.get(teacher_column)
        teacher_prompt = _messages(teacher_prompt, where) if isinstance(teacher_prompt, list) else teacher_prompt
        if not teacher_prompt or not isinstance(teacher_prompt, str | tuple):
            raise DataError(
                f"{where}: {teacher_column!r} is {teacher_prompt!r}; teacher.prompt_column must name a column of "
                "non-empty strings or lists of messages"
            )
    answer = row.get("answer")
    return Example(
        id=str(row.get("id", i)),
        prompt=prompt,
        completion=None if completion is None else ((completion, True),),
        answer=None if answer is None else str(answer),
        level=str(row.get("level", "")),
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
