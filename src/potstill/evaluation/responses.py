"""Responses of an evaluation: sampled, graded, and kept in a file that can be gone on with."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.answers.grading import Grade
from potstill.config import Evaluation, Sampling
from potstill.console.progress import token_bar
from potstill.engines.entropies import with_entropies
from potstill.engines.protocol import Engine
from potstill.files import append, flush, json_digest, write_rows
from potstill.models.language_model import LanguageModel
from potstill.rollouts.text import is_loop, num_tokens_to_answer, zlib_ratio
from potstill.runs.run_folder import read_rows
from potstill.seeds import Stream, stream_key
from potstill.tasks import Task
from potstill.tasks.own import own_files
from potstill.teachers.vocabulary import num_named_rows
from potstill.types import Completion, DataError, Example, Prompt

ResponseRow = dict[str, Any]
# Columns of each response, beside those that say which one it is; the second are numbers.
TEXT_COLUMNS = ("level", "text", "stop", "answer", "note", "is_loop")
NUMBER_COLUMNS = (
    "score",
    "length",
    "length_to_answer",
    "entropy",
    "entropy_before_answer",
    "zlib_ratio",
)


def write_responses(
    model: LanguageModel,
    evaluation: Evaluation,
    temperature: float,
    *,
    task: Task,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    end_ids: Sequence[int],
    engine: Engine,
    file: Path | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Sample and grade all responses at one temperature, batch by batch; those of a file are not
    sampled again. The engine writes with the model's weights."""
    places = [(i, j) for i in range(len(prompts)) for j in range(evaluation.num_responses)]
    size = evaluation.batch_size
    sampling = Sampling(
        temperature=temperature, top_p=evaluation.top_p, top_k=evaluation.top_k, batch_size=size
    )
    rows = [] if file is None else read_responses(file, examples, evaluation)
    with token_bar(f"{model.name} at T={temperature:g}", len(places), len(rows), quiet) as advance:
        for start in range(len(rows), len(places), size):
            batch = places[start : start + size]
            asked = [prompts[i].token_ids for i, _ in batch]
            drawn_from: dict[str, Any] = {
                "sampling": sampling,
                "vocab_size": num_named_rows(model),
            }
            completions = engine.write(
                asked,
                [stream_key((evaluation.seed, *place), Stream.EVALUATION) for place in batch],
                max_tokens=evaluation.max_tokens,
                end_ids=end_ids,
                **drawn_from,
            )
            completions = with_entropies(model, asked, completions, **drawn_from)
            texts = model.tokenizer.batch_decode(
                [list(c.token_ids) for c in completions], skip_special_tokens=True
            )
            grades = task.grade([examples[i] for i, _ in batch], texts)
            for (i, j), completion, text, grade in zip(
                batch, completions, texts, grades, strict=True
            ):
                num = num_tokens_to_answer(
                    completion.token_ids, text, model.tokenizer, task.answer_end
                )
                row = _row_of(examples[i], j, completion, text, grade, num)
                rows.append(row)
                if file is not None:
                    append(file, row)
            advance(len(batch))
    if file is not None:
        flush(file)
    return rows


def _row_of(
    example: Example,
    response: int,
    completion: Completion,
    text: str,
    grade: Grade,
    num_before: int,
) -> ResponseRow:
    """One response as it is stored; `num_before` is how many tokens lead to its answer."""
    return {
        "problem": example.id,
        "level": example.level,
        "response": response,
        "text": text,
        "stop": completion.stop,
        "score": grade.score,
        "answer": grade.answer,
        "note": grade.note,
        "length": len(completion.token_ids),
        "length_to_answer": num_before,
        "entropy": sum(completion.entropies),
        "entropy_before_answer": sum(completion.entropies[:num_before]),
        "zlib_ratio": zlib_ratio(text),
        "is_loop": is_loop(text),
    }


def read_responses(
    file: Path, examples: Sequence[Example], evaluation: Evaluation
) -> list[ResponseRow]:
    """The responses that a file has of an evaluation, in whole batches; what comes after them is
    cut off the file.

    Raises DataError for a row that is not the response whose place it stands in.
    """
    rows, num = read_rows(file, (*TEXT_COLUMNS, *NUMBER_COLUMNS)), evaluation.num_responses
    for k, row in enumerate(rows):
        problem, response = divmod(k, num)
        if problem >= len(examples) or (row.get("problem"), row.get("response")) != (
            examples[problem].id,
            response,
        ):
            raise DataError(
                f"responses file {str(file)!r}, line {k + 1} is response {row.get('response')!r} "
                f"to problem {row.get('problem')!r}, which does not stand there in this "
                "evaluation; remove the file to sample anew"
            )
        if (
            not all(isinstance(row[name], int | float) for name in NUMBER_COLUMNS)
            or not 0 <= row["score"] <= 1
        ):
            raise DataError(
                f"responses file {str(file)!r}, line {k + 1} is not as it was graded: "
                f"{ {name: row[name] for name in NUMBER_COLUMNS} }; remove the file to sample anew"
            )
    # Batches are always the same rows, so that a resumed evaluation rounds as an uninterrupted one.
    if len(rows) < len(examples) * num:
        rows = rows[: len(rows) // evaluation.batch_size * evaluation.batch_size]
    if file.exists():
        write_rows(file, rows)
    return rows


def file_name(
    weights: str,
    evaluation: Evaluation,
    temperature: float,
    end_ids: Sequence[int],
    prompts: Sequence[Prompt],
    engine: Engine,
) -> str:
    """One file for each set of weights (their `fingerprint`), settings, temperature and streams:
    what would be sampled otherwise is never mixed."""
    settings = settings_of(evaluation)
    # A template may write another date than yesterday's.
    asked = [prompt.token_ids for prompt in prompts]
    sampled = [weights, settings, temperature, list(end_ids), asked, Stream.EVALUATION]
    if not engine.is_native:
        sampled.append(type(engine).__name__)
    identity = json_digest(sampled)
    source = re.sub(r"[^\w.-]+", "-", str(evaluation.source))[:60]
    return f"{source}-T{temperature:g}-{identity}.jsonl"


def settings_of(evaluation: Evaluation) -> dict[str, Any]:
    """The settings of an evaluation at one temperature; of a task of the user's own also which code
    it was."""
    # An empty system prompt is none.
    unset = {"temperatures"} if evaluation.system else {"temperatures", "system"}
    settings = evaluation.model_dump(mode="json", exclude=unset)
    files = own_files(evaluation.source)
    return settings | ({"source_sha256": next(iter(files.values()))} if files else {})
