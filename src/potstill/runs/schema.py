"""Rows of a run's logs: the fields that writers give and readers find.

A docstring below a group of fields says what they hold; `docs/run_folder.md` shows the groups as
tables. A field that not every row has is `NotRequired`. Needs no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict, get_args, overload

from potstill.runs.results_schema import (
    EvalEstimate,
    EvalRow,
    Interval,
    ProblemColumn,
    ProblemColumns,
)
from potstill.types import Stop, Writer

TokenMean = Literal["forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"]
EntropyBeforeAnswer = Literal["student_entropy_before_answer", "teacher_entropy_before_answer"]
FlopsPart = Literal["rollout", "probe", "teacher", "student_forward", "student_backward", "head"]
TimedPart = Literal[
    "probe_seconds",
    "rollout_seconds",
    "teacher_seconds",
    "student_seconds",
    "samples_seconds",
    "grading_seconds",
]
# The numbers of a step by which a reader may ask for them: see `value_in`.
StepNumber = (
    Literal[
        "step",
        "loss",
        "grad_norm",
        "lr",
        "window",
        "length",
        "truncation",
        "zlib_ratio",
        "num_loss_tokens",
    ]
    | Literal["total_flops", "forward_weight", "seconds"]
    | Literal["reward", "groups_with_signal", "clipped", "start_kl"]
    | Literal["engine_mismatch_mean_abs", "engine_mismatch_max", "left_out"]
    | TokenMean
    | EntropyBeforeAnswer
    | TimedPart
)

# The same of a logged rollout.
TokenNumber = Literal["loss"] | TokenMean
ChoicesName = Literal["student_choices", "teacher_choices"]

GateAction = Literal["climb", "hold", "freeze", "step back"]
# [text, probability]
Choice = list[str | float]

# Where a step's operations go.
FLOPS_PARTS: tuple[FlopsPart, ...] = get_args(FlopsPart)


class Flops(TypedDict):
    """`flops`: floating-point operations of a step by part, over all ranks."""

    rollout: float
    probe: float
    """Writing the rollouts, and what the length gate's probe took."""
    teacher: float
    """The forward passes of the teacher, and of the student as it was at first."""
    student_forward: float
    student_backward: float
    """The student's passes."""
    head: float
    """The output layers of both models."""


class TokenMeans(TypedDict):
    """Means over loss tokens, in nats a token; null where there was no such token."""

    forward_kl: NotRequired[float | None]
    reverse_kl: NotRequired[float | None]
    """KL(teacher ‖ student) and KL(student ‖ teacher) in nats a token, where the teacher's signal
    tells them."""
    student_entropy: NotRequired[float | None]
    teacher_entropy: NotRequired[float | None]
    """Token entropies in nats; a teacher's where its signal tells it."""
    student_entropy_before_answer: NotRequired[float | None]
    teacher_entropy_before_answer: NotRequired[float | None]
    """The same over the tokens up to the first final answer; null where no loss token is among
    them."""


class WriterMeans(TokenMeans):
    """`by_writer`: means over the tokens that one writer wrote, and over the rollouts that it wrote
    last in."""

    num_loss_tokens: int
    """How many loss tokens this writer wrote."""
    length: float | None
    truncation: float | None
    zlib_ratio: float | None
    """As for the whole step; null where it wrote last in no rollout."""


class TeacherMeans(TypedDict):
    """`by_teacher`: means over the tokens that one of several teachers taught."""

    num_loss_tokens: int
    """How many loss tokens it taught."""
    forward_kl: float | None
    reverse_kl: float | None
    """KL(teacher ‖ student) and KL(student ‖ teacher) in nats a token; null without such a
    token."""


class RolloutMeans(TypedDict):
    """Means over the rollouts of a step, and how many tokens they train."""

    length: float
    """Mean length of a completion, in tokens."""
    truncation: float
    """Share of completions that the window cut."""
    zlib_ratio: float
    """How many times smaller zlib makes a response, on average; above 10 for a loop."""
    num_loss_tokens: int
    """How many loss tokens the step had."""


class StepMeans(TokenMeans, RolloutMeans):
    """Means of a step."""

    loss: float
    """The loss that the step's gradient is of; a KL in nats a loss token."""
    student_share: NotRequired[float]
    """Mixed prefixes: the share of loss tokens that the student wrote."""
    by_writer: NotRequired[dict[Writer, WriterMeans]]
    """Mixed prefixes: the means of each writer's tokens, and of the rollouts that it wrote last
    in."""


class Update(TypedDict):
    """One update of the optimiser."""

    grad_norm: float
    """Norm of the gradient before it was clipped."""
    lr: float
    """Learning rate."""


class EndHabits(TypedDict):
    """`end_habits`: how likely each end token is to both models where completions end."""

    ends_of: str
    num_ends: int
    """Whose completions were looked at, and how many of them ended."""
    student: NotRequired[dict[str, float]]
    teacher: NotRequired[dict[str, float]]
    """Mean probability of each end token by name, where a completion ended and the model is
    known."""


class Rewards(TypedDict):
    """Scores of a step's responses, where they are scored."""

    reward: NotRequired[float]
    reward_std: NotRequired[float]
    """Mean score of a response, and the standard deviation."""
    groups_with_signal: NotRequired[float]
    """Share of groups whose responses differ in score."""
    clipped: NotRequired[float]
    """`rollouts.reuse` above 1: share of tokens whose policy gradient is clipped."""
    start_kl: NotRequired[float]
    """KL(student ‖ start) in nats a token, where it has a weight."""


class OfWriter(TypedDict):
    """Cached prefixes of a student: how far it is from the one that learns."""

    writer_age: NotRequired[int]
    """Steps since the student that wrote the cache; since the run's start where it is of no run
    that led here."""
    writer_log_ratio_mean: NotRequired[float]
    writer_log_ratio_max: NotRequired[float]
    """Its log-probability of what it wrote minus today's student's, in nats a token: the mean, an
    estimate of KL(writer ‖ student), and the largest without sign."""


class Spans(TypedDict):
    """`signal = "spans"`: what stands between two places where both tokenizers cut a text."""

    span_log_ratio: NotRequired[float]
    span_tokens: NotRequired[float]
    """Means over spans: log q - log p in nats, and the student's tokens."""
    left_out: NotRequired[float]
    """Share of completion tokens that are in no span and have no loss."""


class StepExtras(Rewards, OfWriter, Spans):
    """Numbers that only some objectives or models have."""

    forward_weight: NotRequired[float]
    """`kl = "mixed"`: the weight of the forward KL."""
    engine_mismatch_mean_abs: NotRequired[float]
    engine_mismatch_max: NotRequired[float]
    """`rollouts.engine = "vllm"`, new rollouts: the difference of the engine's and the trainer's
    log-probabilities of what the student wrote, in nats a token without sign; mean and largest."""
    by_teacher: NotRequired[dict[str, TeacherMeans]]
    """Several teachers: the means of the tokens that each taught."""
    end_habits: NotRequired[EndHabits]
    """Several end tokens: how likely each is to both models where completions end."""


class StepMetrics(StepMeans, Update, StepExtras):
    """A step of training."""

    step: int
    """Number of the step, from 1."""
    prefix: str
    """The recipe's `objective.prefix`."""
    rollout_age: int
    """How many steps the rollouts had served before."""
    window: int
    """The window, in tokens."""
    flops: Flops
    """Floating-point operations of the step, by part."""
    total_flops: float
    """Floating-point operations of the run so far."""


class Timing(TypedDict):
    """Seconds of a step."""

    seconds: float
    """The whole step."""
    probe_seconds: NotRequired[float]
    rollout_seconds: NotRequired[float]
    teacher_seconds: NotRequired[float]
    student_seconds: NotRequired[float]
    samples_seconds: NotRequired[float]
    grading_seconds: NotRequired[float]
    """The parts that the step had."""


class MetricsRow(StepMetrics, Timing):
    """A row of `metrics.jsonl`."""


class Quality(TypedDict):
    """Both models on prompts, each number as [value, low, high] of its 95 % bootstrap interval."""

    teacher_prefix_forward_kl: NotRequired[Interval]
    teacher_prefix_reverse_kl: NotRequired[Interval]
    """KL(teacher ‖ student) and KL(student ‖ teacher) on the teacher's text, in nats a token."""
    student_prefix_forward_kl: NotRequired[Interval]
    student_prefix_reverse_kl: NotRequired[Interval]
    """The same on the student's text."""
    student_perplexity: NotRequired[Interval]
    """Perplexity of the teacher's text under the student."""
    teacher_log_prob: NotRequired[Interval]
    """Log-probability of the student's text under the teacher, in nats a token."""
    student_entropy_before_answer: NotRequired[Interval]
    teacher_entropy_before_answer: NotRequired[Interval]
    """Token entropies on the student's text up to its first answer or stop, in nats."""
    length: NotRequired[Interval]
    truncation: NotRequired[Interval]
    repetition: NotRequired[Interval]
    """Tokens of the student's text, the share that is cut, and the share that is a loop."""
    score: NotRequired[Interval]
    judged: NotRequired[Interval]
    """Score of the student's text by the task, where the prompts are one's, and by a judge."""
    teacher_length: NotRequired[Interval]
    teacher_truncation: NotRequired[Interval]
    teacher_repetition: NotRequired[Interval]
    """Tokens of the teacher's text, the share that is cut, and the share that is a loop."""


class ValidationRow(Quality):
    """A validation: both models on prompts that are not trained on."""

    step: int
    """Steps of the student that was validated; 0 before the first."""
    num_prompts: int
    max_tokens: int
    """How many prompts, and the length cap of what is written to them."""
    seconds: float
    """Seconds of the validation, which are in no step's."""


class SamplePrompt(TypedDict):
    """Whose rollout it is."""

    prompt_id: str
    prompt: str
    """The prompt's id, and the text that the student read."""
    teacher_prompt: NotRequired[str]
    """The text that the teacher read, where it is another."""
    score: NotRequired[float]
    advantage: NotRequired[float]
    """The response's score, and its advantage over its group."""


class SampleNumbers(TypedDict):
    """One number a loss token, in nats; both models as they are at `temperature`."""

    loss: NotRequired[list[float]]
    """The loss of each loss token, in nats for a KL, but for the returns of `gamma`."""
    forward_kl: NotRequired[list[float]]
    reverse_kl: NotRequired[list[float]]
    """KL(teacher ‖ student) and KL(student ‖ teacher) of each loss token in nats, end ids merged as
    in the loss; lower bounds where `kept` is a number."""
    student_entropy: NotRequired[list[float]]
    teacher_entropy: NotRequired[list[float]]
    """Token entropies of each loss token in nats, end ids merged as in the loss."""


class SampleChoices(TypedDict):
    """The likeliest tokens at each loss token."""

    student_choices: list[list[Choice]]
    """The student's likeliest tokens at each loss token as [text, probability], no ids merged."""
    teacher_choices: NotRequired[list[list[Choice]]]
    """The teacher's, where its distribution is known."""


class Sample(SamplePrompt, SampleNumbers, SampleChoices):
    """One rollout, token by token."""

    tokens: list[str]
    """Texts of the completion's tokens."""
    writers: list[list[Writer | int]]
    """Who wrote them, as runs of [writer, number of tokens]."""
    stop: Stop
    """Whether it ended or the window cut it."""
    trained: list[bool]
    """Which tokens are loss tokens."""
    temperature: float
    """The temperature of the models' distributions: 1, unless a cache knows another alone."""
    kept: int | None
    """How many of the teacher's likeliest tokens are known; null where all are, or none."""


class SampleRow(Sample):
    """A rollout that the run logged, token by token."""

    step: int
    """The step that it was of."""


class GateDecision(TypedDict):
    """A decision of the length gate, and what its probe showed."""

    action: GateAction
    """Decision of the length gate."""
    window: int
    """The window from now on, in tokens."""
    failed: list[str]
    """The gates that failed: `entropy`, `truncation`, `repetition`."""
    threshold: float
    """The least entropy that passes, in nats."""
    entropy: float
    """The student's token entropy up to the first final answer, in nats."""
    teacher_entropy: float | None
    """The teacher's on the same tokens, in nats; null where the threshold needs none."""
    truncation: float
    teacher_truncation: float
    """Share of the student's responses that the window cut, and of the teacher's."""
    repetition: float
    """Share of the student's responses that are loops."""


class WindowRow(GateDecision):
    """A decision of the length gate, and what its probe showed."""

    step: int
    """The step that it came before, from 1."""


@overload
def value_in(row: StepMetrics, name: StepNumber) -> float | None: ...
@overload
def value_in(row: EvalRow, name: EvalEstimate) -> Interval | None: ...
@overload
def value_in(row: ProblemColumns, name: ProblemColumn) -> Sequence[float] | None: ...
@overload
def value_in(row: Sample, name: TokenNumber) -> list[float] | None: ...
@overload
def value_in(row: Sample, name: ChoicesName) -> list[list[Choice]] | None: ...
def value_in(row: Mapping[str, Any], name: str) -> Any:
    """A row's value under a name that is chosen at run time or that not every row has; None where
    it has nothing."""
    return row.get(name)


def quantity_in(row: Quality, name: str) -> Interval | None:
    """A quantity of a validation by its name; None where it was not known."""
    found: Mapping[str, Any] = row
    return found.get(name)
