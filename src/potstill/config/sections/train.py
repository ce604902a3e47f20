"""The fields of training: how much, how fast, in which types, and what is kept."""

from typing import Annotated, Any, Literal

from pydantic import Field

from potstill.config.roles import Place, Role
from potstill.config.section import Section
from potstill.config.values import LARGEST_RATE, MANY, MANY_AT_ONCE, Beta, Seed


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
    """Tokens of one forward-backward slice on one rank, padding included. Gradients depend on it by
    rounding alone; with student.dropout, other activations are dropped."""
    packing: Annotated[bool, Role.ROUNDING] = False
    """Lay the rollouts of a slice one after the other, without padding. Gradients depend on it by
    rounding alone; with student.dropout, other activations are dropped."""
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
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """adamw-8bit: AdamW whose moments take a byte a weight in place of four; of torchao, as the
    extra of that name installs."""
    stochastic_rounding: bool = False
    """student.dtype = bfloat16: round each update up or down by chance, so that small ones count in
    the mean. By torchao's AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """AdamW's betas."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    normalize: Annotated[Literal["token", "sequence"], Role.OBJECTIVE] = "token"
    """token: the mean over the loss tokens of the step; sequence: the mean of per-sequence
    means."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Autocast type of the student's passes; the loss is always float32. By default bfloat16 on a
    GPU for a checkpoint that is in bfloat16, else float32."""
    loss_memory: Annotated[int, Role.SPEED] = Field(default=256, ge=0)
    """MiB for logits kept between the loss's two passes; 0 computes them twice. Changes speed, not
    results."""
    loss_backend: Annotated[
        Literal["auto", "eager", "compiled", "triton", "plain"], Role.BACKEND
    ] = "auto"
    """How the loss is computed; auto: triton on a GPU, else eager. plain holds all logits in
    memory."""
    activation_checkpointing: Annotated[bool, Role.SPEED] = False
    """Keep the inputs of the student's layers for the backward pass in place of all activations,
    and run each layer once more. Changes speed and memory, not results."""
    compile: Annotated[bool, Role.ROUNDING] = False
    """Compile the student's layers for the passes with gradients, by torch.compile. Gradients
    depend on it by rounding alone; with student.dropout, other activations are dropped."""
    checkpoint_every: Annotated[int, Role.OUTPUT] = Field(default=20, ge=1)
    """Steps between checkpoints; one is also written at the end."""
    keep_checkpoints: Annotated[int | None, Role.OUTPUT] = Field(default=None, ge=1)
    """Checkpoints that are kept, the last ones; 1 by default."""
    checkpoint_files: Annotated[Literal["whole", "sharded"], Role.OUTPUT] = "whole"
    """Files of a checkpoint where several ranks train. whole: rank 0 gathers and writes all;
    sharded: each rank writes its share, into one folder that all of them see. Either is read by any
    number of ranks."""
    tracker: Annotated[Literal["tensorboard", "wandb", "trackio"] | None, Role.OUTPUT] = None
    """Tracker that each step's numbers go to, beside metrics.jsonl; none by default. It must be
    installed. Weights & Biases (wandb) is offline unless the variable WANDB_MODE says otherwise."""
    seed: Annotated[Seed, Role.SEED] = 0
    """Seed of the data order, of sampling and of fresh weights."""
    extended: Annotated[tuple[tuple[int, int], ...], Role.LENGTH] = ()
    """Pairs (step, steps): up to that step, the schedules were those of a run of so many steps.
    `--extend-to` adds one when a run goes on past its end."""

    @property
    def steps_at_first(self) -> int:
        """The steps that the run was begun with, before any extension."""
        return self.extended[0][1] if self.extended else self.steps

    @property
    def needs_torchao(self) -> bool:
        """Whether the optimiser is one of torchao."""
        return self.optimizer != "adamw" or self.stochastic_rounding
