"""Evaluation: n responses a problem, graded up to their first end token; Avg@n, Pass@k, entropy, length, truncation."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.config import Evaluation, RecipeError, Sampling, is_table
from potstill.data import DataError, make_prompts, template_warning
from potstill.metrics import num_tokens_to_answer, zlib_ratio
from potstill.models import LanguageModel, end_set, load_model
from potstill.progress import token_bar
from potstill.report import Entry, print_table
from potstill.runlog import append, read_rows, write_atomically
from potstill.sampling import sample
from potstill.statistics import Estimate, mean_over_problems, pass_at_k, ratio_over_problems
from potstill.tasks import Task, make_task
from potstill.types import Example, Prompt


def evaluate(
    model: LanguageModel | str | Path,
    evaluation: Evaluation,
    *,
    end_ids: Sequence[int] | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate a loaded model, a model folder, a hub id or a run folder; one row of results for each temperature.

    A row holds `avg` (the mean score), `pass` (by k, unbiased), `entropy` and `entropy_before_answer` (nats a token, of
    the distribution sampled from), `length` (tokens), `truncation` and `zlib_ratio`, each as value, low and high of the
    95 % bootstrap interval over problems, and `avg` and `pass` for each difficulty level. Two calls with one seed
    sample the same responses.
    """
    # Before the model is loaded, which can take long.
    make_problems(evaluation)
    if not isinstance(model, LanguageModel):
        model = load_model(str(find_model(model)))
    task, examples, prompts = prepare_problems(model, evaluation)
    if (warning := template_warning(prompts, model.tokenizer, evaluation.template)) and not quiet:
        print(warning, file=sys.stderr)
    end_ids = end_ids or end_set(model, None)
    model.eval()
    rows = []
    for temperature in evaluation.temperatures:
        started = time.perf_counter()
        repeated = [(i, j) for i in range(len(prompts)) for j in range(evaluation.num_responses)]
        with token_bar(f"{model.name} at T={temperature:g}", len(repeated), evaluation, quiet) as on_tokens:
            completions = sample(
                model.model,
                [prompts[i].token_ids for i, _ in repeated],
                [(evaluation.seed, i, j) for i, j in repeated],
                max_tokens=evaluation.max_tokens,
                end_ids=end_ids,
                sampling=Sampling(temperature=temperature, batch_size=evaluation.batch_size),
                on_tokens=on_tokens,
            )
        texts = model.tokenizer.batch_decode([list(c.token_ids) for c in completions], skip_special_tokens=True)
        per_problem: list[dict[str, Any]] = [defaultdict(float) for _ in prompts]
        for (i, _), completion, text in zip(repeated, completions, texts, strict=True):
            before = num_tokens_to_answer(completion.token_ids, text, model.tokenizer, task.answer_end)
            problem = per_problem[i]
            score = task.score(examples[i], text)
            problem["score"] += score
            problem["correct"] += score >= 1
            problem["entropy"] += sum(completion.entropies)
            problem["entropy_before_answer"] += sum(completion.entropies[:before])
            problem["tokens"] += len(completion.token_ids)
            problem["tokens_before_answer"] += before
            problem["truncation"] += completion.stop == "length"
            problem["zlib_ratio"] += zlib_ratio(text)
        levels = sorted({example.level for example in examples})
        row = {"model": model.name, "temperature": temperature, **summarize(per_problem, evaluation.num_responses)}
        row["levels"] = {
            level: accuracy(
                [p for p, e in zip(per_problem, examples, strict=True) if e.level == level], evaluation.num_responses
            )
            for level in levels
        }
        row["num_tokens"] = int(sum(problem["tokens"] for problem in per_problem))
        row["seconds"] = round(time.perf_counter() - started, 2)
        row["settings"] = evaluation.model_dump(mode="json", exclude={"temperatures"})
        rows.append(row)
    return rows


def make_problems(evaluation: Evaluation) -> tuple[Task, list[Example]]:
    """The task of an evaluation and its problems. Raises RecipeError or DataError when there is no such task."""
    if evaluation.source is None or is_table(evaluation.source):
        raise RecipeError(
            f"evaluation.source is {evaluation.source!r}; only the responses of a task can be scored: choose "
            "multiplication or reasoning-gym:NAME"
        )
    try:
        task = make_task(evaluation.source)
        return task, task.examples(evaluation.split, evaluation.num_problems, evaluation.seed)
    except ValueError as error:
        raise DataError(f"evaluation source {evaluation.source!r}: {error}") from None


def prepare_problems(model: LanguageModel, evaluation: Evaluation) -> tuple[Task, list[Example], list[Prompt]]:
    """The problems of an evaluation as prompts for a model, checked to fit its context; errors as make_problems."""
    task, examples = make_problems(evaluation)
    prompts = make_prompts(
        examples,
        model.tokenizer,
        template=evaluation.template,
        max_completion=evaluation.max_tokens,
        context_length=model.context_length,
    )
    return task, examples, prompts


def accuracy(per_problem: Sequence[dict[str, Any]], num_responses: int) -> dict[str, Any]:
    """Avg@n and Pass@k at powers of two, with intervals over problems."""
    scores = [problem["score"] / num_responses for problem in per_problem]
    ks = [2**i for i in range(num_responses.bit_length()) if 2**i <= num_responses]
    pass_at = {
        k: mean_over_problems([pass_at_k(num_responses, int(problem["correct"]), k) for problem in per_problem])
        for k in ks
    }
    return {"avg": mean_over_problems(scores), "pass": {str(k): value for k, value in pass_at.items()}}


def summarize(per_problem: Sequence[dict[str, Any]], num_responses: int) -> dict[str, Any]:
    """All metrics of one model at one temperature from sums over each problem's responses."""

    def per_response(name: str) -> Estimate:
        return mean_over_problems([problem[name] / num_responses for problem in per_problem])

    def per_token(name: str, tokens: str) -> Estimate:
        return ratio_over_problems([p[name] for p in per_problem], [p[tokens] for p in per_problem])

    return {
        "num_problems": len(per_problem),
        "num_responses": num_responses,
        **accuracy(per_problem, num_responses),
        "entropy": per_token("entropy", "tokens"),
        "entropy_before_answer": per_token("entropy_before_answer", "tokens_before_answer"),
        "length": per_response("tokens"),
        "truncation": per_response("truncation"),
        "zlib_ratio": per_response("zlib_ratio"),
    }


def find_model(target: str | Path) -> str | Path:
    """The model of a run folder, or the target itself when it is no run. Raises RecipeError for an unfinished run."""
    folder = Path(target)
    if not (folder / "recipe.toml").exists():
        return target
    if not (folder / "DONE").exists():
        raise RecipeError(
            f"run {str(folder)!r} is not finished; run `potstill train {folder / 'recipe.toml'}` to finish it"
        )
    return folder / "model"


def evaluate_and_store(models: Sequence[str], evaluation: Evaluation, out: Path | None = None) -> None:
    """Evaluate several models, print the comparison, and store each run's results in its folder."""
    found = [(Path(model), find_model(model)) for model in models]
    entries = []
    for target, model in found:
        rows = evaluate(model, evaluation)
        if target != Path(model):
            num_steps = read_rows(target / "metrics.jsonl")[-1]["step"]
            for row in rows:
                append(target / "evals.jsonl", {"step": num_steps, **row})
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out, json.dumps(rows, indent=1) + "\n")
        entries.append(Entry(str(target).removeprefix("potstill:"), target, rows))
    print_table(entries)


def show_responses(
    model_name: str,
    given: Sequence[str],
    source: str,
    template: str | None,
    num: int,
    max_tokens: int,
    seed: int,
    sampling: Sampling,
) -> None:
    """Print `num` responses: to problems of a task with their scores, or to each of the given prompts."""
    from rich.console import Console
    from rich.text import Text

    task, examples = None, [Example(str(i), p) for i, p in enumerate(given) for _ in range(num)]
    if not given:
        task, examples = make_problems(Evaluation(source=source, num_problems=num, seed=seed))
    model = load_model(str(find_model(model_name)))
    prompts = make_prompts(
        examples, model.tokenizer, template=template, max_completion=max_tokens, context_length=model.context_length
    )
    if warning := template_warning(prompts, model.tokenizer, template):
        print(warning, file=sys.stderr)
    completions = sample(
        model.model,
        [prompt.token_ids for prompt in prompts],
        [(seed, i) for i in range(len(prompts))],
        max_tokens=max_tokens,
        end_ids=end_set(model, None),
        sampling=sampling,
    )
    console = Console()
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        text = model.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        facts = [f"{len(completion.token_ids)} tokens", f"stopped by {completion.stop}"]
        facts.append(f"entropy {sum(completion.entropies) / len(completion.entropies):.3f} nats")
        if task is not None:
            facts.append(f"score {task.score(example, text):g}, answer {example.answer}")
        # Text, not markup: what a model writes may look like markup or control codes.
        console.print(
            Text(model.tokenizer.decode(prompt.token_ids), style="dim"), Text(_printable(text), style="bold"), sep=""
        )
        console.print(Text("  " + ", ".join(facts)))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
