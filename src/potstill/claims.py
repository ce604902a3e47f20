"""The paper's claims (arXiv 2605.16826), each judged from run folders. Reads what `results` read; needs no torch.

Compared are runs that agree in everything but what a claim is about, their seeds included, and that were evaluated on
the same problems with the same settings. What leaves the objective alike (`IGNORED`) may differ; runs that differ in
that alone are averaged, so leave out the learning rates that lost a sweep. A comparison gives one number a problem.
Comparisons under several conditions (teachers, windows, prefixes) are averaged within a seed, which is the unit that
training varies with, and the interval is for seeds and problems (`seeds_and_problems`). Where seeds were evaluated on
different problems it is Student's for the seeds' means, which hold the problems' noise too.

A claim is supported, or contradicted, when the whole 95 % interval is on one side of its bound, by three seeds or more.
With fewer it has a direction and a size and no verdict: an interval over problems does not know how much training
varies, and rounding alone can turn over what one seed shows. Intervals are not corrected for the number of claims: each
is a question of its own, and of twenty of which nothing is true about one gets a verdict. Claims about accuracy are
judged at the highest temperature that was evaluated and once more at the lowest, since what makes the student sharper
looks like a gain where cooling would do as well.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from potstill.config import ALIKE, METHODS, GrpoRecipe, Recipe, Role, Selection, fields_with
from potstill.results import Entry, recipe_key
from potstill.statistics import SEEDS_TO_JUDGE, Estimate, pass_at_k, seeds_and_problems

# May differ within a comparison. How a run was evaluated is read from the evaluation, which can be newer.
IGNORED = (*ALIKE, Role.EVALUATION)
NUM_LAST_STEPS = 10
KL = (Role.DIVERGENCE, Role.WEIGHT_SCHEDULE)
PREFIX = (Role.PREFIX,)
GATE = tuple(name for name in fields_with(Role.WINDOW) if name != "window.tokens")
UNITS = {
    "Avg": "points",
    "Pass@k": "points",
    "truncation": "points",
    "entropy before the answer": "nats a token",
    "length": "tokens",
    "operations a step": "times",
    "entropy above the teacher's": "nats a token",
}

# Those that are no verdict say how many seeds there are.
Verdict = Literal["supported", "contradicted", "undecided", "not measured", "one seed", "two seeds"]
Kind = Callable[[Recipe], bool]
Place = Callable[[Entry], float | None]


@dataclass(frozen=True)
class Claim:
    """What the paper says and what the runs say.

    `effect` is of `metric` in `unit`, None where not measured. `pairs` are the run folders (or evaluation files) that
    were compared, the first minus (or, in times, over) the second. `detail` says how many there are and what the
    interval is over, or which runs would measure it. `direction` is "towards" where the effect is on the claim's side
    of its bound, whatever the interval, else "against".
    """

    name: str
    statement: str
    metric: str
    effect: Estimate | None
    unit: str
    pairs: tuple[tuple[Path, Path], ...]
    verdict: Verdict
    detail: str
    direction: Literal["towards", "against", ""] = ""

    @property
    def answer(self) -> str:
        """The verdict, or the direction where there are too few seeds for one."""
        return f"{self.direction} ({self.verdict})" if self.verdict in ("one seed", "two seeds") else self.verdict


class Comparison(NamedTuple):
    """Which runs are compared and how.

    `place` says where a run stands in a comparison, None where it has no part in it, and `about` which fields may
    differ therefore. `contrast` makes one number of a comparison's runs. `ends`: those with the highest place minus
    those with the lowest. `top`: those with the highest. `slope`: the change by one unit of place, over at least three.
    With a `reference` a run's value is what it has more than its teacher, or than the run where its GRPO began. With
    `of_grpo` the runs are those of GRPO, each in the place of the run where it began. `needs` says in words which runs
    these are, and `per` what a unit of place is.
    """

    place: Place
    about: Selection
    needs: str
    contrast: Literal["ends", "top", "slope"] = "ends"
    of_grpo: bool = False
    reference: Literal["teacher", "start"] | None = None
    per: str = ""


class Question(NamedTuple):
    """A claim before it is judged: the effect is above `bound` (sign 1) or below it (sign -1).

    `cooled` says which runs are measured at the lowest temperature that was evaluated: those at place 0, or all.
    """

    name: str
    compared: Comparison
    metric: str
    sign: Literal[1, -1]
    statement: str
    bound: float = 0.0
    cooled: Literal["none", "second", "all"] = "none"


class Run(NamedTuple):
    """A run's part in a comparison, which is of all runs with one `key`; `seeds` is what repeats it."""

    path: Path
    key: str
    seeds: tuple[int, ...]
    place: float
    values: dict[str, float]
    reference: Path | None


def claims(entries: Sequence[Entry]) -> list[Claim]:
    """Every claim, in the order of the paper, those included that these runs cannot judge."""
    temperatures = {row["temperature"] for entry in entries if entry.recipe for row in entry.evals}
    highest = max(temperatures, default=None)
    lowest = min(temperatures - {highest}, default=None)
    by_path = {entry.path.resolve(): entry for entry in entries}
    at = {"none": (highest, highest), "second": (highest, lowest), "all": (lowest, lowest)}
    return [_judge(question, by_path, at[question.cooled]) for question in QUESTIONS]


def _judge(question: Question, entries: dict[Path, Entry], temperatures: tuple[float | None, float | None]) -> Claim:
    comparisons: dict[str, list[Run]] = defaultdict(list)
    for entry in entries.values():
        if run := _as_run(question, entry, entries, temperatures):
            comparisons[run.key].append(run)
    effects: dict[tuple[int, ...], list[dict[str, float]]] = defaultdict(list)
    pairs: list[tuple[Path, Path]] = []
    ranks: list[float] = []
    for runs in comparisons.values():
        weights = contrast([run.place for run in runs], question.compared.contrast)
        if weights is None:
            continue
        effects[runs[0].seeds].append(
            {name: sum(w * run.values[name] for w, run in zip(weights, runs, strict=True)) for name in runs[0].values}
        )
        pairs += _pairs(runs, weights)
        ranks.append(_rank_correlation([run.place for run in runs], [_mean(run.values) for run in runs]))

    unit = UNITS[question.metric] + question.compared.per
    claim = Claim(question.name, question.statement, question.metric, None, unit, (), "not measured", "")
    if not effects:
        return replace(claim, detail=f"needs {question.compared.needs}, alike in all else")
    effect, over = estimate(list(effects.values()))
    detail = [f"{len(pairs)} pair{'s' * (len(pairs) > 1)}", over]
    if unit == "times":
        effect = Estimate(*(math.exp(x) for x in effect))
        detail.append("building a cache once is not counted")
    elif question.metric == ABOVE_TEACHER:
        detail.append(f"the last {NUM_LAST_STEPS} steps of training")
    else:
        shown = dict.fromkeys(temperature for temperature in temperatures if temperature is not None)
        detail.insert(0, "T = " + " against ".join(f"{temperature:g}" for temperature in shown))
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


def _verdict(effect: Estimate, bound: float, sign: int, num_seeds: int) -> Verdict:
    if num_seeds < SEEDS_TO_JUDGE:
        return "one seed" if num_seeds == 1 else "two seeds"
    if effect.low > bound:
        return "supported" if sign > 0 else "contradicted"
    if effect.high < bound:
        return "supported" if sign < 0 else "contradicted"
    return "undecided"


def contrast(places: Sequence[float], kind: Literal["ends", "top", "slope"]) -> list[float] | None:
    """The weight of each run in a comparison (see Question); None where there is nothing to compare."""
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


def estimate(seeds: Sequence[Sequence[dict[str, float]]]) -> tuple[Estimate, str]:
    """The mean over seeds of their comparisons' values by problem, with its interval and what that is over."""
    rows = []
    for comparisons in seeds:
        by_problem: dict[str, list[float]] = defaultdict(list)
        for values in comparisons:
            for problem, value in values.items():
                by_problem[problem].append(value)
        rows.append({problem: sum(found) / len(found) for problem, found in by_problem.items()})
    if len(rows) == 1:
        return seeds_and_problems([list(rows[0].values())]), "one seed: training noise is not in the interval"
    if all(row.keys() == rows[0].keys() for row in rows):
        over = f"interval over {len(rows)} seeds" + (" and problems" if len(rows[0]) > 1 else "")
        return seeds_and_problems([[row[problem] for problem in rows[0]] for row in rows]), over
    return seeds_and_problems(
        [[_mean(row)] for row in rows]
    ), f"interval over {len(rows)} seeds, evaluated on different problems"


def _pairs(runs: Sequence[Run], weights: Sequence[float]) -> list[tuple[Path, Path]]:
    """Each run and its reference, or each that counts positively with each that counts negatively."""
    with_reference = [(run.path, run.reference) for run, w in zip(runs, weights, strict=True) if run.reference and w]
    first, second = ([r.path for r, w in zip(runs, weights, strict=True) if sign * w > 0] for sign in (1, -1))
    # A run that is compared with what is in its own folder has no other.
    return with_reference or [(a, b) for a in first for b in second or [a]]


def _as_run(
    question: Question, entry: Entry, entries: dict[Path, Entry], temperatures: tuple[float | None, float | None]
) -> Run | None:
    """An entry's part in the comparisons of a question; None where it has none."""
    if isinstance(entry.recipe, GrpoRecipe) != question.compared.of_grpo:
        return None
    placed = entry if entry.start is None else entries.get(entry.start.resolve())
    if placed is None or not isinstance(placed.recipe, Recipe) or placed.recipe.objective.signal != "full":
        return None
    place = question.compared.place(placed)
    temperature = temperatures[place == 0]
    measured = _measure(question.metric, entry, temperature)
    if place is None or measured is None:
        return None
    evaluated_on, values = measured
    key = [recipe_key(placed, (*IGNORED, *question.compared.about)), evaluated_on]
    seeds = [placed.recipe.train.seed, placed.recipe.data.seed]
    if isinstance(entry.recipe, GrpoRecipe):
        key.append(recipe_key(entry, (*IGNORED, Role.START)))
        seeds += [entry.recipe.grpo.seed, entry.recipe.data.seed]
    reference = None
    if question.compared.reference is not None:
        reference = placed if question.compared.reference == "start" else _teacher(placed.recipe, entries)
        theirs = reference and _measure(question.metric, reference, temperature)
        if not reference or not theirs or theirs[0] != evaluated_on:
            return None
        values = {problem: value - theirs[1][problem] for problem, value in values.items()}
    return Run(entry.path, json.dumps(key), tuple(seeds), place, values, reference and reference.path)


def _teacher(recipe: Recipe, entries: dict[Path, Entry]) -> Entry | None:
    """The evaluation of a run's teacher."""
    found = (entry for entry in entries.values() if entry.recipe is None and entry.evals)
    return next((entry for entry in found if entry.evals[0]["model"] == recipe.teacher.model), None)


def _measure(metric: str, entry: Entry, temperature: float | None) -> tuple[str, dict[str, float]] | None:
    """What a metric was measured on and its value for each problem; the logarithm of what a step costs has none."""
    if metric == "operations a step":
        return ("", {"": math.log(entry.flops / entry.metrics[-1]["step"])}) if entry.flops else None
    if metric == "entropy above the teacher's":
        # On the tokens of the last training steps.
        names = ("student_entropy_before_answer", "teacher_entropy_before_answer")
        pairs = [[row.get(name) for name in names] for row in entry.metrics[-NUM_LAST_STEPS:]]
        found = {f"step {i}": a - b for i, (a, b) in enumerate(pairs) if a is not None and b is not None}
        return ("", found) if len(found) > 1 else None
    row: dict[str, Any] | None = next((row for row in entry.evals if row["temperature"] == temperature), None)
    if row is None:
        return None
    columns, num_responses = row["problems"], row["num_responses"]
    if metric == "Avg":
        values = [100 * score for score in columns["score"]]
    elif metric == "Pass@k":
        if num_responses < 2:
            return None
        values = [100 * pass_at_k(num_responses, c, num_responses // 2) for c in columns["num_correct"]]
    elif metric == "truncation":
        values = [100 * share for share in columns["truncation"]]
    else:
        values = columns[{"length": "length", "entropy before the answer": "entropy_before_answer"}[metric]]
    settings = {
        name: row["settings"][name] for name in sorted(row["settings"]) if name not in ("batch_size", "end_ids")
    }
    # A task gives the problems of every seed the same ids.
    origin = " ".join(str(settings[name]) for name in ("source", "split", "seed"))
    named = {f"{origin} {name}": value for name, value in zip(columns["id"], values, strict=True)}
    return json.dumps([settings, sorted(columns["id"])]), named


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; 0 where all are equal."""
    from scipy.stats import rankdata

    ranks = rankdata([a, b], axis=1)
    return float(np.corrcoef(ranks)[0, 1]) if np.ptp(ranks, axis=1).all() else 0.0


def _recipe(entry: Entry) -> Recipe:
    assert isinstance(entry.recipe, Recipe)
    return entry.recipe


def _weight(recipe: Recipe) -> float | None:
    """The forward KL's: 1 in a forward and 0 in a reverse KL; None where it changes or the loss is another."""
    objective = recipe.objective
    if objective.gamma:
        return None
    if objective.kl == "mixed" and recipe.weight_schedule.schedule == "constant" and objective.forward_above is None:
        return objective.forward_weight
    return {"forward": 1.0, "reverse": 0.0}.get(objective.kl)


def _weighs(test: Callable[[float], bool]) -> Kind:
    return lambda recipe: (weight := _weight(recipe)) is not None and test(weight)


REVERSE, FORWARD, MIXED = _weighs(lambda w: w == 0), _weighs(lambda w: w == 1), _weighs(lambda w: 0.8 <= w < 1)


def _is_cell(key: str) -> Kind:
    method = METHODS[key]
    direction = FORWARD if method.kl == "forward" else REVERSE
    return lambda recipe: recipe.objective.prefix == method.prefix and direction(recipe)


def _sides(first: Kind, second: Kind) -> Place:
    """The first kind of run against the second."""
    return lambda entry: 1.0 if first(_recipe(entry)) else 0.0 if second(_recipe(entry)) else None


def _prefixes(of: Kind) -> Place:
    """Student against teacher prefixes, of one kind of run."""
    places = {"student": 1.0, "teacher": 0.0}
    return lambda entry: places.get(_recipe(entry).objective.prefix) if of(_recipe(entry)) else None


def _cost(is_cached: bool) -> Place:
    """Teacher prefixes, with or without a cache, against student prefixes."""
    places = {("teacher", is_cached): 1.0, ("student", False): 0.0}
    return lambda entry: places.get((_recipe(entry).objective.prefix, _recipe(entry).teacher.cache is not None))


def _window(of: Kind) -> Place:
    """The tokens of fixed windows, of one kind of run."""

    def place(entry: Entry) -> float | None:
        recipe = _recipe(entry)
        return recipe.window.tokens if recipe.window.schedule == "fixed" and of(recipe) else None

    return place


def _gate(entry: Entry) -> float | None:
    return {"entropy-gated": 1.0, "fixed": 0.0}.get(_recipe(entry).window.schedule)


def _entropy(entry: Entry) -> float | None:
    """Before the answer, at the highest temperature."""
    row = max(entry.evals, key=lambda row: row["temperature"], default=None)
    return float(np.mean(row["problems"]["entropy_before_answer"])) if row else None


def _starts(key: str) -> Comparison:
    place = _sides(_is_cell("dagger"), _is_cell(key))
    return Comparison(place, (*PREFIX, *KL), f"GRPO from DAgger and from {METHODS[key].name} runs", of_grpo=True)


ENTROPY, COST = "entropy before the answer", "operations a step"
ABOVE_TEACHER = "entropy above the teacher's"
DIRECTIONS = Comparison(_sides(REVERSE, FORWARD), KL, "runs with reverse and with forward KL")
EQUAL_STEPS = Comparison(
    _prefixes(lambda recipe: recipe.train.flops is None), PREFIX, "runs with student and with teacher prefixes"
)
EQUAL_COST = Comparison(
    _prefixes(lambda recipe: recipe.train.flops is not None),
    # The warm-up follows the number of steps, by default.
    (*PREFIX, Role.LENGTH, Role.WARM_UP),
    "runs with student and with teacher prefixes and train.flops set",
)
CACHED = Comparison(_cost(True), PREFIX, "runs with student and with cached teacher prefixes")
LIVE = Comparison(_cost(False), PREFIX, "runs with student and with teacher prefixes, without a cache")
WINDOWS = Comparison(_window(lambda _: True), ("window.tokens",), "runs with two lengths of fixed windows")
OPD_WINDOWS = Comparison(_window(_is_cell("opd")), ("window.tokens",), "OPD runs with two lengths of fixed windows")
OPD_TEACHER = OPD_WINDOWS._replace(
    needs="OPD runs and an evaluation of their teacher with the same settings", contrast="top", reference="teacher"
)
OPD_ALONE = OPD_WINDOWS._replace(needs="OPD runs", contrast="top")
MOSTLY_FORWARD = Comparison(
    _sides(MIXED, REVERSE), KL, "runs with a constant forward weight from 0.8 to below 1 and with reverse KL"
)
WEIGHTS = Comparison(
    lambda entry: _weight(_recipe(entry)),
    KL,
    "runs with three or more forward weights",
    contrast="slope",
    per=" by a weight of 1",
)
GATED = Comparison(_gate, GATE, "runs with entropy-gated and with fixed windows of the same tokens")
RL_OPD = Comparison(
    _sides(_is_cell("opd"), lambda _: False),
    (),
    "GRPO from OPD runs, both evaluated with the same settings",
    contrast="top",
    of_grpo=True,
    reference="start",
)
RL_GAIN = Comparison(
    _entropy,
    ("objective", "weight_schedule", "window", "teacher", Role.LENGTH, Role.WARM_UP, Role.BUDGET),
    "GRPO from three or more runs of a seed, all evaluated with the same settings",
    contrast="slope",
    of_grpo=True,
    reference="start",
    per=" by a nat of the start's entropy",
)
ROWS = (
    Question("accuracy-entropy: accuracy", DIRECTIONS, "Avg", 1, "Reverse KL is more accurate than forward KL."),
    Question("accuracy-entropy: entropy", DIRECTIONS, ENTROPY, -1, "Reverse KL leaves less entropy than forward KL."),
    Question(
        *("accuracy-entropy: coverage", DIRECTIONS, "Pass@k", -1),
        "Reverse KL solves fewer problems in k tries: what low entropy would cost, though the paper does not claim it.",
    ),
    Question(
        *("cooling control: accuracy", DIRECTIONS, "Avg", 1),
        "Reverse KL is more accurate than forward KL that is sampled colder: it does more than cool.",
        cooled="second",
    ),
    Question(
        *("cooling control: coverage", DIRECTIONS, "Pass@k", -1),
        "Reverse KL solves fewer problems in k tries than forward KL that is sampled colder.",
        cooled="second",
    ),
    Question(
        *("quality-compute: equal steps", EQUAL_STEPS, "Avg", 1),
        "Student prefixes are more accurate than teacher prefixes after the same number of steps.",
    ),
    Question("quality-compute: cost, cached", CACHED, COST, -1, "A step is cheaper with cached teacher prefixes.", 1),
    Question(
        *("quality-compute: cost, live", LIVE, COST, -1),
        "A step is cheaper with teacher prefixes even without a cache: the paper's saving rests on one.",
        1,
    ),
    Question(
        *("quality-compute: equal operations", EQUAL_COST, "Avg", -1),
        "For the same operations teacher prefixes are the better buy: what their price suggests; the paper compares "
        "equal steps.",
    ),
    Question("accuracy-stability: accuracy", WINDOWS, "Avg", 1, "A longer window is more accurate."),
    Question(
        "accuracy-stability: length", OPD_WINDOWS, "length", 1, "OPD with a longer window writes longer responses."
    ),
    Question(
        *("accuracy-stability: truncation", OPD_WINDOWS, "truncation", 1),
        "OPD with a longer window has more responses that never end.",
    ),
    Question(
        *("accuracy-stability: collapse", OPD_TEACHER, ENTROPY, -1),
        "OPD with the longest window ends with less entropy than the teacher has.",
    ),
    Question(
        *("accuracy-stability: collapse, same tokens", OPD_ALONE, ABOVE_TEACHER, -1),
        "OPD with the longest window ends with less entropy than the teacher has on the same tokens.",
    ),
    Question(
        *("forward weight >= 0.8: accuracy", MOSTLY_FORWARD, "Avg", 1),
        "A forward weight of at least 0.8 is safe: it costs less than 1 point of accuracy against reverse KL.",
        -1,
    ),
    Question(
        *("forward weight >= 0.8: entropy", MOSTLY_FORWARD, ENTROPY, 1),
        "A forward weight of at least 0.8 keeps more entropy than reverse KL.",
    ),
    Question(
        *("forward weight >= 0.8: coverage", MOSTLY_FORWARD, "Pass@k", 1),
        "A forward weight of at least 0.8 solves more problems in k tries than reverse KL.",
    ),
    Question(
        *("forward weight >= 0.8: length", MOSTLY_FORWARD, "length", -1),
        "A forward weight of at least 0.8 writes shorter responses than reverse KL.",
    ),
    Question("forward weight: entropy", WEIGHTS, ENTROPY, 1, "Entropy grows with the forward weight."),
    Question("curriculum: accuracy", GATED, "Avg", 1, "An entropy-gated window is more accurate than a fixed one."),
    Question("curriculum: length", GATED, "length", -1, "An entropy-gated window writes shorter responses."),
    *(
        Question(
            *(f"RL: DAgger or {METHODS[key].name} start", _starts(key), "Avg", 1),
            f"GRPO ends more accurate from a DAgger start than from one by {METHODS[key].name}.",
        )
        for key in ("sft", "offline-rl", "opd")
    ),
    Question("RL: OPD start", RL_OPD, "Avg", -1, "GRPO from an OPD start loses accuracy."),
    Question("RL: entropy of the start", RL_GAIN, "Avg", 1, "GRPO gains more from starts with more entropy."),
)
# What is about accuracy is asked a second time, of cooled responses.
QUESTIONS = tuple(
    question._replace(cooled="all", name=f"{question.name}, cooled") if is_again else question
    for question in ROWS
    for is_again in ((False, True) if question.metric == "Avg" and question.cooled == "none" else (False,))
)
