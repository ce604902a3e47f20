"""The paper's claims (arXiv 2605.16826), each judged from run folders. Reads what `results` read;
needs no torch.

Compared are runs that agree in everything but what a claim is about, their seeds included, and that
were evaluated on the same problems with the same settings. What leaves the objective alike
(`IGNORED`) may differ; runs that differ in that alone are averaged, so leave out the learning rates
that lost a sweep. A comparison gives one number a problem. Comparisons under several conditions
(teachers, windows, prefixes) are averaged within a seed, which is the unit that training varies
with, and the interval is for seeds and problems (`seeds_and_problems`). Where seeds were evaluated
on different problems it is Student's for the seeds' means, which hold the problems' noise too.

A claim is supported, or contradicted, when the whole 95 % interval is on one side of its bound, by
three seeds or more. With fewer it has a direction and a size and no verdict: an interval over
problems does not know how much training varies, and rounding alone can turn over what one seed
shows. Intervals are not corrected for the number of claims: each is a question of its own, and of
twenty of which nothing is true about one gets a verdict. Claims about accuracy are judged at the
highest temperature that was evaluated and once more at the lowest, since what makes the student
sharper looks like a gain where cooling would do as well.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from potstill.config import ALIKE, Recipe, Role
from potstill.report.metrics import eval_at
from potstill.report.questions import (
    ABOVE_TEACHER,
    QUESTIONS,
    UNITS,
    Claim,
    ClaimVerdict,
    ComparedRun,
    Question,
)
from potstill.runs.results import Entry, find_starts, recipe_key
from potstill.runs.results_schema import ProblemColumn
from potstill.runs.schema import MetricsRow, value_in
from potstill.statistics import SEEDS_TO_JUDGE, Estimate, pass_at_k, seeds_and_problems

# May differ within a comparison. How a run was evaluated is read from the evaluation, which can be
# newer.
IGNORED = (*ALIKE, Role.EVALUATION)
NUM_LAST_STEPS = 10
# The column of problems that a question's metric is, as it is.
COLUMN_OF: dict[str, ProblemColumn] = {
    "length": "length",
    "entropy before the answer": "entropy_before_answer",
}


def claims(entries: Sequence[Entry]) -> list[Claim]:
    """Every claim, in the order of the paper, those included that these runs cannot judge."""
    temperatures = {row["temperature"] for entry in entries if entry.recipe for row in entry.evals}
    highest = max(temperatures, default=None)
    lowest = min(temperatures - {highest}, default=None)
    by_path = {entry.path.resolve(): entry for entry in entries}
    at = {"none": (highest, highest), "second": (highest, lowest), "all": (lowest, lowest)}
    starts = find_starts(list(by_path.values()))
    return [_judge(question, by_path, starts, at[question.cooled]) for question in QUESTIONS]


def _judge(
    question: Question,
    entries: dict[Path, Entry],
    starts: dict[Path, Entry],
    temperatures: tuple[float | None, float | None],
) -> Claim:
    comparisons: dict[str, list[ComparedRun]] = defaultdict(list)
    for entry in entries.values():
        if run := _as_run(question, entry, entries, starts=starts, temperatures=temperatures):
            comparisons[run.key].append(run)
    effects: dict[tuple[int, ...], list[dict[str, float]]] = defaultdict(list)
    pairs: list[tuple[Path, Path]] = []
    ranks: list[float] = []
    for runs in comparisons.values():
        weights = contrast([run.place for run in runs], question.compared.contrast)
        if weights is None:
            continue
        effects[runs[0].seeds].append(
            {
                name: sum(w * run.values[name] for w, run in zip(weights, runs, strict=True))
                for name in runs[0].values
            }
        )
        pairs += _pairs(runs, weights)
        ranks.append(
            _rank_correlation([run.place for run in runs], [_mean(run.values) for run in runs])
        )

    unit = UNITS[question.metric] + question.compared.per
    claim = Claim(
        name=question.name,
        statement=question.statement,
        metric=question.metric,
        effect=None,
        unit=unit,
        pairs=(),
        verdict="not measured",
        detail="",
    )
    if not effects:
        return replace(claim, detail=f"needs {question.compared.needs}, alike in all else")
    effect, over = estimate_effect(list(effects.values()))
    detail = [f"{len(pairs)} pair{'s' * (len(pairs) > 1)}", over]
    if unit == "times":
        effect = Estimate(*(math.exp(x) for x in effect))
        detail.append("building a cache once is not counted")
    elif question.metric == ABOVE_TEACHER:
        detail.append(f"the last {NUM_LAST_STEPS} steps of training")
    else:
        detail.insert(0, _at(temperatures))
    if question.metric == "Pass@k":
        compared = {path.resolve() for pair in pairs for path in pair}
        ks = {row["num_responses"] // 2 for path in compared for row in entries[path].evals}
        detail.append(f"k = {', '.join(map(str, sorted(ks)))}")
    if question.compared.contrast == "slope":
        detail.append("rank correlation " + ", ".join(f"{rank:.2f}" for rank in ranks))
    verdict = _verdict(effect, question.bound, question.sign, len(effects))
    direction = "towards" if question.sign * (effect.value - question.bound) > 0 else "against"
    judged = replace(claim, effect=effect, verdict=verdict, direction=direction)
    return replace(judged, pairs=tuple(pairs), detail="; ".join(detail))


def _at(temperatures: tuple[float | None, float | None]) -> str:
    """The temperatures that were compared, each once."""
    shown = dict.fromkeys(each for each in temperatures if each is not None)
    return "T = " + " against ".join(f"{temperature:g}" for temperature in shown)


def _verdict(effect: Estimate, bound: float, sign: int, num_seeds: int) -> ClaimVerdict:
    if num_seeds < SEEDS_TO_JUDGE:
        return "one seed" if num_seeds == 1 else "two seeds"
    if effect.low > bound:
        return "supported" if sign > 0 else "contradicted"
    if effect.high < bound:
        return "supported" if sign < 0 else "contradicted"
    return "undecided"


def contrast(places: Sequence[float], kind: Literal["ends", "top", "slope"]) -> list[float] | None:
    """The weight of each run in a comparison (see Question); None where there is nothing to
    compare."""
    at = np.asarray(places, dtype=float)
    is_top, is_bottom = at == at.max(), at == at.min()
    if kind == "top":
        return (is_top / is_top.sum()).tolist()
    if len(set(places)) < (3 if kind == "slope" else 2):
        return None
    if kind == "ends":
        return (is_top / is_top.sum() - is_bottom / is_bottom.sum()).tolist()
    centred = at - at.mean()
    return (centred / (centred**2).sum()).tolist()


def estimate_effect(seeds: Sequence[Sequence[dict[str, float]]]) -> tuple[Estimate, str]:
    """The mean over seeds of their comparisons' values by problem, with its interval and what that
    is over."""
    rows = []
    for comparisons in seeds:
        by_problem: dict[str, list[float]] = defaultdict(list)
        for values in comparisons:
            for problem, value in values.items():
                by_problem[problem].append(value)
        rows.append({problem: sum(found) / len(found) for problem, found in by_problem.items()})
    if len(rows) == 1:
        return seeds_and_problems(
            [list(rows[0].values())]
        ), "one seed: training noise is not in the interval"
    if all(row.keys() == rows[0].keys() for row in rows):
        over = f"interval over {len(rows)} seeds" + (" and problems" if len(rows[0]) > 1 else "")
        return seeds_and_problems([[row[problem] for problem in rows[0]] for row in rows]), over
    return seeds_and_problems(
        [[_mean(row)] for row in rows]
    ), f"interval over {len(rows)} seeds, evaluated on different problems"


def _pairs(runs: Sequence[ComparedRun], weights: Sequence[float]) -> list[tuple[Path, Path]]:
    """Each run and its reference, or each that counts positively with each that counts
    negatively."""
    with_reference = [
        (run.path, run.reference)
        for run, w in zip(runs, weights, strict=True)
        if run.reference and w
    ]
    first, second = (
        [r.path for r, w in zip(runs, weights, strict=True) if sign * w > 0] for sign in (1, -1)
    )
    # A run that is compared with what is in its own folder has no other.
    return with_reference or [(a, b) for a in first for b in second or [a]]


def _as_run(
    question: Question,
    entry: Entry,
    entries: dict[Path, Entry],
    *,
    starts: dict[Path, Entry],
    temperatures: tuple[float | None, float | None],
) -> ComparedRun | None:
    """An entry's part in the comparisons of a question; None where it has none."""
    of_rl = question.compared.of_rl
    if entry.recipe is None or (entry.recipe.objective.kl == "none") != of_rl:
        return None
    placed = starts.get(entry.path) if of_rl else entry
    if placed is None or placed.recipe is None:
        return None
    if placed.recipe.objective.signal != "full" or not placed.recipe.reward.is_off:
        return None
    place = question.compared.place(placed)
    temperature = temperatures[place == 0]
    measured = _measure(question.metric, entry, temperature)
    if place is None or measured is None:
        return None
    evaluated_on, values = measured
    key = [recipe_key(placed, (*IGNORED, *question.compared.about)), evaluated_on]
    seeds = [placed.recipe.train.seed, placed.recipe.data.seed]
    if of_rl:
        key.append(recipe_key(entry, (*IGNORED, "student.model")))
        seeds += [entry.recipe.train.seed, entry.recipe.data.seed]
    reference = None
    if question.compared.reference is not None:
        reference = (
            placed if question.compared.reference == "start" else _teacher(placed.recipe, entries)
        )
        theirs = reference and _measure(question.metric, reference, temperature)
        if not reference or not theirs or theirs[0] != evaluated_on:
            return None
        values = {problem: value - theirs[1][problem] for problem, value in values.items()}
    return ComparedRun(
        entry.path, json.dumps(key), tuple(seeds), place, values, reference and reference.path
    )


def _teacher(recipe: Recipe, entries: dict[Path, Entry]) -> Entry | None:
    """The evaluation of a run's teacher."""
    found = (entry for entry in entries.values() if entry.recipe is None and entry.evals)
    return next((entry for entry in found if entry.evals[0]["model"] == recipe.teacher.model), None)


def _measure(
    metric: str, entry: Entry, temperature: float | None
) -> tuple[str, dict[str, float]] | None:
    """The problems that a metric was measured on, and its value for each; the logarithm of a step's
    cost has none."""
    if metric == "operations a step":
        return (
            ("", {"": math.log(entry.flops / entry.metrics[-1]["step"])}) if entry.flops else None
        )
    if metric == "entropy above the teacher's":
        # On the tokens of the last training steps.
        gaps = {
            f"step {i}": _entropy_above(row)
            for i, row in enumerate(entry.metrics[-NUM_LAST_STEPS:])
        }
        found = {step: gap for step, gap in gaps.items() if gap is not None}
        return ("", found) if len(found) > 1 else None
    row = eval_at(entry, temperature)
    if row is None:
        return None
    columns, num_responses = row["problems"], row["num_responses"]
    if metric == "Avg":
        values = [100 * score for score in columns["score"]]
    elif metric == "Pass@k":
        if num_responses < 2:
            return None
        values = [
            100 * pass_at_k(num_responses, c, num_responses // 2) for c in columns["num_correct"]
        ]
    elif metric == "truncation":
        values = [100 * share for share in columns["truncation"]]
    else:
        values = value_in(columns, COLUMN_OF[metric])
        if values is None:
            return None
    settings = {
        name: row["settings"][name]
        for name in sorted(row["settings"])
        if name not in ("batch_size", "end_ids")
    }
    # A task gives the problems of every seed the same ids.
    origin = " ".join(str(settings[name]) for name in ("source", "split", "seed"))
    named = {f"{origin} {name}": value for name, value in zip(columns["id"], values, strict=True)}
    return json.dumps([settings, sorted(columns["id"])]), named


def _entropy_above(row: MetricsRow) -> float | None:
    """The student's entropy before the answer less the teacher's, in nats a token; None where one
    is not known."""
    student = value_in(row, "student_entropy_before_answer")
    teacher = value_in(row, "teacher_entropy_before_answer")
    return None if student is None or teacher is None else student - teacher


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; 0 where all are equal."""
    from scipy.stats import rankdata

    ranks = rankdata([a, b], axis=1)
    return float(np.corrcoef(ranks)[0, 1]) if np.ptp(ranks, axis=1).all() else 0.0
