"""Metrics of runs: what each is called, its value in the files, and its mean over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from potstill.config import Recipe
from potstill.runs.results import Entry
from potstill.runs.results_schema import EvalEstimate, EvalRow, ProblemColumn
from potstill.runs.schema import value_in
from potstill.statistics import Estimate, pass_at_k, seeds_and_problems

MetricColumn = EvalEstimate | Literal["pass", "flops", "seconds"]
# The column of problems that each metric of an evaluation is the mean of.
PROBLEM_COLUMNS: dict[MetricColumn, ProblemColumn] = {
    "avg": "score",
    "pass": "num_correct",
    "entropy_before_answer": "entropy_before_answer",
    "length": "length",
    "truncation": "truncation",
}

# The steps of a run that count as its last, as a share of all.
LAST_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number of a run: of its evaluation at a temperature, or of its training where there is
    none.

    `column` is what it is called in the files and `k` the k of Pass@k. It is shown times `scale`.
    """

    key: str
    title: str
    column: MetricColumn
    temperature: float | None = None
    k: int | None = None
    scale: float = 1.0
    digits: int = 1
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The mean of a metric over seeds, its 95 % interval where there is one, and each run's own
    value."""

    value: float
    low: float | None
    high: float | None
    per_run: tuple[tuple[Path, float], ...]


def metrics_of(entries: Sequence[Entry]) -> list[Metric]:
    """The metrics that these entries have, the most important first."""
    rows = [row for entry in entries for row in entry.evals]
    found = evaluation_metrics(rows) if rows else []
    if any(entry.flops is not None for entry in entries):
        found.append(
            Metric(
                key="gflops", title="training operations", column="flops", scale=1e-9, unit="GFLOP"
            )
        )
    if any(entry.seconds is not None for entry in entries):
        found.append(
            Metric(
                key="seconds",
                title="seconds of training",
                column="seconds",
                scale=1,
                digits=0,
                unit="s",
            )
        )
    return found


def evaluation_metrics(rows: Sequence[EvalRow]) -> list[Metric]:
    """The metrics of evaluations: accuracy at two temperatures, and the rest at the highest."""
    found = []
    temperatures = sorted({row["temperature"] for row in rows}, reverse=True)
    num_responses = min(row["num_responses"] for row in rows)
    high = temperatures[0]
    for t in dict.fromkeys((high, temperatures[-1])):
        title = f"Avg@{num_responses} T={t:g}"
        found.append(
            Metric(key=f"avg-T{t:g}", title=title, column="avg", temperature=t, scale=100, unit="%")
        )
    for k in dict.fromkeys((min(8, num_responses), 32 if num_responses >= 64 else num_responses)):
        key, title = f"pass{k}-T{high:g}", f"Pass@{k} T={high:g}"
        found.append(
            Metric(key=key, title=title, column="pass", temperature=high, k=k, scale=100, unit="%")
        )
    found += [
        Metric(
            key="entropy",
            title="entropy before the answer",
            column="entropy_before_answer",
            temperature=high,
            scale=1,
            digits=3,
            unit="nats",
        ),
        Metric(
            key="length",
            title="length",
            column="length",
            temperature=high,
            scale=1,
            digits=0,
            unit="tokens",
        ),
        Metric(
            key="truncation",
            title="truncated",
            column="truncation",
            temperature=high,
            scale=100,
            unit="%",
        ),
    ]
    return found


def eval_at(entry: Entry, temperature: float | None) -> EvalRow | None:
    """The entry's evaluation at this temperature."""
    return next((row for row in entry.evals if row["temperature"] == temperature), None)


def stored(entry: Entry, metric: Metric) -> Sequence[float] | None:
    """A run's own number as it is in its files: value, low, high, or the value alone."""
    if metric.column == "flops" or metric.column == "seconds":
        value = entry.flops if metric.column == "flops" else entry.seconds
        return None if value is None else (value,)
    row = eval_at(entry, metric.temperature)
    if row is None:
        return None
    return (
        row["pass"].get(str(metric.k)) if metric.column == "pass" else value_in(row, metric.column)
    )


def entropy_excess(entry: Entry) -> float | None:
    """Mean student entropy minus the sum of mean teacher entropy and mean forward KL, on the
    training tokens of the last steps (nats a token).

    At a stationary point of the forward KL it is 0 (docs/theory.md, section 10). No other objective
    says so, and the value is None for those, and where a step does not tell.
    """
    if not _predicts_entropy(entry.recipe):
        return None
    total = num_all = 0.0
    for row in entry.metrics[-math.ceil(LAST_SHARE * len(entry.metrics)) :]:
        student, teacher = value_in(row, "student_entropy"), value_in(row, "teacher_entropy")
        kl, num_tokens = value_in(row, "forward_kl"), value_in(row, "num_loss_tokens")
        if student is None or teacher is None or kl is None or num_tokens is None:
            return None
        total += num_tokens * (student - teacher - kl)
        num_all += num_tokens
    return total / num_all if num_all else None


def _predicts_entropy(recipe: Recipe | None) -> bool:
    """Whether the loss is the mean forward KL over all loss tokens and nothing else."""
    if recipe is None:
        return False
    objective = recipe.objective
    is_forward = objective.kl == "forward" and objective.signal == "full"
    is_alone = objective.weights is None and recipe.reward.is_off
    return is_forward and is_alone and recipe.train.normalize == "token"


def problem_values(entry: Entry, metric: Metric) -> dict[str, float] | None:
    """One number a problem, whose mean is the stored value; None where the evaluation has no such
    column.

    Entropies are ratios of sums, nats over tokens. Of those it is the ratio plus each problem's
    influence on it (the delta method), so that a mean of them varies as the ratio does.
    """
    row, name = eval_at(entry, metric.temperature), PROBLEM_COLUMNS.get(metric.column)
    if row is None or name is None:
        return None
    columns = row["problems"]
    values, lengths = value_in(columns, name), value_in(columns, "length_to_answer")
    if values is None:
        return None
    if metric.k is not None:
        values = [
            pass_at_k(row["num_responses"], right, metric.k) for right in columns["num_correct"]
        ]
    if metric.column == "entropy_before_answer":
        if lengths is None:
            return None
        ratio, mean_length = row["entropy_before_answer"][0], sum(lengths) / len(lengths)
        values = [
            ratio + (value - ratio) * n / mean_length
            for value, n in zip(values, lengths, strict=True)
        ]
    return dict(zip(columns["id"], values, strict=True))


def summarize_entries(entries: Sequence[Entry], metric: Metric) -> Summary | None:
    """The mean over seeds. One seed: the stored interval over problems. More: that over seeds and
    problems.

    There is no interval where the seeds were evaluated on different problems, nor of a cost.
    """
    found = [
        (entry, estimate) for entry in entries if (estimate := stored(entry, metric)) is not None
    ]
    if not found:
        return None
    per_run = tuple((entry.path, estimate[0]) for entry, estimate in found)
    if len(found) == 1:
        value, *bounds = found[0][1]
        low, high = bounds or (None, None)
        return Summary(value=value, low=low, high=high, per_run=per_run)
    value = sum(value for _, value in per_run) / len(per_run)
    estimate = over_seeds([problem_values(entry, metric) for entry, _ in found])
    low, high = (estimate.low, estimate.high) if estimate else (None, None)
    return Summary(value=value, low=low, high=high, per_run=per_run)


def over_seeds(rows: Sequence[dict[str, float] | None]) -> Estimate | None:
    """The mean of seeds by problems with its interval; None where there is nothing or the problems
    are not the same."""
    known = [row for row in rows if row]
    if not known or len(known) < len(rows) or any(row.keys() != known[0].keys() for row in known):
        return None
    return seeds_and_problems([[row[key] for key in known[0]] for row in known])
