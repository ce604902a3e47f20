"""Evaluation: n responses a problem, graded up to their first end token; Avg@n, Pass@k, entropy,
length, truncation."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from potstill.answers.grading import Grade, majority
from potstill.config import (
    EngineSpec,
    Evaluation,
    Recipe,
    RecipeError,
    run_evaluation,
    to_toml,
)
from potstill.console.printable import say
from potstill.engines.make import engine_for, engine_spec, refuse_missing_program
from potstill.engines.protocol import Engine
from potstill.evaluation.responses import ResponseRow, file_name, settings_of, write_responses
from potstill.files import write_atomically
from potstill.models.language_model import LanguageModel, fingerprint
from potstill.models.probe import ready
from potstill.prompts.examples import make_prompts, prompt_notes
from potstill.prompts.system import with_system
from potstill.runs.card import write_card
from potstill.runs.results_schema import Accuracy, Estimates, EvalRow, Measures, ProblemColumns
from potstill.runs.run_folder import begun_on, last_row, locked, read_json, store_evals
from potstill.statistics import Estimate, mean_over_problems, pass_at_k, ratio_over_problems
from potstill.tasks import TASKS, Task, is_table, make_task
from potstill.tasks.own import describe_files, own_files
from potstill.teachers.ends import end_set, named_end_ids
from potstill.teachers.rope import refuse_crossing
from potstill.types import DataError, Example, Prompt


def evaluate(
    model: LanguageModel | str | Path,
    evaluation: Evaluation,
    *,
    end_ids: Sequence[int] | None = None,
    responses: Path | None = None,
    quiet: bool = False,
    date: str | None = None,
    engine: Engine | EngineSpec | None = None,
) -> list[EvalRow]:
    """Evaluate a loaded model, a model folder, a hub id or a run folder; one row of results for
    each temperature.

    `EvalRow` says what is in a row. Two calls with one seed sample the same responses.

    With a folder for `responses` each response is written there as soon as it is graded, in one
    file for each model, set of settings and temperature; a call that was killed goes on after the
    last whole batch. What ends a response is `evaluation.end_tokens`, else `end_ids`, else what is
    stored with the model. `date` is what chat templates are told, by default today. An `engine`
    may write with the model's weights, or a server that an EngineSpec tells of. Raises RecipeError,
    ModelError or DataError before anything is sampled, and RunError for a file of responses that
    another process writes.
    """
    # Before the model is loaded, which can take long.
    refuse_missing_program(engine)
    problems = make_problems(evaluation)
    model = ready(model)
    task, examples, prompts = prepare_problems(model, evaluation, date, problems)
    if not quiet:
        template, told = evaluation.template, evaluation.template_arguments
        say(*describe_files(own_files(evaluation.source)), error=True)
        say(*prompt_notes(len(prompts), prompts, model.tokenizer, template, told), error=True)
    end_ids = named_end_ids(model.tokenizer, evaluation.end_tokens) or end_ids or end_set(model)
    model.eval()
    weights = "" if responses is None else fingerprint(model)
    rows: list[EvalRow] = []
    longest = max(len(prompt.token_ids) for prompt in prompts) + evaluation.max_tokens
    place = None if responses is None else responses / ".engine"
    with engine_for(engine, model.model, folder=place, max_tokens=longest) as writer:
        for temperature in evaluation.temperatures:
            started = time.perf_counter()
            file = None
            if responses is not None:
                asked = (temperature, end_ids, prompts, writer)
                file = responses / file_name(weights, evaluation, *asked)
                file.parent.mkdir(parents=True, exist_ok=True)
            with nullcontext() if file is None else locked(file, "responses file"):
                found = write_responses(
                    model,
                    evaluation,
                    temperature,
                    task=task,
                    examples=examples,
                    prompts=prompts,
                    end_ids=end_ids,
                    file=file,
                    quiet=quiet,
                    engine=writer,
                )
            row: EvalRow = {
                "model": model.name,
                "temperature": temperature,
                **_measures(found, evaluation.num_responses, {each.level for each in examples}),
                "seconds": round(time.perf_counter() - started, 2),
                "settings": settings_of(evaluation) | {"end_ids": list(end_ids)},
            }
            rows.append(row)
    return rows


def _measures(found: Sequence[ResponseRow], num_responses: int, levels: set[str]) -> Measures:
    """Everything that is measured of responses at one temperature: over all problems, by level, and
    for each problem."""
    problems = by_problem(found, num_responses)
    by_level = {
        level: accuracy([rows for rows in problems if rows[0]["level"] == level], num_responses)
        for level in sorted(levels)
    }
    return {
        **summarize_responses(found, num_responses),
        "levels": by_level,
        "problems": per_problem(problems),
        "notes": dict(Counter(r["note"] for r in found if r["note"])),
        "num_tokens": sum(r["length"] for r in found),
    }


def by_problem(rows: Sequence[ResponseRow], num_responses: int) -> list[Sequence[ResponseRow]]:
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


def per_problem(problems: Sequence[Sequence[ResponseRow]]) -> ProblemColumns:
    """One column a quantity, one number a problem: what differences between models are computed
    from.

    Means over the responses, entropies in nats a token, and how many responses are right.
    """

    def mean(rows: Sequence[ResponseRow], name: str, over: str | None = None) -> float:
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
    model: LanguageModel,
    evaluation: Evaluation,
    date: str | None = None,
    problems: tuple[Task, list[Example]] | None = None,
) -> tuple[Task, list[Example], list[Prompt]]:
    """The problems of an evaluation as prompts for a model, checked to fit its context; errors as
    make_problems, which makes them where they are not given.

    Raises ModelError for an end token that the model does not have.
    """
    task, examples = problems or make_problems(evaluation)
    named_end_ids(model.tokenizer, evaluation.end_tokens)
    prompts = make_prompts(
        with_system(examples, evaluation.system, evaluation.template),
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


def accuracy(problems: Sequence[Sequence[ResponseRow]], num_responses: int) -> Accuracy:
    """Avg@n and Pass@k for every k up to n, with intervals over problems."""
    scores = [sum(row["score"] for row in rows) / num_responses for rows in problems]
    num_correct = [sum(row["score"] >= 1 for row in rows) for rows in problems]
    pass_at = {
        str(k): mean_over_problems([pass_at_k(num_responses, c, k) for c in num_correct])
        for k in range(1, num_responses + 1)
    }
    return {"avg": mean_over_problems(scores), "pass": pass_at}


def summarize_responses(rows: Sequence[ResponseRow], num_responses: int) -> Estimates:
    """All metrics of one model at one temperature from its responses."""
    problems = by_problem(rows, num_responses)

    def per_response(value: Callable[[ResponseRow], float]) -> Estimate:
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


def evaluate_run(
    recipe: Recipe,
    model: LanguageModel,
    step: int,
    quiet: bool = False,
    engine: Engine | EngineSpec | None = None,
) -> None:
    """Evaluate the model of a run after so many steps, if its recipe says how; the results are
    stored in its folder. Errors as `evaluate`."""
    folder = recipe.out
    if recipe.evaluation.source is None:
        return
    rows = evaluate(
        model.around(model.model, str(folder)),
        run_evaluation(recipe),
        end_ids=read_json(folder / "environment.json", ("end_ids",))["end_ids"],
        responses=folder / "responses",
        quiet=quiet,
        date=begun_on(folder),
        engine=engine,
    )
    store_evals(folder, step, rows)


def evaluate_anew(recipe: Recipe, model: LanguageModel, quiet: bool = False) -> None:
    """Evaluate the model of a finished run as the recipe says, which then is the run's own.

    The rows are there before the recipe, so that a kill leaves a run that is evaluated as its
    recipe says.
    """
    folder = recipe.out
    step = last_row(folder)["step"]
    with locked(folder, "run folder"):
        evaluate_run(recipe, model, step, quiet, engine_spec(recipe))
        write_atomically(folder / "recipe.toml", to_toml(recipe.resolved()))
        write_card(folder)
