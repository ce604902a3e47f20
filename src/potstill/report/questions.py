"""Questions that the claims table asks of runs, as data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from potstill.config import METHODS, Recipe, Role, Selection, fields_with
from potstill.runs.results import Entry
from potstill.statistics import Estimate

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
ClaimVerdict = Literal[
    "supported", "contradicted", "undecided", "not measured", "one seed", "two seeds"
]
Condition = Callable[[Recipe], bool]
Placement = Callable[[Entry], float | None]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper, and what the runs say about it.

    `effect` is of `metric` in `unit`, None where not measured. `pairs` are the run folders (or
    evaluation files) that were compared, the first minus (or, in times, over) the second. `detail`
    says how many there are and what the interval is over, or which runs would measure it.
    `direction` is "towards" where the effect is on the claim's side of its bound, whatever the
    interval, else "against".
    """

    name: str
    statement: str
    metric: str
    effect: Estimate | None
    unit: str
    pairs: tuple[tuple[Path, Path], ...]
    verdict: ClaimVerdict
    detail: str
    direction: Literal["towards", "against", ""] = ""

    @property
    def answer(self) -> str:
        """The verdict, or the direction where there are too few seeds for one."""
        return (
            f"{self.direction} ({self.verdict})"
            if self.verdict in ("one seed", "two seeds")
            else self.verdict
        )


class Comparison(NamedTuple):
    """Which runs are compared and how.

    `place` says where a run stands in a comparison, None where it has no part in it, and `about`
    which fields may differ therefore. `contrast` makes one number of a comparison's runs. `ends`:
    those with the highest place minus those with the lowest. `top`: those with the highest.
    `slope`: the change by one unit of place, over at least three. With a `reference` a run's value
    is what it has more than its teacher, or than the run where it began. With `of_rl` the runs are
    those of reinforcement learning alone, each in the place of the run where it began. `needs` says
    in words which runs these are, and `per` what a unit of place is.
    """

    place: Placement
    about: Selection
    needs: str
    contrast: Literal["ends", "top", "slope"] = "ends"
    of_rl: bool = False
    reference: Literal["teacher", "start"] | None = None
    per: str = ""


class Question(NamedTuple):
    """A claim before it is judged: the effect is above `bound` (sign 1) or below it (sign -1).

    `cooled` says which runs are measured at the lowest temperature that was evaluated: those at
    place 0, or all.
    """

    name: str
    compared: Comparison
    metric: str
    sign: Literal[1, -1]
    statement: str
    bound: float = 0.0
    cooled: Literal["none", "second", "all"] = "none"


class ComparedRun(NamedTuple):
    """A run's part in a comparison, which is of all runs with one `key`; `seeds` is what repeats
    it."""

    path: Path
    key: str
    seeds: tuple[int, ...]
    place: float
    values: dict[str, float]
    reference: Path | None


def _recipe(entry: Entry) -> Recipe:
    assert entry.recipe is not None
    return entry.recipe


def _weight(recipe: Recipe) -> float | None:
    """The forward KL's: 1 in a forward and 0 in a reverse KL; None where it changes or the loss is
    another."""
    objective = recipe.objective
    if objective.gamma or objective.weights is not None:
        return None
    if objective.kl == "mixed" and recipe.weight_schedule.schedule == "constant":
        return objective.forward_weight
    return {"forward": 1.0, "reverse": 0.0}.get(objective.kl)


def _weighs(test: Callable[[float], bool]) -> Condition:
    return lambda recipe: (weight := _weight(recipe)) is not None and test(weight)


REVERSE, FORWARD, MIXED = (
    _weighs(lambda w: w == 0),
    _weighs(lambda w: w == 1),
    _weighs(lambda w: 0.8 <= w < 1),
)


def _is_cell(key: str) -> Condition:
    method = METHODS[key]
    direction = FORWARD if method.kl == "forward" else REVERSE
    return lambda recipe: _writer(recipe) == method.prefix and direction(recipe)


def _writer(recipe: Recipe) -> str:
    """Who writes the prefixes: the student that learns is not an older one."""
    return "older student" if recipe.has_older_prefixes else recipe.objective.prefix


def _sides(first: Condition, second: Condition) -> Placement:
    """The first kind of run against the second."""
    return lambda entry: 1.0 if first(_recipe(entry)) else 0.0 if second(_recipe(entry)) else None


def _prefixes(of: Condition) -> Placement:
    """Student against teacher prefixes, of one kind of run."""
    places = {"student": 1.0, "teacher": 0.0}
    return lambda entry: places.get(_writer(_recipe(entry))) if of(_recipe(entry)) else None


def _cost(is_cached: bool) -> Placement:
    """Teacher prefixes, with or without a cache, against student prefixes."""
    places = {("teacher", is_cached): 1.0, ("student", False): 0.0}
    return lambda entry: places.get(
        (_recipe(entry).objective.prefix, _recipe(entry).teacher.cache is not None)
    )


def _window(of: Condition) -> Placement:
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
    return Comparison(
        place, (*PREFIX, *KL), f"GRPO from DAgger and from {METHODS[key].name} runs", of_rl=True
    )


ENTROPY, COST = "entropy before the answer", "operations a step"
ABOVE_TEACHER = "entropy above the teacher's"
DIRECTIONS = Comparison(_sides(REVERSE, FORWARD), KL, "runs with reverse and with forward KL")
EQUAL_STEPS = Comparison(
    _prefixes(lambda recipe: recipe.train.flops is None),
    PREFIX,
    "runs with student and with teacher prefixes",
)
EQUAL_COST = Comparison(
    _prefixes(lambda recipe: recipe.train.flops is not None),
    # The warm-up follows the number of steps, by default.
    (*PREFIX, Role.LENGTH, Role.WARM_UP),
    "runs with student and with teacher prefixes and train.flops set",
)
CACHED = Comparison(_cost(True), PREFIX, "runs with student and with cached teacher prefixes")
LIVE = Comparison(
    _cost(False), PREFIX, "runs with student and with teacher prefixes, without a cache"
)
WINDOWS = Comparison(
    _window(lambda _: True), ("window.tokens",), "runs with two lengths of fixed windows"
)
OPD_WINDOWS = Comparison(
    _window(_is_cell("opd")), ("window.tokens",), "OPD runs with two lengths of fixed windows"
)
OPD_TEACHER = OPD_WINDOWS._replace(
    needs="OPD runs and an evaluation of their teacher with the same settings",
    contrast="top",
    reference="teacher",
)
OPD_ALONE = OPD_WINDOWS._replace(needs="OPD runs", contrast="top")
MOSTLY_FORWARD = Comparison(
    _sides(MIXED, REVERSE),
    KL,
    "runs with a constant forward weight from 0.8 to below 1 and with reverse KL",
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
    of_rl=True,
    reference="start",
)
RL_GAIN = Comparison(
    _entropy,
    ("objective", "weight_schedule", "window", "teacher", Role.LENGTH, Role.WARM_UP, Role.BUDGET),
    "GRPO from three or more runs of a seed, all evaluated with the same settings",
    contrast="slope",
    of_rl=True,
    reference="start",
    per=" by a nat of the start's entropy",
)
ROWS = (
    Question(
        "accuracy-entropy: accuracy",
        DIRECTIONS,
        "Avg",
        1,
        "Reverse KL is more accurate than forward KL.",
    ),
    Question(
        "accuracy-entropy: entropy",
        DIRECTIONS,
        ENTROPY,
        -1,
        "Reverse KL leaves less entropy than forward KL.",
    ),
    Question(
        *("accuracy-entropy: coverage", DIRECTIONS, "Pass@k", -1),
        "Reverse KL solves fewer problems in k tries: what low entropy would cost, though the "
        "paper does not claim it.",
    ),
    Question(
        *("cooling control: accuracy", DIRECTIONS, "Avg", 1),
        "Reverse KL is more accurate than forward KL that is sampled colder: it does more than "
        "cool.",
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
    Question(
        "quality-compute: cost, cached",
        CACHED,
        COST,
        -1,
        "A step is cheaper with cached teacher prefixes.",
        1,
    ),
    Question(
        *("quality-compute: cost, live", LIVE, COST, -1),
        "A step is cheaper with teacher prefixes even without a cache: the paper's saving rests "
        "on one.",
        1,
    ),
    Question(
        *("quality-compute: equal operations", EQUAL_COST, "Avg", -1),
        "For the same operations teacher prefixes are the better buy: what their price suggests; "
        "the paper compares equal steps.",
    ),
    Question(
        "accuracy-stability: accuracy", WINDOWS, "Avg", 1, "A longer window is more accurate."
    ),
    Question(
        "accuracy-stability: length",
        OPD_WINDOWS,
        "length",
        1,
        "OPD with a longer window writes longer responses.",
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
        "OPD with the longest window ends with less entropy than the teacher has on the same "
        "tokens.",
    ),
    Question(
        *("forward weight >= 0.8: accuracy", MOSTLY_FORWARD, "Avg", 1),
        "A forward weight of at least 0.8 is safe: it costs less than 1 point of accuracy "
        "against reverse KL.",
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
    Question(
        "forward weight: entropy", WEIGHTS, ENTROPY, 1, "Entropy grows with the forward weight."
    ),
    Question(
        "curriculum: accuracy",
        GATED,
        "Avg",
        1,
        "An entropy-gated window is more accurate than a fixed one.",
    ),
    Question(
        "curriculum: length",
        GATED,
        "length",
        -1,
        "An entropy-gated window writes shorter responses.",
    ),
    *(
        Question(
            *(f"RL: DAgger or {METHODS[key].name} start", _starts(key), "Avg", 1),
            f"GRPO ends more accurate from a DAgger start than from one by {METHODS[key].name}.",
        )
        for key in ("sft", "offline-rl", "opd")
    ),
    Question("RL: OPD start", RL_OPD, "Avg", -1, "GRPO from an OPD start loses accuracy."),
    Question(
        "RL: entropy of the start",
        RL_GAIN,
        "Avg",
        1,
        "GRPO gains more from starts with more entropy.",
    ),
)
# Questions about accuracy are asked a second time, of cooled responses.
QUESTIONS = tuple(
    question._replace(cooled="all", name=f"{question.name}, cooled") if is_again else question
    for question in ROWS
    for is_again in (
        (False, True) if question.metric == "Avg" and question.cooled == "none" else (False,)
    )
)
