"""The recipe: one frozen schema for everything a run does, read from one TOML file plus dotted overrides.

Every field is read by the mode that the recipe chooses, or it may not be set: `unread_fields` is the one place that
says which field needs which mode.
"""

import difflib
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one line and says what to do."""


class Method(NamedTuple):
    prefix: Literal["teacher", "student"]
    kl: Literal["forward", "reverse"]
    name: str
    advice: str


# The four corners of the grid, by the name that `--method` takes.
METHODS: dict[str, Method] = {
    "sft": Method(
        "teacher", "forward", "SFT with soft targets", "cheapest and safest start; keeps the teacher's variety"
    ),
    "dagger": Method("student", "forward", "DAgger", "repairs the student's own mistakes; keeps entropy for RL"),
    "offline-rl": Method(
        "teacher", "reverse", "offline RL", "sharpens on the teacher's text; the gradient of no sequence KL"
    ),
    "opd": Method(
        "student", "reverse", "on-policy distillation", "best Avg@k a step in the paper; watch entropy and length"
    ),
}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class StudentSpec(Section):
    model: str = "potstill:base"
    """Folder or hub id of a Hugging Face causal LM; potstill:base is the shipped one."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: the model's configuration and tokenizer with fresh weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained weights."""
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
    source: str = "multiplication"
    """A task (multiplication, reasoning-gym:NAME), a .jsonl or .parquet file, a hub data set or a folder of one."""
    split: str = "train"
    """Split of a task or hub data set."""
    num_prompts: int | None = Field(default=None, ge=1)
    """How many prompts to take; all of a file by default, 4096 of a task."""
    prompt_column: str = "prompt"
    """Column of a file or hub data set that holds the prompt."""
    template: Literal["chat", "raw"] | None = None
    """Render prompts with the chat template or take them as they are; by default chat for messages, raw for strings."""
    seed: int = 0
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
    kl: Literal["forward", "reverse", "mixed"] = "forward"
    """forward: KL(teacher || student); reverse: KL(student || teacher); mixed: their linear mixture."""
    forward_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the forward KL in kl = mixed."""
    temperature: float = Field(default=1.0, gt=0)
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
    """merged: where the two models end differently, all end tokens count as one class in the loss."""


class Sampling(Section):
    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy. 1 with no truncation samples exactly from the model."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the smallest set of tokens with at least this mass."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    batch_size: int = Field(default=64, ge=1)
    """Rows decoded together. Results do not depend on it, but for rounding."""


class Rollouts(Section):
    reuse: int = Field(default=1, ge=1)
    """Optimiser steps that each set of rollouts serves. Their age in steps is logged."""


class Window(Section):
    tokens: int = Field(default=128, ge=1)
    """Completion length cap in training. Stops beyond it are not learnt."""


class Train(Section):
    steps: int = Field(default=120, ge=1)
    """Optimiser updates, at most."""
    flops: float | None = Field(default=None, gt=0)
    """End the run with the step that brings the operations of rollouts, teacher and student to this number."""
    prompts_per_step: int = Field(default=48, ge=1)
    """Prompts (and rollouts) of one update, over all ranks."""
    tokens_per_batch: int = Field(default=4096, ge=1)
    """Padded tokens of one forward-backward slice on one rank. Gradients do not depend on it."""
    lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine decay to 0, or constant."""
    warmup_steps: int = Field(default=10, ge=0)
    """Linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
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
    seed: int = 0
    """Seed of the data order, of sampling and of fresh weights."""


class Evaluation(Section):
    source: str | None = None
    """Task that the problems come from, as in data.source; without one nothing is evaluated."""
    split: str = "test"
    """Split of a task or hub data set."""
    template: Literal["chat", "raw"] | None = None
    """As in data.template."""
    num_problems: int = Field(default=60, ge=1)
    """Problems, held out from training."""
    num_responses: int = Field(default=16, ge=1)
    """Responses per problem; Pass@k is reported for every k up to it, at powers of two."""
    temperatures: tuple[float, ...] = (1.0, 0.6)
    """Sampling temperatures, each evaluated on its own."""
    max_tokens: int = Field(default=128, ge=1)
    """Completion length cap in evaluation."""
    batch_size: int = Field(default=256, ge=1)
    """Rows decoded together."""
    seed: int = 0
    """Seed of the problems and of sampling."""


class RecipeFields(Section):
    """All fields of a recipe, each checked by itself."""

    out: Path = Path("runs/run")
    """Run folder. A run that is already there and unfinished is resumed."""
    student: StudentSpec = StudentSpec()
    teacher: TeacherSpec = TeacherSpec()
    data: Data = Data()
    objective: Objective = Objective()
    sampling: Sampling = Sampling()
    rollouts: Rollouts = Rollouts()
    window: Window = Window()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()


class Recipe(RecipeFields):
    """What one run does. Fields that the chosen mode does not read may not be set."""

    @model_validator(mode="after")
    def _every_set_field_is_read(self):
        unread = unread_fields(self)
        for name in _set_fields(self):
            for unread_name, reason in unread.items():
                if name == unread_name or name.startswith(unread_name + "."):
                    raise ValueError(f"{name} is set but not read: {reason}; remove it or change the mode")
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

    @property
    def method(self) -> str:
        """The name of this cell of the grid."""
        objective = self.objective
        if objective.signal == "labels":
            return f"hard-label SFT ({objective.prefix} prefix)"
        if objective.signal == "sampled":
            return f"sampled {objective.kl} KL ({objective.estimator}, {objective.prefix} prefix)"
        signal = f", top {objective.top_k} tokens" if objective.signal == "topk" else ""
        for method in METHODS.values():
            if (objective.prefix, objective.kl) == (method.prefix, method.kl):
                return method.name + signal
        weight = f" {objective.forward_weight:g}" if objective.kl == "mixed" else ""
        return f"{objective.prefix} prefix, {objective.kl} KL{weight}{signal}"

    def resolved(self) -> dict[str, Any]:
        """Every field that is read, defaults included, as plain data."""
        data = self.model_dump(mode="json", exclude_none=True)
        for name in unread_fields(self):
            *sections, field = name.split(".")
            section = data
            for key in sections:
                section = section.get(key, {})
            section.pop(field, None)
        return data

    def hash(self) -> str:
        """Identity of the run: the resolved recipe without the folder it is written to."""
        data = {key: value for key, value in self.resolved().items() if key != "out"}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


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
        unread["objective.forward_weight"] = f'objective.kl is "{objective.kl}" and only "mixed" has a weight'
    if objective.signal != "topk":
        unread["objective.top_k"] = f'objective.signal is "{objective.signal}" and only "topk" keeps some tokens apart'
    if objective.signal != "sampled":
        reason = f'objective.signal is "{objective.signal}" and only "sampled" is estimated'
        unread |= {"objective.estimator": reason, "objective.baseline": reason}
    elif objective.estimator != "k1":
        unread["objective.baseline"] = f'objective.estimator is "{objective.estimator}" and only "k1" has a reward'
    if objective.signal == "labels":
        reason = 'objective.signal is "labels", which has no KL and needs no teacher\'s distribution'
        unread |= {f"objective.{field}": reason for field in ("kl", "forward_weight", "temperature", "end_class")}
        if objective.prefix != "teacher":
            unread["teacher"] = reason
    if objective.prefix == "dataset":
        unread["sampling"] = unread["rollouts"] = 'objective.prefix is "dataset", so nothing is sampled in training'
    if recipe.teacher.model == "self":
        reason = 'teacher.model is "self", which is loaded as the student is'
        unread |= {"teacher.dtype": reason, "teacher.trust_remote_code": reason}
    else:
        unread["teacher.refresh_steps"] = (
            f'teacher.model is {recipe.teacher.model!r} and only "self" can follow the student'
        )
    if not is_table(recipe.data.source):
        unread["teacher.prompt_column"] = f"data.source is the task {recipe.data.source!r}, which has no columns"
        unread["data.prompt_column"] = f"data.source is the task {recipe.data.source!r}, which has no columns"
    elif not is_hub_id(recipe.data.source):
        unread["data.split"] = f"data.source is the file {recipe.data.source!r}, which has no splits"
        unread["data.seed"] = "only a task makes problems from a seed"
    if recipe.train.loss_backend == "plain":
        unread["train.loss_memory"] = 'train.loss_backend is "plain", which keeps all logits'
    if recipe.evaluation.source is None:
        unread["evaluation"] = "evaluation.source is not set, so nothing is evaluated"
    return unread


def is_table(source: str) -> bool:
    """Whether a data source is a file or hub data set rather than a task."""
    return source.split(":")[0] not in ("multiplication", "reasoning-gym")


def is_hub_id(source: str) -> bool:
    """Whether a data source is for `datasets` to find: a hub id, or a folder."""
    return is_table(source) and Path(source).suffix not in (".jsonl", ".json", ".parquet")


def load_recipe(recipe: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a TOML recipe, apply dotted overrides such as {"objective.kl": "reverse"}, and validate.

    `recipe` is a file, or the name of a shipped recipe such as "demo". Raises RecipeError with one line for a missing
    file, broken TOML, an unknown key (with the nearest name), a wrong type, a value out of range, or a field that the
    chosen mode does not read.
    """
    path = Path(recipe)
    if not path.is_file():
        shipped = sorted(known.stem for known in SHIPPED_RECIPES.glob("*.toml"))
        if str(recipe) not in shipped:
            raise RecipeError(f"recipe {str(recipe)!r} does not exist; give a TOML file or one of {', '.join(shipped)}")
        path = SHIPPED_RECIPES / f"{recipe}.toml"
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    for name, value in (overrides or {}).items():
        *sections, field = name.split(".")
        section = data
        for key in sections:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise RecipeError(f"{name}: {key} is a value, not a section of the recipe")
        section[field] = value
    return make_recipe(data, str(recipe))


def make_recipe(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate plain data; raises RecipeError with one line."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_describe(error.errors()[0])}") from None


def _describe(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        names = field_names()
        nearest = difflib.get_close_matches(name, names, 1, cutoff=0) or names[:1]
        siblings = [known for known in names if known.split(".")[:-1] == location[:-1]]
        nearest = difflib.get_close_matches(name, siblings, 1, cutoff=0.4) or nearest
        return f"{name} is not a field of the recipe; the nearest is {nearest[0]}"
    if not location:
        return error["msg"].removeprefix("Value error, ")
    return f"{name} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


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


def to_toml(data: dict[str, Any]) -> str:
    """The resolved recipe as TOML: plain values first, then one table a section."""
    lines = [f"{key} = {_toml_value(value)}" for key, value in data.items() if not isinstance(value, dict)]
    for key, value in data.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{name} = {_toml_value(item)}" for name, item in value.items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    # JSON's strings, numbers, booleans and arrays are also TOML.
    return json.dumps(value, ensure_ascii=False)


SHIPPED_RECIPES = Path(__file__).parent / "recipes"
