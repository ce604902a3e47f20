"""The sections and fields of a recipe, each checked by itself. The text below a field is its
help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from potstill.config.data_fields import Data
from potstill.config.objective_fields import Objective, Reward, WeightSchedule
from potstill.config.roles import Place, Role
from potstill.config.run_recipe import RunRecipe
from potstill.config.section import Section
from potstill.config.validation_fields import Validation
from potstill.config.values import (
    LARGEST_RATE,
    MANY,
    MANY_AT_ONCE,
    Arguments,
    Beta,
    Filled,
    Seed,
    Temperature,
)
from potstill.config.weightings import WEIGHTINGS
from potstill.tasks.own import own_task


class StudentSpec(Section, role=Role.MODEL):
    model: Annotated[str, Place.FIRST] = "potstill:base"
    """Folder or hub id of a Hugging Face causal LM; potstill:base is the shipped one."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: the model's configuration and tokenizer with fresh weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained weights. In bfloat16 small updates are rounded away, which is warned of;
    for its speed keep float32 and set train.compute_dtype."""
    dropout: bool = False
    """Train with the dropout that the model's configuration has. Without it the loss is of the same
    distribution that writes the student's completions and that is evaluated."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings."""


class TeacherSpec(Section, role=Role.MODEL):
    model: Annotated[str, Place.FIRST] = "potstill:teacher"
    """Folder or hub id of a Hugging Face causal LM; potstill:teacher is the shipped one; self is
    the student as it was before the first step, or at the last refresh."""
    refresh_steps: int | None = Field(default=None, ge=1)
    """model = self: copy the student's weights into the teacher every so many steps; never by
    default."""
    template: Literal["chat", "raw"] | None = None
    """Render the teacher's prompts with its own chat template, or take them as they are; by default
    it reads the student's prompts."""
    prompt_column: str | None = None
    """Column of a file or hub data set with prompts for the teacher alone, such as the prompt and a
    hint."""
    prompt_template: Filled | None = None
    """As data.prompt_template, for the teacher alone; in place of teacher.prompt_column."""
    cache: Annotated[str | None, Role.CACHE] = None
    """Folder that `potstill cache build` wrote: completions and signal come from it, and the
    teacher is not loaded."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the teacher's weights."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings."""


class Sampling(Section, role=Role.OBJECTIVE):
    temperature: Temperature = 1.0
    """0 is greedy. 1 with no truncation samples exactly from the model."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the smallest set of tokens with at least this mass."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    batch_size: Annotated[int, Role.ROUNDING] = Field(default=64, ge=1)
    """Rows decoded together. It changes a model's numbers by rounding alone, and so a token once in
    very many."""


class Rollouts(Section, role=Role.OBJECTIVE):
    reuse: int = Field(default=1, ge=1)
    """Optimiser steps that each set of rollouts serves. Their age in steps is logged."""
    end_set: Literal["union", "student"] = "union"
    """Tokens that end a completion, in training, evaluation and the exported model. union: any end
    token of student or teacher; student: the student's own alone, which is how a mismatch of end
    tokens drives responses to the length cap."""


class Window(Section, role=Role.WINDOW):
    tokens: Annotated[int, Place.FIRST] = Field(default=128, ge=1)
    """Completion length cap in training, the largest that a schedule reaches. Stops beyond it are
    not learnt."""
    schedule: Literal["fixed", "linear", "entropy-gated"] = "fixed"
    """fixed: always `tokens`; linear: from `start` to it; entropy-gated: up a ladder while probes
    of the student pass."""
    start: int = Field(default=128, ge=1)
    """linear, entropy-gated: the first window; at most `tokens`."""
    over_steps: int | None = Field(default=None, ge=1)
    """linear: steps until the window is `tokens`; all steps of the run by default."""
    ladder: tuple[int, ...] | None = None
    """entropy-gated: the windows after `start`, growing, the last one `tokens`; doubling by
    default."""
    check_every: int = Field(default=50, ge=1)
    """entropy-gated: steps between probes. The first is before the first step."""
    num_probes: int = Field(default=64, ge=1)
    """entropy-gated: prompts of the data that are held out and written to by the student at each
    probe."""
    patience: int = Field(default=2, ge=1)
    """entropy-gated: probes in a row that must pass before the window grows."""
    reference: Literal["first", "absolute", "teacher"] = "first"
    """entropy-gated: the threshold is a share of the first probe's entropy, a number of nats, or a
    share of the teacher's entropy on the same tokens."""
    threshold: float = Field(default=0.5, ge=0)
    """entropy-gated: a probe fails when the student's entropy, up to the first answer or stop, is
    below this."""
    max_truncation: float = Field(default=0.3, ge=0, le=1)
    """entropy-gated: a probe fails when more responses than this are cut, beyond the share that the
    teacher's are."""
    max_repetition: float = Field(default=0.02, ge=0, le=1)
    """entropy-gated: a probe fails when more responses than this are loops (zlib makes them ten
    times smaller)."""
    sticky: bool = True
    """entropy-gated: after a failed probe the window never grows again; else it can when probes
    pass again."""
    step_back: bool = False
    """entropy-gated: a failed probe takes the window one step down the ladder."""


def _few(fields: dict[str, Any]) -> int:
    """The warm-up of a run that does not say."""
    return min(10, fields.get("steps", 0) // 10)


class Train(Section, role=Role.UPDATE):
    steps: Annotated[int, Role.LENGTH, Place.FIRST] = Field(default=120, ge=1, le=MANY)
    """Optimiser updates, at most."""
    flops: Annotated[float | None, Role.BUDGET] = Field(default=None, gt=0)
    """End the run with the step that brings the operations of rollouts, teacher and student to this
    number."""
    prompts_per_step: Annotated[int, Place.FIRST] = Field(default=48, ge=1, le=MANY_AT_ONCE)
    """Prompts of one update, over all ranks: each has one rollout, or reward.group_size of
    them."""
    tokens_per_batch: Annotated[int, Role.ROUNDING] = Field(default=4096, ge=1)
    """Padded tokens of one forward-backward slice on one rank. Gradients depend on it by rounding
    alone."""
    lr: Annotated[float | None, Role.TUNED, Place.FIRST] = Field(
        default=None, gt=0, le=LARGEST_RATE
    )
    """Peak learning rate. By default 1e-5 for a student of up to a billion weights, for larger ones
    that over their billions, from ten billion on 1e-6. Fresh and very small models need far
    more."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine decay to 0, or constant."""
    warmup_steps: Annotated[int, Role.WARM_UP] = Field(default_factory=_few, ge=0)
    """Linear warm-up. By default 10, or a tenth of the steps where they are fewer than 100."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """AdamW's betas."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    normalize: Annotated[Literal["token", "sequence"], Role.OBJECTIVE] = "token"
    """token: the mean over the loss tokens of the step; sequence: the mean of per-sequence
    means."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Autocast type of the student's forward pass; the loss is always float32."""
    loss_memory: Annotated[int, Role.SPEED] = Field(default=256, ge=0)
    """MiB for logits kept between the loss's two passes; 0 computes them twice. Changes speed, not
    results."""
    loss_backend: Annotated[
        Literal["auto", "eager", "compiled", "triton", "plain"], Role.BACKEND
    ] = "auto"
    """How the loss is computed; auto: triton on a GPU, else eager. plain holds all logits in
    memory."""
    checkpoint_every: Annotated[int, Role.OUTPUT] = Field(default=20, ge=1)
    """Steps between checkpoints; one is also written at the end."""
    keep_checkpoints: Annotated[int | None, Role.OUTPUT] = Field(default=None, ge=1)
    """Checkpoints that are kept, the last ones; 1 by default."""
    tracker: Annotated[Literal["tensorboard", "wandb", "trackio"] | None, Role.OUTPUT] = None
    """Tracker that each step's numbers go to, beside metrics.jsonl; none by default. It must be
    installed. Weights & Biases (wandb) is offline unless the variable WANDB_MODE says otherwise."""
    seed: Annotated[Seed, Role.SEED] = 0
    """Seed of the data order, of sampling and of fresh weights."""
    extended: Annotated[tuple[tuple[int, int], ...], Role.LENGTH] = ()
    """Pairs (step, steps): up to that step, the schedules were those of a run of so many steps.
    `--extend-to` adds one when a run goes on past its end."""


class Evaluation(Section, role=Role.EVALUATION):
    source: Annotated[str | None, Place.FIRST] = None
    """Task that the problems come from: as in data.source, or a benchmark (gsm8k, math500, amc23,
    aime24) of the hub or of a local file (gsm8k:FILE). Without one nothing is evaluated."""
    split: str = "test"
    """Split of a task or hub data set."""
    template: Literal["chat", "raw"] | None = None
    """As in data.template; template_arguments.NAME tells the template more."""
    system: str | None = None
    """As in data.system; when a run is trained and template is "chat", that one by default. An
    empty text is none."""
    template_arguments: Arguments = Field(default_factory=dict)
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
    """Tokens that end a response, as the tokenizer names them; by default those stored with the
    model, or after training those of rollouts.end_set."""
    batch_size: int = Field(default=256, ge=1)
    """Rows decoded together."""
    seed: Seed = 0
    """Seed of the problems and of sampling."""

    @model_validator(mode="after")
    def _is_of_a_size(self):
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(
                f"evaluation.temperatures is {list(self.temperatures)}; give each temperature once"
            )
        if (num := self.num_problems * self.num_responses) > 10 * MANY_AT_ONCE:
            raise ValueError(
                f"evaluation.num_problems times evaluation.num_responses is {num}, and "
                f"{10 * MANY_AT_ONCE} responses are the most; lower one of them"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Contents of a cache: what it stores for each token, how many completions, and in what
    portions."""

    payload: Literal["hidden", "topk", "completions"] = "hidden"
    """hidden: the teacher's last hidden states, exact for every KL; topk: its objective.top_k
    likeliest tokens; completions: the text alone, which the teacher scores live."""
    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Type of the stored hidden states. What rounding changes is measured and printed, in nats."""
    completions: int = 1
    """Completions of each prompt."""
    rollouts_per_shard: int = 128
    """Prompts with a completion in one file, which is what a kill loses at most on each rank."""


class RecipeFields(RunRecipe):
    """All fields of a recipe, each checked by itself."""

    out: Annotated[Path, Role.OUTPUT, Place.FIRST] = Path("runs/run")
    """Run folder. A run that is already there and unfinished is resumed."""
    student: StudentSpec = StudentSpec()
    teacher: TeacherSpec = TeacherSpec()
    data: Data = Data()
    objective: Objective = Objective()
    weight_schedule: WeightSchedule = WeightSchedule()
    reward: Reward = Reward()
    sampling: Sampling = Sampling()
    rollouts: Rollouts = Rollouts()
    window: Window = Window()
    train: Train = Train()
    validation: Validation = Validation()
    evaluation: Evaluation = Evaluation()

    @property
    def draws_exactly(self) -> bool:
        """Whether a student that writes draws from the distribution that the loss is about."""
        drawn = (self.sampling.temperature, self.sampling.top_p, self.sampling.top_k)
        return drawn == (self.objective.temperature, 1.0, 0)

    @property
    def own_sources(self) -> tuple[str | tuple[str, ...] | None, ...]:
        """Names of what may be in Python files of the user's own, beside the data."""
        return (self.evaluation.source, self.reward.source, self.objective.weights)

    @property
    def rollouts_per_step(self) -> int:
        """The rollouts of one update, over all ranks."""
        return self.train.prompts_per_step * self.reward.group_size

    @property
    def is_scored(self) -> bool:
        """Whether the responses of a step are scored, for the reward or for what tokens count."""
        weights, reward = self.objective.weights, self.reward
        if reward.weight or weights is None:
            return reward.weight > 0
        if own_task(weights) is not None:
            return reward.group_size > 1 or reward.source is not None
        return weights in WEIGHTINGS and WEIGHTINGS[weights].needs_scores


def run_evaluation(recipe: RecipeFields) -> Evaluation:
    """The evaluation of a run, whose chats are told by default what those of the data are: the
    arguments of the template, and the system prompt."""
    evaluation, data = recipe.evaluation, recipe.data
    told: dict[str, Any] = {
        "template_arguments": evaluation.template_arguments or data.template_arguments
    }
    if evaluation.system is None and evaluation.template == "chat":
        told["system"] = data.system
    return evaluation.model_copy(update=told)
