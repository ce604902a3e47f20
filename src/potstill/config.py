"""The recipe: one frozen schema for everything a run does, read from one TOML file plus dotted overrides.

Every field is read by the mode that the recipe chooses, or it may not be set: `unread_fields` is the one place that
says which field needs which mode.
"""

import copy
import functools
import hashlib
import itertools
import json
import math
import tomllib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from potstill.names import nearest_field
from potstill.printable import printable


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one line and says what to do."""


class Method(NamedTuple):
    prefix: Literal["teacher", "student"]
    kl: Literal["forward", "reverse"]
    name: str
    advice: str
    trl: str


# The four corners of the grid, by the name that `--method` takes.
METHODS: dict[str, Method] = {
    "sft": Method(
        "teacher",
        "forward",
        "SFT",
        "soft targets: the cheapest and safest start; keeps the teacher's variety",
        "GKDConfig(lmbda=0, seq_kd=True, beta=0)",
    ),
    "dagger": Method(
        "student",
        "forward",
        "DAgger",
        "repairs the student's own mistakes; keeps entropy for RL",
        "DistillationConfig(beta=0)",
    ),
    "offline-rl": Method(
        "teacher",
        "reverse",
        "Offline RL",
        "sharpens on the teacher's text; the gradient of no sequence KL",
        "GKDConfig(lmbda=0, seq_kd=True, beta=1)",
    ),
    "opd": Method(
        "student",
        "reverse",
        "OPD",
        "best Avg@k a step in the paper; watch entropy and length",
        "DistillationConfig(beta=1)",
    ),
}


NonNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# numpy and torch take no other seeds.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# AdamW computes with ten times the rate in float32.
LARGEST_RATE = 1e30
# What no run can reach; a list of that many would fill the memory before the first step.
MANY, MANY_AT_ONCE = 10**9, 10**6
# Of logits near 30, float32 rounding is 2e-6: divided by less than this it would be a share of a nat.
COLDEST = 1e-4


def _drawable(temperature: float) -> float:
    if not (temperature == 0 or temperature >= COLDEST):
        raise ValueError(f"it must be 0, which is greedy, or at least {COLDEST:g}")
    return temperature


Temperature = Annotated[float, AfterValidator(_drawable)]


def _storable(arguments: dict[str, Any]) -> dict[str, Any]:
    """Refuse what a recipe's file cannot say, or a chat template's process cannot be told."""
    for name, value in arguments.items():
        for item in _items(value):
            is_plain = isinstance(item, str | int) or (isinstance(item, float) and math.isfinite(item))
            if isinstance(item, dict):
                _storable(item)
            elif not is_plain:
                raise ValueError(
                    f"{name!r} is {shown(item)}; give texts, numbers, true or false, and lists or tables of these"
                )
    return arguments


Arguments = Annotated[dict[str, Any], AfterValidator(_storable)]
AnySection = TypeVar("AnySection", bound=BaseModel)
AnyRecipe = TypeVar("AnyRecipe", bound="RunRecipe")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def __init__(self, /, **fields: Any) -> None:
        """A section from Python. Raises RecipeError with one line."""
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise RecipeError(_describe(error.errors()[0], type(self))) from None

    # Inner sections are validated by the outer one, which knows their place.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    @field_validator("*", mode="before")
    @classmethod
    def _typed_as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what would be read as a value of another type: true is no 1, and "2" is no 2."""
        types = _plain_types(cls, str(info.field_name))
        wanted = next((word for kind, word in WORDS.items() if kind in types), None)
        if wanted is not None and not all(_is_typed(item, types) for item in _items(value)):
            raise PydanticCustomError("type_as_written", f"Input should be a valid {wanted}")  # pyright: ignore
        return value


WORDS = {int: "integer", float: "number", bool: "boolean, true or false"}


def _is_typed(value: Any, types: frozenset[type]) -> bool:
    """Whether a plain value is of one of these types; whole numbers are numbers, and others are judged later."""
    return type(value) not in (bool, str, int) or type(value) in types or (type(value) is int and float in types)


def _items(value: Any) -> list[Any]:
    """A value, or those of nested lists."""
    return [item for each in value for item in _items(each)] if isinstance(value, list | tuple) else [value]


@functools.cache
def _plain_types(section: type[BaseModel], field: str) -> frozenset[type]:
    """The types that a field's annotation is made of; those of the texts and numbers that it lists."""

    def leaves(annotation: Any) -> list[type]:
        inner = get_args(annotation)
        if not inner:
            return [annotation if isinstance(annotation, type) else type(annotation)]
        return [leaf for each in inner for leaf in leaves(each)]

    return frozenset(leaves(section.model_fields[field].annotation))


class StudentSpec(Section):
    model: str = "potstill:base"
    """Folder or hub id of a Hugging Face causal LM; potstill:base is the shipped one."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: the model's configuration and tokenizer with fresh weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained weights. In bfloat16 small updates are rounded away, which is warned of; for its speed keep
    float32 and set train.compute_dtype."""
    dropout: bool = False
    """Train with the dropout that the model's configuration has. Without it the loss is of the same distribution that
    writes the student's completions and that is evaluated."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings."""


class TeacherSpec(Section):
    model: str = "potstill:teacher"
    """Folder or hub id of a Hugging Face causal LM; potstill:teacher is the shipped one; self is the student as it was
    before the first step, or at the last refresh."""
    refresh_steps: int | None = Field(default=None, ge=1)
    """model = self: copy the student's weights into the teacher every so many steps; never by default."""
    template: Literal["chat", "raw"] | None = None
    """Render the teacher's prompts with its own chat template, or take them as they are; by default it reads the
    student's prompts."""
    prompt_column: str | None = None
    """Column of a file or hub data set with what the teacher is asked instead, such as the prompt and a hint."""
    cache: str | None = None
    """Folder that `potstill cache build` wrote: completions and signal come from it, and the teacher is not loaded."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the teacher's weights."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings."""


class Data(Section):
    source: str | tuple[str, ...] = "multiplication"
    """A task (multiplication, columns:SETTING, reasoning-gym:NAME), a file (.jsonl, .json, .csv, .parquet, or these and
    .gz), a pattern of files, a hub data set or a folder of one; or a list of files and data sets."""
    split: str = "train"
    """Split of a task or hub data set."""
    config: str | None = None
    """Configuration of a hub data set or folder that has several."""
    num_prompts: int | None = Field(default=None, ge=1, le=10**8)
    """How many prompts to take; all of a file by default, 4096 of a task."""
    prompt_column: str = "prompt"
    """Column of a file or hub data set that holds the prompt."""
    template: Literal["chat", "raw"] | None = None
    """Render prompts with the chat template or take them as they are; by default chat for messages, raw for strings.
    What the template reads beside the messages is said by data.template_arguments.NAME."""
    template_arguments: Arguments = {}
    """What the chat templates of student and teacher are told, such as {enable_thinking = false}."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """The most tokens of a prompt; by default what the context leaves beside the completion."""
    too_long: Literal["refuse", "drop", "cut-left"] = "refuse"
    """What becomes of prompts that are too long: the run is refused, they are left out, or they lose their first
    tokens."""
    seed: Seed = 0
    """Seed of a task's problems."""


class Objective(Section):
    prefix: Literal["teacher", "student", "dataset", "mixed"] = "teacher"
    """Who writes the tokens that both models are conditioned on. No gradient goes through them."""
    mix_unit: Literal["sequence", "handoff", "token"] = "sequence"
    """prefix = mixed: whole rollouts by one model each; one model begins and the other goes on; or token by token."""
    student_share: float = Field(default=0.5, ge=0, le=1)
    """mixed by sequence: the exact share of rollouts by the student; mixed by token: the weight of its distribution."""
    first_writer: Literal["teacher", "student"] = "teacher"
    """mixed by handoff: who begins."""
    handoff_tokens: tuple[int, int] = (8, 64)
    """mixed by handoff: the first writer's tokens, drawn evenly from this range (both ends included)."""
    kl: Literal["forward", "reverse", "mixed", "jsd", "skew-forward", "skew-reverse"] = "forward"
    """forward: KL(teacher || student); reverse: KL(student || teacher); mixed: their linear mixture; jsd: the
    generalised Jensen-Shannon divergence; skew-forward, skew-reverse: each KL to a mixture of both (DistiLLM)."""
    forward_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the forward KL in kl = mixed, or what its schedule (section mixing) begins with."""
    forward_above: float | None = Field(default=None, ge=0)
    """kl = mixed: only where the teacher's entropy (nats) is above this; elsewhere all weight is the reverse KL's."""
    jsd_weight: float = Field(default=0.5, gt=0, lt=1)
    """kl = jsd: the teacher's weight in the mixture that both models are compared with."""
    skew: float = Field(default=0.1, gt=0, lt=1)
    """kl = skew-forward, skew-reverse: how much of the first model is mixed into the second."""
    gamma: float = Field(default=0.0, ge=0, le=1)
    """Student prefixes and reverse KL: how much of the later tokens' KL each written token answers for. 0: the local
    gradient; 1: that of the whole sequence's KL."""
    split: int | None = Field(default=None, ge=1)
    """A position in the completion: tokens before it and tokens from it on have weights of their own."""
    split_weights: tuple[NonNegative, NonNegative] = (1.0, 1.0)
    """Weights of the loss before the split and from it on."""
    temperature: float = Field(default=1.0, ge=COLDEST)
    """Divides both models' logits in the loss; sampling has its own."""
    signal: Literal["full", "topk", "sampled", "labels"] = "full"
    """full: the exact KL over the whole vocabulary; topk: the exact KL between the teacher's top_k tokens and one class
    for the rest; sampled: an estimate from the teacher's log-probability of each token that the student wrote; labels:
    cross-entropy on the written tokens, without a teacher."""
    top_k: int = Field(default=64, ge=1)
    """signal = topk: how many of the teacher's likeliest tokens are kept apart."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """signal = sampled: k1 = log q/p as a constant reward and k2 = (log q/p)^2 / 2 have the reverse KL's gradient in
    expectation, k3 = p/q - 1 - log p/q has the forward KL's."""
    baseline: Literal["none", "exact"] = "none"
    """estimator = k1: subtract the reward's exact mean, minus the reverse KL; that needs the teacher's whole output."""
    end_class: Literal["merged", "raw"] = "merged"
    """merged: where the two models' end tokens are more than one, they count as one class in the loss, so that either
    may end a text in its own way; raw: each is a token like others."""
    separate_ends: tuple[str, ...] | None = None
    """end_class = merged: end tokens that mean something else than the end of an answer, as the tokenizer names them.
    They end a completion and have no part in the class. By default those that are known to hand over to a tool, such as
    <|eom_id|> and <|call|>; a list takes their place."""

    @property
    def name(self) -> str:
        """The method's name: a corner of the grid, or what lies between with its weights."""
        if self.signal == "labels":
            return f"Hard-label SFT ({self.prefix} prefix)"
        details = [f"top {self.top_k}"] if self.signal == "topk" else []
        details += [self.estimator] if self.signal == "sampled" else []
        details += [f"gamma {self.gamma:g}"] if self.gamma else []
        if self.split is not None:
            details.append(f"split at {self.split}: {self.split_weights[0]:g}, {self.split_weights[1]:g}")
        for method in METHODS.values():
            if (self.prefix, self.kl) == (method.prefix, method.kl):
                return method.name + (f" ({', '.join(details)})" if details else "")
        kl: str = self.kl
        if self.kl == "mixed":
            kl = f"{self.forward_weight:g} forward + {1 - self.forward_weight:g} reverse"
            kl += "" if self.forward_above is None else f" above {self.forward_above:g} nats"
        elif self.kl == "jsd":
            kl = f"jsd {self.jsd_weight:g}"
        elif self.kl.startswith("skew"):
            kl = f"{self.kl} {self.skew:g}"
        prefix: str = self.prefix
        if self.prefix == "mixed" and self.mix_unit == "handoff":
            prefix = f"{self.first_writer} first for {self.handoff_tokens[0]}-{self.handoff_tokens[1]} tokens"
        elif self.prefix == "mixed":
            prefix = f"{self.student_share:g} student by {self.mix_unit}"
        return f"Hybrid({'; '.join([f'{prefix} / {kl}', *details])})"


class Mixing(Section):
    """How the forward weight of kl = "mixed" changes over a run, from objective.forward_weight on."""

    schedule: Literal["constant", "linear", "cosine", "steps", "entropy"] = "constant"
    """linear, cosine: to end_weight; steps: as at_steps says; entropy: up when the student's entropy before the answer
    falls below a floor, down when it is above."""
    end_weight: float = Field(default=0.0, ge=0, le=1)
    """linear, cosine: the forward weight at the end."""
    over_steps: int | None = Field(default=None, ge=1)
    """linear, cosine: steps until end_weight is reached; all steps of the run by default."""
    at_steps: tuple[tuple[int, float], ...] = ()
    """steps: pairs (step, forward weight); each weight holds from its step on."""
    reference: Literal["first", "absolute", "teacher"] = "first"
    """entropy: the floor is a share of the first step's entropy, a number of nats, or a share of the teacher's entropy
    on the same tokens."""
    floor: float = Field(default=0.5, gt=0)
    """entropy: below this the weight rises."""
    band: float = Field(default=0.1, ge=0)
    """entropy: the weight falls only above floor + band, so that it does not swing."""
    rate: float = Field(default=0.02, gt=0, le=1)
    """entropy: the most that the weight changes in a step."""
    bounds: tuple[float, float] = (0.0, 1.0)
    """entropy: the smallest and the largest weight."""


class Sampling(Section):
    temperature: Temperature = 1.0
    """0 is greedy. 1 with no truncation samples exactly from the model."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the smallest set of tokens with at least this mass."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    batch_size: int = Field(default=64, ge=1)
    """Rows decoded together. It changes a model's numbers by rounding alone, and so a token once in very many."""


class Rollouts(Section):
    reuse: int = Field(default=1, ge=1)
    """Optimiser steps that each set of rollouts serves. Their age in steps is logged."""
    end_set: Literal["union", "student"] = "union"
    """What ends a completion, in training, evaluation and the exported model. union: any end token of student or
    teacher; student: the student's own alone, which is how a mismatch of end tokens drives responses to the length
    cap."""


class Window(Section):
    tokens: int = Field(default=128, ge=1)
    """Completion length cap in training, the largest that a schedule reaches. Stops beyond it are not learnt."""
    schedule: Literal["fixed", "linear", "entropy-gated"] = "fixed"
    """fixed: always `tokens`; linear: from `start` to it; entropy-gated: up a ladder while probes of the student
    pass."""
    start: int = Field(default=128, ge=1)
    """linear, entropy-gated: the first window; at most `tokens`."""
    over_steps: int | None = Field(default=None, ge=1)
    """linear: steps until the window is `tokens`; all steps of the run by default."""
    ladder: tuple[int, ...] | None = None
    """entropy-gated: the windows after `start`, growing, the last one `tokens`; doubling by default."""
    check_every: int = Field(default=50, ge=1)
    """entropy-gated: steps between probes. The first is before the first step."""
    num_probes: int = Field(default=64, ge=1)
    """entropy-gated: prompts of the data that are held out and written to by the student at each probe."""
    patience: int = Field(default=2, ge=1)
    """entropy-gated: probes in a row that must pass before the window grows."""
    reference: Literal["first", "absolute", "teacher"] = "first"
    """entropy-gated: the threshold is a share of the first probe's entropy, a number of nats, or a share of the
    teacher's entropy on the same tokens."""
    threshold: float = Field(default=0.5, ge=0)
    """entropy-gated: a probe fails when the student's entropy, up to the first answer or stop, is below this."""
    max_truncation: float = Field(default=0.3, ge=0, le=1)
    """entropy-gated: a probe fails when more responses than this are cut, beyond the share that the teacher's are."""
    max_repetition: float = Field(default=0.02, ge=0, le=1)
    """entropy-gated: a probe fails when more responses than this are loops (zlib makes them ten times smaller)."""
    sticky: bool = True
    """entropy-gated: after a failed probe the window never grows again; else it can when probes pass again."""
    step_back: bool = False
    """entropy-gated: a failed probe takes the window one step down the ladder."""


def _few(fields: dict[str, Any]) -> int:
    """The warm-up of a run that does not say."""
    return min(10, fields.get("steps", 0) // 10)


class Train(Section):
    steps: int = Field(default=120, ge=1, le=MANY)
    """Optimiser updates, at most."""
    flops: float | None = Field(default=None, gt=0)
    """End the run with the step that brings the operations of rollouts, teacher and student to this number."""
    prompts_per_step: int = Field(default=48, ge=1, le=MANY_AT_ONCE)
    """Prompts (and rollouts) of one update, over all ranks."""
    tokens_per_batch: int = Field(default=4096, ge=1)
    """Padded tokens of one forward-backward slice on one rank. Gradients depend on it by rounding alone."""
    lr: float | None = Field(default=None, gt=0, le=LARGEST_RATE)
    """Peak learning rate. By default 1e-5 for a student of up to a billion weights, for larger ones that over their
    billions, from ten billion on 1e-6. Fresh and very small models need far more."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine decay to 0, or constant."""
    warmup_steps: int = Field(default_factory=_few, ge=0)
    """Linear warm-up. By default 10, or a tenth of the steps where they are fewer than 100."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """AdamW's betas."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    normalize: Literal["token", "sequence"] = "token"
    """token: the mean over the loss tokens of the step; sequence: the mean of per-sequence means."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Autocast type of the student's forward pass; the loss is always float32."""
    loss_memory: int = Field(default=256, ge=0)
    """MiB for logits kept between the loss's two passes; 0 computes them twice. Changes speed, not results."""
    loss_backend: Literal["auto", "eager", "compiled", "triton", "plain"] = "auto"
    """How the loss is computed; auto: triton on a GPU, else eager. plain holds all logits in memory."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between checkpoints; one is also written at the end."""
    seed: Seed = 0
    """Seed of the data order, of sampling and of fresh weights."""
    extended: tuple[tuple[int, int], ...] = ()
    """Pairs (step, steps): up to that step, the schedules were those of a run of so many steps. `--extend-to` adds one
    when a run goes on past its end."""


class Evaluation(Section):
    source: str | None = None
    """Task that the problems come from: as in data.source, or a benchmark (gsm8k, math500, amc23, aime24) of the hub or
    of a local file (gsm8k:FILE). Without one nothing is evaluated."""
    split: str = "test"
    """Split of a task or hub data set."""
    template: Literal["chat", "raw"] | None = None
    """As in data.template; template_arguments.NAME says what it reads beside the messages."""
    template_arguments: Arguments = {}
    """As in data.template_arguments; when a run is trained, those by default."""
    num_problems: int = Field(default=60, ge=1, le=MANY_AT_ONCE)
    """Problems, held out from training."""
    num_responses: int = Field(default=16, ge=1, le=MANY_AT_ONCE)
    """Responses per problem; Pass@k is reported for every k up to it, at powers of two."""
    temperatures: tuple[Temperature, ...] = Field(default=(1.0, 0.6), min_length=1)
    """Sampling temperatures, all different, each evaluated on its own."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """As in sampling.top_p."""
    top_k: int = Field(default=0, ge=0)
    """As in sampling.top_k."""
    max_tokens: int = Field(default=128, ge=1)
    """Completion length cap in evaluation."""
    end_tokens: tuple[str, ...] = ()
    """Tokens that end a response, as the tokenizer names them; by default those stored with the model, or after
    training those of rollouts.end_set."""
    batch_size: int = Field(default=256, ge=1)
    """Rows decoded together."""
    seed: Seed = 0
    """Seed of the problems and of sampling."""

    @model_validator(mode="after")
    def _is_of_a_size(self):
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"evaluation.temperatures is {list(self.temperatures)}; give each temperature once")
        if (num := self.num_problems * self.num_responses) > 10 * MANY_AT_ONCE:
            raise ValueError(
                f"evaluation.num_problems times evaluation.num_responses is {num}, and {10 * MANY_AT_ONCE} responses "
                "are the most; lower one of them"
            )
        return self


@dataclass(frozen=True)
class CacheOptions:
    """What is stored of each token, how many completions, and in what portions."""

    payload: Literal["hidden", "topk", "completions"] = "hidden"
    """hidden: the teacher's last hidden states, exact for every KL; topk: its objective.top_k likeliest tokens;
    completions: the text alone, which the teacher scores live."""
    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Type of the stored hidden states. What rounding changes is measured and printed, in nats."""
    completions: int = 1
    """Completions of each prompt."""
    rollouts_per_shard: int = 128
    """Prompts with a completion in one file, which is what a kill loses at most on each rank."""


# Fields and sections that a run may be resumed with whatever they were, as none of its steps depends on them ...
CHANGE_NOTHING = ("out", "evaluation", "train.checkpoint_every", "train.loss_memory", "grpo.checkpoint_every")
# ... or only by rounding, which is said then. Every other field is what makes it this run.
CHANGE_ROUNDING = ("train.tokens_per_batch", "sampling.batch_size", "grpo.rows_per_batch")


def is_one_of(name: str, fields: Collection[str]) -> bool:
    """Whether a dotted field is among these, or in a section that is."""
    return name in fields or name.partition(".")[0] in fields


class RunRecipe(Section):
    """What every kind of recipe is: fields, of which the chosen mode reads some, and a run folder."""

    out: Path = Path("runs/run")
    _notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should read before the run begins."""
        return self._notes

    def unread(self) -> dict[str, str]:
        """Fields (or whole sections) that the recipe's mode does not read, with the reason."""
        return {}

    def refuse_unread(self) -> None:
        """Raise ValueError when a field is set that is not read."""
        unread = self.unread()
        for name in _set_fields(self):
            for unread_name, reason in unread.items():
                if name == unread_name or name.startswith(unread_name + "."):
                    raise ValueError(f"{name} is set but not read: {reason}; remove it or change the mode")

    def resolved(self) -> dict[str, Any]:
        """Every field that is read, defaults included, as plain data."""
        return self.resolved_without(())

    def resolved_without(self, names: Iterable[str]) -> dict[str, Any]:
        """The same without some dotted fields or whole sections."""
        data = self.model_dump(mode="json", exclude_none=True)
        for name in (*self.unread(), *names):
            *sections, field = name.split(".")
            section = data
            for key in sections:
                section = section.get(key, {})
            section.pop(field, None)
        return data

    def hash(self) -> str:
        """Of the resolved recipe without the folder it is written to."""
        return _hash(self.resolved_without(["out"]))

    def identity(self) -> str:
        """Of what a run's weights depend on: the resolved recipe without the fields that a resume may change."""
        return _hash(self.resolved_without([*CHANGE_NOTHING, *CHANGE_ROUNDING]))

    def changes_to(self, other: "RunRecipe") -> dict[str, tuple[Any, Any]]:
        """The dotted fields in which another recipe differs, with both values; None where a field is not read."""
        mine, theirs = _flat(self.resolved_without(["out"])), _flat(other.resolved_without(["out"]))
        pairs = {name: (mine.get(name), theirs.get(name)) for name in {**mine, **theirs}}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _hash(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    """Fields of sections by their dotted names."""
    sections = {key: value for key, value in data.items() if isinstance(value, dict)}
    inner = {f"{key}.{name}": value for key, section in sections.items() for name, value in section.items()}
    return {key: value for key, value in data.items() if key not in sections} | inner


class RecipeFields(RunRecipe):
    """All fields of a recipe, each checked by itself."""

    out: Path = Path("runs/run")
    """Run folder. A run that is already there and unfinished is resumed."""
    student: StudentSpec = StudentSpec()
    teacher: TeacherSpec = TeacherSpec()
    data: Data = Data()
    objective: Objective = Objective()
    mixing: Mixing = Mixing()
    sampling: Sampling = Sampling()
    rollouts: Rollouts = Rollouts()
    window: Window = Window()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()


class Recipe(RecipeFields):
    """What one run does. Fields that the chosen mode does not read may not be set."""

    @model_validator(mode="after")
    def _every_set_field_is_read(self):
        self.refuse_unread()
        if self.objective.signal == "labels" and self.objective.prefix in ("student", "mixed"):
            raise ValueError(
                f'objective.signal = "labels" on {self.objective.prefix} prefixes has zero expected gradient where the '
                'student wrote; use teacher or dataset prefixes, or signal = "full"'
            )
        if self.objective.prefix == "mixed" and self.objective.mix_unit == "handoff":
            low, high = self.objective.handoff_tokens
            if not 1 <= low <= high < self.window.tokens:
                raise ValueError(
                    f"objective.handoff_tokens is {[low, high]}; both must be at least 1, in order, and below "
                    f"window.tokens = {self.window.tokens}, so that the second writer has something to write"
                )
        if self.objective.signal == "sampled":
            self._check_sampled_signal()
        self._check_divergence()
        self._check_schedules()
        self._check_extensions()
        if self.teacher.cache is not None and self.objective.prefix in ("student", "mixed"):
            raise ValueError(
                f'teacher.cache is set and objective.prefix is "{self.objective.prefix}": a cache knows the teacher '
                "on completions that are written already, and a student's are not; use teacher or dataset prefixes, "
                "or remove teacher.cache"
            )
        if self.teacher.cache is not None and self.teacher.model == "self":
            raise ValueError(
                'teacher.cache is set and teacher.model is "self"; name the model that the cache was built with'
            )
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(
                f"train.warmup_steps is {self.train.warmup_steps}, more than train.steps = {self.train.steps}; lower it"
            )
        return self

    def _check_sampled_signal(self) -> None:
        """Refuse what would follow the gradient of something else (the table is in objective.sampled_loss)."""
        objective, sampling = self.objective, self.sampling
        direction = {"k1": "reverse", "k2": "reverse", "k3": "forward"}[objective.estimator]
        if objective.prefix != "student":
            raise ValueError(
                f'objective.signal = "sampled" on {objective.prefix} prefixes: the estimators are means over tokens '
                'that the student drew and follow another gradient on others; use prefix = "student" or '
                'signal = "full"'
            )
        if objective.kl != direction:
            raise ValueError(
                f"objective.estimator = {objective.estimator!r} has the gradient of the {direction} KL, and "
                f'objective.kl is {objective.kl!r}; set objective.kl = "{direction}" or choose another estimator'
            )
        if (sampling.temperature, sampling.top_p, sampling.top_k) != (objective.temperature, 1.0, 0):
            raise ValueError(
                'objective.signal = "sampled" needs tokens drawn exactly from the student at objective.temperature = '
                f"{objective.temperature:g}: set sampling.temperature to it, top_p = 1 and top_k = 0"
            )
        if self.rollouts.reuse > 1:
            raise ValueError(
                f"rollouts.reuse is {self.rollouts.reuse}: after one update the student no longer is who drew the "
                'tokens, and signal = "sampled" has no importance weights; use reuse = 1 or signal = "full"'
            )

    def _check_divergence(self) -> None:
        objective, sampling = self.objective, self.sampling
        if objective.gamma:
            exact = (sampling.temperature, sampling.top_p, sampling.top_k) == (objective.temperature, 1.0, 0)
            for is_so, reason in (
                (
                    objective.prefix != "student",
                    f'objective.prefix is "{objective.prefix}", and only tokens that the student wrote have a gradient '
                    'of how they were written; use prefix = "student"',
                ),
                (
                    objective.kl != "reverse",
                    f'objective.kl is "{objective.kl}", and later tokens cost their reverse KL; use kl = "reverse"',
                ),
                (objective.signal != "full", f'objective.signal is "{objective.signal}"; use signal = "full"'),
                (
                    not exact,
                    "the tokens must be drawn exactly from the student; set sampling.temperature = "
                    "objective.temperature, top_p = 1 and top_k = 0",
                ),
                (
                    self.rollouts.reuse > 1,
                    f"rollouts.reuse is {self.rollouts.reuse}, and after one update the student no longer is who drew "
                    "the tokens; use reuse = 1",
                ),
                (
                    objective.split is not None,
                    "objective.split is set, and the tokens' weights would not be the later tokens'; remove it",
                ),
                (
                    self.train.normalize != "token",
                    'train.normalize is "sequence", whose divisor depends on how long the student goes on; use "token"',
                ),
            ):
                if is_so:
                    raise ValueError(f"objective.gamma is {objective.gamma:g}: {reason}, or gamma = 0")
        if objective.split is not None and not any(objective.split_weights):
            raise ValueError("objective.split_weights is [0, 0]: no token has a weight; raise one of them")
        if objective.split is not None and objective.split >= self.window.tokens:
            raise ValueError(
                f"objective.split is {objective.split} and window.tokens {self.window.tokens}: nothing comes after the "
                "split; lower it"
            )

    def _check_schedules(self) -> None:
        mixing, window = self.mixing, self.window
        if mixing.schedule == "steps":
            steps = [step for step, _ in mixing.at_steps]
            if not steps or steps != sorted(set(steps)) or not all(0 <= weight <= 1 for _, weight in mixing.at_steps):
                raise ValueError(
                    f"mixing.at_steps is {[list(pair) for pair in mixing.at_steps]}; give pairs of a step and a "
                    "forward weight between 0 and 1, with growing steps"
                )
        low, high = mixing.bounds
        if mixing.schedule == "entropy" and not 0 <= low <= self.objective.forward_weight <= high <= 1:
            raise ValueError(
                f"mixing.bounds is {[low, high]}; they must be in order, between 0 and 1, with "
                f"objective.forward_weight = {self.objective.forward_weight:g} between them"
            )
        if window.schedule == "fixed":
            return
        _check_ladder(window)
        if window.schedule == "entropy-gated" and window.reference == "teacher" and self.teacher.cache is not None:
            raise ValueError(
                'window.reference is "teacher" and teacher.cache is set: a cached teacher cannot score what the '
                'student writes; use reference = "first" or "absolute"'
            )
        objective = self.objective
        if (
            objective.prefix == "mixed"
            and objective.mix_unit == "handoff"
            and objective.handoff_tokens[1] >= window.start
        ):
            raise ValueError(
                f"objective.handoff_tokens is {list(objective.handoff_tokens)} and window.start {window.start}; the "
                "first writer must leave something of every window"
            )

    def _check_extensions(self) -> None:
        pairs = self.train.extended
        until, steps = [u for u, _ in pairs], [*(s for _, s in pairs), self.train.steps]
        grow = all(a < b for a, b in [*itertools.pairwise([0, *until]), *itertools.pairwise([0, *steps])])
        if not grow or any(u > s for u, s in pairs):
            raise ValueError(
                f"train.extended is {[list(pair) for pair in pairs]}; give pairs (step, steps), both growing, each "
                f"step within its steps, and steps below train.steps = {self.train.steps}"
            )
        if pairs and self.train.flops is not None:
            raise ValueError("train.extended is set and train.flops, by which the run ends, too; remove one of them")

    @property
    def method(self) -> str:
        """The name of this cell of the grid."""
        return self.objective.name

    def unread(self) -> dict[str, str]:
        return unread_fields(self)


class Grpo(Section):
    """Group-relative policy optimisation (arXiv 2402.03300), as TRL's GRPOTrainer does it.

    A response's advantage is its score minus its group's mean, over the group's standard deviation; the loss is the
    mean over the tokens of the step. Each set of responses serves one update, so that nothing is clipped.
    """

    steps: int = Field(default=40, ge=1, le=MANY)
    """Optimiser updates."""
    prompts_per_step: int = Field(default=12, ge=1, le=MANY_AT_ONCE)
    """Prompts of one update."""
    group_size: int = Field(default=8, ge=2, le=MANY_AT_ONCE)
    """Responses to each prompt; their scores are compared with each other."""
    rows_per_batch: int = Field(default=32, ge=1)
    """Responses of one forward-backward slice, at most. Gradients depend on it by rounding alone."""
    lr: float = Field(default=1e-6, gt=0, le=LARGEST_RATE)
    """Peak learning rate; very small models need far more."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or cosine decay to 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL to the start model, which is then kept in memory; 0 does without one."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between checkpoints; one is also written at the end."""
    seed: Seed = 0
    """Seed of the data order and of sampling."""


class GrpoFields(RunRecipe):
    """All fields of a GRPO recipe, each checked by itself."""

    out: Path = Path("runs/grpo")
    """Run folder. A run that is already there and unfinished is resumed."""
    model: str = "potstill:base"
    """Where it starts: a run folder, a model folder, a hub id or potstill:base."""
    data: Data = Data()
    sampling: Sampling = Sampling()
    window: Window = Window()
    grpo: Grpo = Grpo()
    evaluation: Evaluation = Evaluation()

    @property
    def method(self) -> str:
        return "GRPO"

    def unread(self) -> dict[str, str]:
        unread = _unread_of_window(self.window)
        reason = "GRPO needs scores, so data.source is a task, which has no columns and no configurations"
        unread |= {"data.prompt_column": reason, "data.config": reason}
        if self.evaluation.source is None:
            unread["evaluation"] = "evaluation.source is not set, so nothing is evaluated"
        return unread


class GrpoRecipe(GrpoFields):
    """What one GRPO run does: reinforcement learning of a task's scores, from any model or run."""

    @model_validator(mode="after")
    def _every_set_field_is_read(self):
        self.refuse_unread()
        if is_table(self.data.source):
            raise ValueError(
                f"data.source is {self.data.source!r}; only the responses of a task can be scored: choose one of "
                f"{', '.join(TASK_NAMES)}"
            )
        sampling = self.sampling
        if not sampling.temperature or sampling.top_p < 1 or sampling.top_k:
            raise ValueError(
                f"sampling is temperature = {sampling.temperature:g}, top_p = {sampling.top_p:g}, top_k = "
                f"{sampling.top_k}: the policy gradient needs tokens drawn from the whole distribution; use a "
                "temperature above 0, top_p = 1 and top_k = 0"
            )
        if self.window.schedule != "fixed":
            _check_ladder(self.window)
        if self.window.schedule == "entropy-gated" and self.window.reference == "teacher":
            raise ValueError(
                'window.reference is "teacher" and GRPO has no teacher; use reference = "first" or "absolute"'
            )
        if self.grpo.warmup_steps > self.grpo.steps:
            raise ValueError(
                f"grpo.warmup_steps is {self.grpo.warmup_steps}, more than grpo.steps = {self.grpo.steps}; lower it"
            )
        return self


def run_evaluation(recipe: RecipeFields | GrpoFields) -> Evaluation:
    """The evaluation of a run, whose chat template is told by default what that of the data is."""
    arguments = recipe.evaluation.template_arguments or recipe.data.template_arguments
    return recipe.evaluation.model_copy(update={"template_arguments": arguments})


def _check_ladder(window: Window) -> None:
    """Refuse a first window above the cap, and a ladder that does not grow from the one to the other."""
    if window.start > window.tokens:
        raise ValueError(
            f"window.start is {window.start}, more than window.tokens = {window.tokens}; lower it or raise the cap"
        )
    if window.ladder is not None:
        rungs = [window.start, *window.ladder]
        if not window.ladder or rungs != sorted(set(rungs)) or rungs[-1] != window.tokens:
            raise ValueError(
                f"window.ladder is {list(window.ladder)}; it must grow from above window.start = {window.start} to "
                f"window.tokens = {window.tokens}"
            )


def unread_fields(recipe: Recipe) -> dict[str, str]:
    """Fields (or whole sections) that the recipe's mode does not read, with the reason."""
    objective = recipe.objective
    unread: dict[str, str] = {}
    if objective.prefix != "mixed":
        reason = f'objective.prefix is "{objective.prefix}" and only "mixed" has two writers'
        unread |= {
            f"objective.{name}": reason for name in ("mix_unit", "student_share", "first_writer", "handoff_tokens")
        }
    elif objective.mix_unit == "handoff":
        unread["objective.student_share"] = 'objective.mix_unit is "handoff", whose share follows from the lengths'
    else:
        reason = f'objective.mix_unit is "{objective.mix_unit}" and only "handoff" has a first writer'
        unread |= {f"objective.{name}": reason for name in ("first_writer", "handoff_tokens")}
    if objective.kl != "mixed":
        reason = f'objective.kl is "{objective.kl}" and only "mixed" has a forward weight'
        unread |= {"objective.forward_weight": reason, "objective.forward_above": reason, "mixing": reason}
    else:
        of_schedule = {
            "linear": ("end_weight", "over_steps"),
            "cosine": ("end_weight", "over_steps"),
            "steps": ("at_steps",),
            "entropy": ("reference", "floor", "band", "rate", "bounds"),
        }
        unread |= _unread_of_schedule("mixing", recipe.mixing, of_schedule)
    if objective.kl != "jsd":
        unread["objective.jsd_weight"] = f'objective.kl is "{objective.kl}" and only "jsd" reads it'
    if not objective.kl.startswith("skew"):
        unread["objective.skew"] = f'objective.kl is "{objective.kl}" and only the skew KLs are skewed'
    if objective.split is None:
        unread["objective.split_weights"] = "objective.split is not set"
    unread |= _unread_of_window(recipe.window)
    if objective.signal != "topk":
        unread["objective.top_k"] = f'objective.signal is "{objective.signal}" and only "topk" keeps some tokens apart'
    if objective.signal != "sampled":
        reason = f'objective.signal is "{objective.signal}" and only "sampled" is estimated'
        unread |= {"objective.estimator": reason, "objective.baseline": reason}
    elif objective.estimator != "k1":
        unread["objective.baseline"] = f'objective.estimator is "{objective.estimator}" and only "k1" has a reward'
    if objective.end_class == "raw":
        unread["objective.separate_ends"] = 'objective.end_class is "raw", which keeps every end token apart'
    if objective.signal == "labels":
        reason = 'objective.signal is "labels", which has no KL and needs no teacher\'s distribution'
        fields = ("kl", "forward_weight", "forward_above", "jsd_weight", "skew", "gamma", "temperature", "end_class")
        fields += ("separate_ends",)
        unread |= {f"objective.{field}": reason for field in fields} | {"mixing": reason}
        if objective.prefix != "teacher":
            unread["teacher"] = reason
    if objective.prefix == "dataset":
        unread["sampling"] = unread["rollouts"] = 'objective.prefix is "dataset", so nothing is sampled in training'
    if recipe.teacher.model == "self":
        reason = 'teacher.model is "self", which is loaded as the student is'
        unread |= {"teacher.dtype": reason, "teacher.trust_remote_code": reason}
        unread["rollouts.end_set"] = 'teacher.model is "self", which ends as the student does'
    else:
        unread["teacher.refresh_steps"] = (
            f'teacher.model is {recipe.teacher.model!r} and only "self" can follow the student'
        )
    if not is_table(recipe.data.source):
        unread["teacher.prompt_column"] = f"data.source is the task {recipe.data.source!r}, which has no columns"
        unread["data.prompt_column"] = f"data.source is the task {recipe.data.source!r}, which has no columns"
        unread["data.config"] = f"data.source is the task {recipe.data.source!r}, which has one configuration"
    else:
        unread["data.seed"] = "only a task makes problems from a seed"
        if not any(map(is_hub_id, sources(recipe.data.source))):
            reason = f"data.source is the file {recipe.data.source!r}, which has no splits and no configurations"
            unread |= {"data.split": reason, "data.config": reason}
    if recipe.train.loss_backend == "plain":
        unread["train.loss_memory"] = 'train.loss_backend is "plain", which keeps all logits'
    if recipe.evaluation.source is None:
        unread["evaluation"] = "evaluation.source is not set, so nothing is evaluated"
    return unread


def _unread_of_window(window: Window) -> dict[str, str]:
    of_schedule = {
        "linear": ("start", "over_steps"),
        "entropy-gated": (
            *("start", "ladder", "check_every", "num_probes", "patience", "reference", "threshold"),
            *("max_truncation", "max_repetition", "sticky", "step_back"),
        ),
    }
    return _unread_of_schedule("window", window, of_schedule)


def _unread_of_schedule(section: str, settings: Any, of_schedule: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """The fields that only other schedules of a section read."""
    read = of_schedule.get(settings.schedule, ())
    known = {field for fields in of_schedule.values() for field in fields}
    return {f"{section}.{f}": f'{section}.schedule is "{settings.schedule}"' for f in sorted(known - set(read))}


def sources(source: str | Sequence[str]) -> tuple[str, ...]:
    """The parts of a data source: one, or several."""
    return (source,) if isinstance(source, str) else tuple(source)


def is_table(source: str | Sequence[str]) -> bool:
    """Whether a data source is of files or hub data sets rather than a task."""
    return not isinstance(source, str) or source.split(":")[0] not in TASK_NAMES


def is_hub_id(source: str) -> bool:
    """Whether a data source is for `datasets` to find: a hub id, or a folder."""
    is_file = source.removesuffix(".gz").endswith(DATA_SUFFIXES) and not Path(source).is_dir()
    return is_table(source) and not is_file and not any(mark in source for mark in "*?[")


def load_recipe(recipe: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read the TOML recipe of a distillation; otherwise as `load_any_recipe`."""
    return _noted(make_recipe(read_recipe(recipe, overrides), str(recipe)), recipe, overrides)


def load_grpo_recipe(recipe: str | Path, overrides: dict[str, Any] | None = None) -> GrpoRecipe:
    """Read the TOML recipe of a GRPO run; otherwise as `load_any_recipe`."""
    return _noted(validate(read_recipe(recipe, overrides), str(recipe), GrpoRecipe), recipe, overrides)


def _noted(read: AnyRecipe, recipe: str | Path, overrides: dict[str, Any] | None) -> AnyRecipe:
    """A recipe that says what was left out of it."""
    if names := not_carried_over(recipe, overrides or {}):
        read._notes = (
            f"of the shipped recipe {recipe}, not taken for another model, data or length: {', '.join(names)}; "
            f"--{names[0]} chooses",
        )
    return read


def load_any_recipe(recipe: str | Path) -> Recipe | GrpoRecipe:
    """Read a TOML recipe of either kind: one with a section `grpo` is of GRPO."""
    data = read_recipe(recipe)
    return validate(data, str(recipe), GrpoRecipe) if "grpo" in data else make_recipe(data, str(recipe))


def read_recipe(recipe: str | Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a TOML recipe, apply dotted overrides such as {"objective.kl": "reverse"}, as plain data.

    `recipe` is a file, or the name of a shipped recipe such as "demo", of which `not_carried_over` is left out. Raises
    RecipeError with one line for a missing file or broken TOML.
    """
    fields = overrides or {}
    data = read_toml(find_toml("recipe", recipe, SHIPPED_RECIPES))
    for name in not_carried_over(recipe, fields):
        section, _, field = name.partition(".")
        del data[section][field]
    return with_fields(data, fields)


def not_carried_over(recipe: str | Path, fields: dict[str, Any]) -> list[str]:
    """What a shipped recipe says for its own model, data and number of steps, where `fields` name others.

    The learning rate of a model of 75,000 weights would wreck a real one, and 8192 prompts are not in every file.
    """
    path = find_toml("recipe", recipe, SHIPPED_RECIPES)
    if path.parent != SHIPPED_RECIPES:
        return []
    names = []
    models = [fields[name] for name in ("student.model", "model") if name in fields]
    if any(not _first_model(str(model)).startswith("potstill:") for model in models):
        names += ["train.lr", "grpo.lr"]
    if is_table(fields.get("data.source", "multiplication")):
        names.append("data.num_prompts")
    data = read_toml(path)
    steps, warmup = fields.get("train.steps"), data.get("train", {}).get("warmup_steps", 0)
    if isinstance(steps, int) and steps < warmup:
        names.append("train.warmup_steps")
    there = {f"{section}.{field}" for section, inner in data.items() if isinstance(inner, dict) for field in inner}
    return [name for name in names if name in there and name not in fields]


def _first_model(name: str) -> str:
    """What a run began with, run by run; of a model that is no run's, itself."""
    seen = set()
    while name not in seen:
        seen.add(name)
        for file in (Path(name) / "recipe.toml", Path(name).parent / "recipe.toml"):
            if not name.startswith("potstill:") and file.is_file():
                data = read_toml(file)
                name = str(data.get("model") or data.get("student", {}).get("model", "potstill:base"))
                break
    return name


def find_toml(what: str, name: str | Path, shipped: Path) -> Path:
    """A file, or the one of that name in a folder of shipped ones. Raises RecipeError where there is none."""
    if Path(name).is_file():
        return Path(name)
    known = sorted(path.stem for path in shipped.glob("*.toml"))
    if str(name) not in known:
        # Those that made the shipped models are for who makes them again.
        shown = ", ".join(stem for stem in known if not stem.startswith("assets-"))
        what = f"{what} {str(name)!r}" + (" is a folder" if Path(name).is_dir() else " does not exist")
        raise RecipeError(f"{what}; give a TOML file or one of {shown}")
    return shipped / f"{name}.toml"


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain data. Raises RecipeError where it is none."""
    try:
        return tomllib.loads(path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except RecursionError:
        raise RecipeError(f"{path} is not valid TOML: it is nested too deeply") from None
    # tomllib's own errors are ValueErrors, and an integer of thousands of digits is one that it does not wrap.
    except ValueError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}; give a TOML file that can") from None


def with_fields(data: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain data with dotted fields set over it."""
    data = copy.deepcopy(data)
    for name, value in fields.items():
        *sections, field = name.split(".")
        section = data
        for key in sections:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise RecipeError(f"{name}: {key} is a value, not a section of the recipe")
        section[field] = value
    return data


def make_recipe(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate the plain data of a distillation; errors as `validate`."""
    return validate(data, where, Recipe)


def validate(data: dict[str, Any], where: str, schema: type[AnySection]) -> AnySection:
    """Validate plain data by a schema.

    Raises RecipeError with one line for an unknown key (with the nearest name), a wrong type, a value out of range, or
    a field that the chosen mode does not read.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_describe(error.errors()[0], schema)}") from None


def _describe(error: Any, schema: type[BaseModel]) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"{name} is not a field of the recipe; the nearest is {nearest_field(name, field_names(schema))}"
    if error["type"] == "missing":
        return f"{name} is missing; it has no default"
    if not location:
        return error["msg"].removeprefix("Value error, ")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        # Of a whole section, whose message names the field.
        return f"{name}: {message}"
    if error["type"] in ("model_type", "dict_type"):
        message = f"it is a section; write its fields below a line [{name}]"
    return f"{name} is {shown(error['input'])}: {message[0].lower()}{message[1:]}"


def shown(value: Any, width: int = 100) -> str:
    """A value of a user's as a message shows it: quoted where it is text, and not too long."""
    try:
        text = repr(value)
    except ValueError:
        # Python does not write integers of thousands of digits.
        text = "a number of thousands of digits"
    return text if len(text) <= width else f"{text[:width]}..."


def field_names(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of all fields of the schema."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += field_names(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _set_fields(section: BaseModel, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name in section.model_fields_set:
        value = getattr(section, name)
        names += _set_fields(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [prefix + name]
    return names


def check_recipe(given: Any, kind: type[RunRecipe]) -> None:
    """Raise RecipeError for what is given from Python and is no recipe of this kind."""
    if not isinstance(given, kind):
        load = "load_grpo_recipe" if kind is GrpoRecipe else "load_recipe"
        raise RecipeError(f"the recipe is {shown(given)}; give a {kind.__name__}, such as {load}(NAME) returns")


def to_toml(data: dict[str, Any]) -> str:
    """The resolved recipe as TOML: plain values first, then one table a section."""
    lines = [f"{key} = {toml_value(value)}" for key, value in data.items() if not isinstance(value, dict)]
    for key, value in data.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{name} = {toml_value(item)}" for name, item in value.items())]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # JSON's strings, numbers and booleans are also TOML.
    return printable(json.dumps(value, ensure_ascii=False))


# What makes or scores problems (`tasks.TASKS`); any other data source is a table.
TASK_NAMES = ("multiplication", "columns", "reasoning-gym", "gsm8k", "math500", "amc23", "aime24", "deepscaler")
# What the name of a data file ends in, or these and .gz.
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SHIPPED_RECIPES = Path(__file__).parent / "recipes"
