"""Rows of evaluations, and a study's plan: the fields that writers give and readers find.

They are described as those of `potstill.runs.schema`. Needs no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

# The names by which a reader may ask for an estimate, or for a column of problems.
EvalEstimate = Literal["avg", "entropy_before_answer", "length", "truncation"]
ProblemColumn = Literal[
    "score", "num_correct", "length", "length_to_answer", "truncation", "entropy_before_answer"
]
# Keys that tell one evaluation of a run from another.
EVAL_KEYS = ("step", "temperature", "settings")
# Keys of an evaluation that its readers need.
EVAL_COLUMNS = (
    "model",
    "temperature",
    "num_problems",
    "num_responses",
    "avg",
    "pass",
    "levels",
    "problems",
    "settings",
)
# [value, low, high]
Interval = Sequence[float]

# The functional form, since `pass` is a keyword.
Accuracy = TypedDict("Accuracy", {"avg": Interval, "pass": Mapping[str, Interval]})
"""The mean score of a response, and by each k up to n the unbiased share of problems that one of k
responses solves (Pass@k)."""


class Estimates(Accuracy):
    """Estimates, each as [value, low, high] of the 95 % bootstrap interval over problems."""

    num_problems: int
    num_responses: int
    """How many problems there were, and how many responses to each."""
    majority: Interval
    """The score of each problem's most common answer."""
    answered: Interval
    """Share of responses that give an answer."""
    entropy: Interval
    entropy_before_answer: Interval
    """Token entropy in nats, of the distribution sampled from: over all tokens, and over those up
    to the first final answer."""
    length: Interval
    length_to_answer: Interval
    """Tokens of a response: all, and those up to the first final answer."""
    truncation: Interval
    """Share of responses that reached `max_tokens`."""
    repetition: Interval
    """Share of responses that are loops."""
    zlib_ratio: Interval
    """How many times smaller zlib makes a response."""


class ProblemColumns(TypedDict):
    """`problems`: one value a problem in each column, means over its responses."""

    id: list[str]
    """Names, each of one problem."""
    score: list[float]
    """Mean score."""
    num_correct: list[int]
    """How many responses are right."""
    length: list[float]
    length_to_answer: list[float]
    """Tokens."""
    truncation: list[float]
    """Share of responses that reached `max_tokens`."""
    entropy: list[float]
    entropy_before_answer: list[float]
    """Token entropy in nats."""


class Measures(Estimates):
    """Measurements of the responses at one temperature."""

    levels: dict[str, Accuracy]
    """`avg` and `pass` of each difficulty level."""
    problems: ProblemColumns
    """One value a problem."""
    notes: dict[str, int]
    """How often grading noted what, such as `timeout`."""
    num_tokens: int
    """Tokens of all responses."""


class EvalRow(Measures):
    """The results of a model at one temperature; `potstill evaluate --out` writes a list of
    them."""

    model: str
    """The model's name."""
    temperature: float
    """The sampling temperature."""
    seconds: float
    """Seconds that it took."""
    settings: dict[str, Any]
    """The recipe's section `evaluation` without `temperatures`; `end_ids`, the end set; and
    `source_sha256`, the checksum of a task of your own."""


class RunEvalRow(EvalRow):
    """The results of a run's student at one temperature."""

    step: int
    """How many steps the student had learnt."""


class PlanRun(TypedDict):
    """`runs`: a run of a study, or an evaluation without one."""

    folder: str
    """Its run folder or evaluation file, in the study's folder."""
    name: str
    """The name that the report gives it."""
    state: str
    """How far it was when last seen: `done`, `unfinished`, `not begun`, or `crashed:` and why."""


class PlanPanel(TypedDict):
    """`panels`: runs of a study that can be compared with each other."""

    title: str
    note: str
    """Title and note, as the report shows them."""
    is_sweep: bool
    """Whether its runs only decide what the others do."""
    runs: list[PlanRun]
    """Its runs."""


class StudyPlan(TypedDict):
    """Panels and runs of a study, and how far each is."""

    panels: list[PlanPanel]
    """The study's panels, sweeps last."""
