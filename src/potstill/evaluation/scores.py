"""Evaluation: n responses a problem, graded up to their first end token; Avg@n, Pass@k, entropy,
length, truncation."""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from potstill.answers.grading import Grade, majority
from potstill.config import (
    Evaluation,
    GrpoRecipe,
    Recipe,
    RecipeError,
    Sampling,
    run_evaluation,
    to_toml,
)
from potstill.console.printable import say
from potstill.console.progress import token_bar
from potstill.files import append, flush, write_atomically, write_rows
from potstill.models.language_model import LanguageModel, fingerprint
from potstill.models.probe import ready
from potstill.models.sampling import sample
from potstill.prompts.examples import make_prompts, prompt_notes
from potstill.rollouts.text import is_loop, num_tokens_to_answer, zlib_ratio
from potstill.runs.run_folder import begun_on, last_row, locked, read_json, read_rows, store_evals
from potstill.statistics import Estimate, mean_over_problems, pass_at_k, ratio_over_problems
from potstill.tasks import TASKS, Task, is_table, make_task
from potstill.tasks.own import describe_files, own_files
from potstill.teachers.ends import end_set, named_end_ids
from potstill.teachers.rope import refuse_crossing
from potstill.teachers.vocabulary import num_named_rows
from potstill.types import DataError, Example, Prompt

Row = dict[str, Any]
# Of each response, beside which one it is; the second are numbers.
TEXTS = ("level", "text", "stop", "answer", "note", "is_loop")
NUMBERS = ("score", "length", "length_to_answer", "entropy", "entropy_before_answer", "zlib_ratio")


def evaluate(
    model: LanguageModel | str | Path,
    evaluation: Evaluation,
    *,
    end_ids: Sequence[int] | None = None,
    responses: Path | None = None,
    quiet: bool = False,
    date: str | None = None,
) -> list[dict[str, Any]]:
    """Evaluate a loaded model, a model folder, a hub id or a run folder; one row of results for
    each temperature.

    A row holds `avg` (the mean score), `pass` (by k, unbiased, every k up to n), `majority` (the
    score of the most common answer), `answered` (the share of responses that give one), `entropy`
    and `entropy_before_answer` (nats a token, of the distribution sampled from), `length` and
    `length_to_answer` (tokens), `truncation`, `repetition` (the share of loops) and `zlib_ratio`,
    each as value, low and high of the 95 % bootstrap interval over problems; `avg` and `pass` for
    each difficulty level; `problems`, one number a problem; and what was noted in grading. Two
    calls with one seed sample the same responses.

    With a folder for `responses` each response is written there as soon as it is graded, in one
    file for each model, set of settings and temperature; a call that was killed goes on after the
    last whole batch. What ends a response is `evaluation.end_tokens`, else `end_ids`, else what is
    stored with the model. `date` is what chat templates are told, by default today. Raises
    RecipeError, ModelError or DataError before anything is sampled, and RunError for a file of
    responses that another process writes.
    """
    # Before the model is loaded, which can take long.
    make_problems(evaluation)
    model = ready(model)
    task, examples, prompts = prepare_problems(model, evaluation, date)
    if not quiet:
        template, told = evaluation.template, evaluation.template_arguments
        say(*describe_files(own_files(evaluation.source)), error=True)
        say(*prompt_notes(len(prompts), prompts, model.tokenizer, template, told), error=True)
    end_ids = named_end_ids(model.tokenizer, evaluation.end_tokens) or end_ids or end_set(model)
    model.eval()
    rows = []
    for temperature in evaluation.temperatures:
        started = time.perf_counter()
        file = None
        if responses is not None:
            file = responses / _file_name(model, evaluation, temperature, end_ids, prompts)
            file.parent.mkdir(parents=True, exist_ok=True)
        with nullcontext() if file is None else locked(file, "responses file"):
            found = write_responses(
                model, evaluation, temperature, task, examples, prompts, end_ids, file, quiet
            )
        problems = by_problem(found, evaluation.num_responses)
        row = {
            "model": model.name,
            "temperature": temperature,
            **summarize(found, evaluation.num_responses),
        }
        row["levels"] = {
            level: accuracy(
                [rows for rows in problems if rows[0]["level"] == level], evaluation.num_responses
            )
            for level in sorted({example.level for example in examples})
        }
        row["problems"] = per_problem(problems)
        row["notes"] = dict(Counter(r["note"] for r in found if r["note"]))
        row["num_tokens"] = sum(r["length"] for r in found)
        row["seconds"] = round(time.perf_counter() - started, 2)
        row["settings"] = _settings(evaluation) | {"end_ids": list(end_ids)}
        rows.append(row)
    return rows


def write_responses(
    model: LanguageModel,
    evaluation: Evaluation,
    temperature: float,
    task: Task,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    end_ids: Sequence[int],
    file: Path | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Sample and grade all responses at one temperature, batch by batch; those of a file are not
    sampled again."""
    places = [(i, j) for i in range(len(prompts)) for j in range(evaluation.num_responses)]
    size = evaluation.batch_size
    sampling = Sampling(
        temperature=temperature, top_p=evaluation.top_p, top_k=evaluation.top_k, batch_size=size
    )
    rows = [] if file is None else read_responses(file, examples, evaluation)
    with token_bar(f"{model.name} at T={temperature:g}", len(places), len(rows), quiet) as advance:
        for start in range(len(rows), len(places), size):
            batch = places[start : start + size]
            completions = sample(
                model.model,
                [prompts[i].token_ids for i, _ in batch],
                [(evaluation.seed, i, j) for i, j in batch],
                max_tokens=evaluation.max_tokens,
                end_ids=end_ids,
                sampling=sampling,
                vocab_size=num_named_rows(model),
            )
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
                row = {
                    "problem": examples[i].id,
                    "level": examples[i].level,
                    "response": j,
                    "text": text,
                    "stop": completion.stop,
                    "score": grade.score,
                    "answer": grade.answer,
                    "note": grade.note,
                    "length": len(completion.token_ids),
                    "length_to_answer": num,
                    "entropy": sum(completion.entropies),
                    "entropy_before_answer": sum(completion.entropies[:num]),
                    "zlib_ratio": zlib_ratio(text),
                    "is_loop": is_loop(text),
                }
                rows.append(row)
                if file is not None:
                    append(file, row)
            advance(len(batch))
    if file is not None:
        flush(file)
    return rows


def read_responses(file: Path, examples: Sequence[Example], evaluation: Evaluation) -> list[Row]:
    """The responses that a file has of an evaluation, in whole batches; what comes after them is
    cut off the file.

    Raises DataError for a row that is not the response whose place it stands in.
    """
    rows, num = read_rows(file, (*TEXTS, *NUMBERS)), evaluation.num_responses
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
            not all(isinstance(row[name], int | float) for name in NUMBERS)
            or not 0 <= row["score"] <= 1
        ):
            raise DataError(
                f"responses file {str(file)!r}, line {k + 1} is not as it was graded: "
                f"{ {name: row[name] for name in NUMBERS} }; remove the file to sample anew"
            )
    # Batches are always the same rows, so that a resumed evaluation rounds as an uninterrupted one.
    if len(rows) < len(examples) * num:
        rows = rows[: len(rows) // evaluation.batch_size * evaluation.batch_size]
    if file.exists():
        write_rows(file, rows)
    return rows


def _file_name(
    model: LanguageModel,
    evaluation: Evaluation,
    temperature: float,
    end_ids: Sequence[int],
    prompts: Sequence[Prompt],
) -> str:
    """One file for each set of weights, settings and temperature: what would be sampled otherwise
    is never mixed."""
    settings = _settings(evaluation)
    # A template may write another date than yesterday's.
    asked = [prompt.token_ids for prompt in prompts]
    identity = json.dumps(
        [fingerprint(model), settings, temperature, list(end_ids), asked], sort_keys=True
    )
    source = re.sub(r"[^\w.-]+", "-", str(evaluation.source))[:60]
    return f"{source}-T{temperature:g}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.jsonl"


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    """The settings of an evaluation at one temperature; of a task of the user's own also which code
    it was."""
    settings, files = (
        evaluation.model_dump(mode="json", exclude={"temperatures"}),
        own_files(evaluation.source),
    )
    return settings | ({"source_sha256": next(iter(files.values()))} if files else {})


def by_problem(rows: Sequence[Row], num_responses: int) -> list[Sequence[Row]]:
    """The responses to each problem, by their places: what a problem is called is for the reader
    alone."""
    return [rows[start : start + num_responses] for start in range(0, len(rows), num_responses)]


def _distinct(names: Sequence[Any]) -> list[str]:
    """The names as texts; those that stand more than once with their places."""
    count = Counter(map(str, names))
    return [
        f"{name} (problem {i})" if count[str(name)] > 1 else str(name)
        for i, name in enumerate(names, 1)
    ]


def per_problem(problems: Sequence[Sequence[dict[str, Any]]]) -> dict[str, list[Any]]:
    """One column a quantity, one number a problem: what differences between models are computed
    from.

    Means over the responses, entropies in nats a token, and how many responses are right.
    """

    def mean(rows: Sequence[dict[str, Any]], name: str, over: str | None = None) -> float:
        return round(
            sum(r[name] for r in rows)
            / (len(rows) if over is None else sum(r[over] for r in rows)),
            6,
        )

    return {
        "id": _distinct([rows[0]["problem"] for rows in problems]),
        "score": [mean(rows, "score") for rows in problems],
        "num_correct": [sum(r["score"] >= 1 for r in rows) for rows in problems],
        "length": [mean(rows, "length") for rows in problems],
        "length_to_answer": [mean(rows, "length_to_answer") for rows in problems],
        "truncation": [
            round(sum(r["stop"] == "length" for r in rows) / len(rows), 6) for rows in problems
        ],
        "entropy": [mean(rows, "entropy", "length") for rows in problems],
        "entropy_before_answer": [
            mean(rows, "entropy_before_answer", "length_to_answer") for rows in problems
        ],
    }


def make_problems(evaluation: Evaluation) -> tuple[Task, list[Example]]:
    """The task of an evaluation and its problems. Raises RecipeError or DataError when there is no
    such task."""
    if not isinstance(evaluation, Evaluation):
        raise RecipeError(f"the evaluation is {evaluation!r}; give an Evaluation")
    if evaluation.source is None or is_table(evaluation.source):
        raise RecipeError(
            f"evaluation.source is {evaluation.source!r}; only the responses of a task can be "
            f"scored: choose one of {', '.join(TASKS)} (reasoning-gym:NAME, gsm8k:FILE), or "
            "my_task.py:MyTask of your own"
        )
    try:
        task = make_task(evaluation.source)
        examples = task.examples(evaluation.split, evaluation.num_problems, evaluation.seed)
        # On trial: a task that cannot grade would otherwise say so after a whole training.
        task.grade(examples[:1], [""])
        return task, examples
    except ValueError as error:
        raise DataError(f"evaluation source {evaluation.source!r}: {error}") from None


def prepare_problems(
    model: LanguageModel, evaluation: Evaluation, date: str | None = None
) -> tuple[Task, list[Example], list[Prompt]]:
    """The problems of an evaluation as prompts for a model, checked to fit its context; errors as
    make_problems.

    Raises ModelError for an end token that the model does not have.
    """
    task, examples = make_problems(evaluation)
    named_end_ids(model.tokenizer, evaluation.end_tokens)
    prompts = make_prompts(
        examples,
        model.tokenizer,
        template=evaluation.template,
        max_completion=evaluation.max_tokens,
        context_length=model.context_length,
        template_arguments=evaluation.template_arguments,
        date=date,
    )
    refuse_crossing(
        model, [p.token_ids for p in prompts], evaluation.max_tokens, "evaluation.max_tokens"
    )
    return task, examples, prompts


def accuracy(problems: Sequence[Sequence[dict[str, Any]]], num_responses: int) -> dict[str, Any]:
    """Avg@n and Pass@k for every k up to n, with intervals over problems."""
    scores = [sum(row["score"] for row in rows) / num_responses for rows in problems]
    num_correct = [sum(row["score"] >= 1 for row in rows) for rows in problems]
    pass_at = {
        str(k): mean_over_problems([pass_at_k(num_responses, c, k) for c in num_correct])
        for k in range(1, num_responses + 1)
    }
    return {"avg": mean_over_problems(scores), "pass": pass_at}


def summarize(rows: Sequence[dict[str, Any]], num_responses: int) -> dict[str, Any]:
    """All metrics of one model at one temperature from its responses."""
    problems = by_problem(rows, num_responses)

    def per_response(value: Callable[[dict[str, Any]], float]) -> Estimate:
        return mean_over_problems([sum(map(value, each)) / num_responses for each in problems])

    def per_token(name: str, tokens: str) -> Estimate:
        sums = [[sum(row[key] for row in each) for each in problems] for key in (name, tokens)]
        return ratio_over_problems(*sums)

    votes = [majority([Grade(row["score"], row["answer"]) for row in each]) for each in problems]
    return {
        "num_problems": len(problems),
        "num_responses": num_responses,
        **accuracy(problems, num_responses),
        "majority": mean_over_problems(votes),
        "answered": per_response(lambda row: row["answer"] is not None),
        "entropy": per_token("entropy", "length"),
        "entropy_before_answer": per_token("entropy_before_answer", "length_to_answer"),
        "length": per_response(lambda row: row["length"]),
        "length_to_answer": per_response(lambda row: row["length_to_answer"]),
        "truncation": per_response(lambda row: row["stop"] == "length"),
        "repetition": per_response(lambda row: row["is_loop"]),
        "zlib_ratio": per_response(lambda row: row["zlib_ratio"]),
    }


def evaluate_anew(recipe: Recipe | GrpoRecipe, model: LanguageModel, quiet: bool = False) -> None:
    """Evaluate the model of a finished run as the recipe says, which then is the run's own.

    The rows are there before the recipe, so that a kill leaves a run that is evaluated as its
    recipe says.
    """
    folder = recipe.out
    step = last_row(folder)["step"]
    end_ids = read_json(folder / "environment.json", ("end_ids",))["end_ids"]
    with locked(folder, "run folder"):
        if recipe.evaluation.source is not None:
            named = LanguageModel(model.model, model.tokenizer, str(folder))
            options: dict[str, Any] = {
                "end_ids": end_ids,
                "responses": folder / "responses",
                "quiet": quiet,
            }
            options |= {"date": begun_on(folder)}
            store_evals(folder, step, evaluate(named, run_evaluation(recipe), **options))
        write_atomically(folder / "recipe.toml", to_toml(recipe.resolved()))
