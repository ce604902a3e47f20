"""The share of a step that one device has: rollouts, their lengths, and the batches they make."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from potstill.config import Recipe
from potstill.types import DataError, Example, Prompt, Rollout, Writer


@dataclass(frozen=True, kw_only=True)
class Work:
    """Rollouts of one device in a step, all of one length: tokens of a prompt and of a completion.

    `rows` of them make a batch, and there are `num_batches`.
    """

    num_rollouts: int
    prompt_tokens: int
    completion_tokens: int
    rows: int
    num_batches: int

    @property
    def positions(self) -> int:
        """The tokens of a rollout that go in: the last one predicts nothing."""
        return self.prompt_tokens + self.completion_tokens - 1

    @property
    def loss_tokens(self) -> int:
        """Those of a batch."""
        return self.rows * self.completion_tokens


def work_of(
    recipe: Recipe, prompt_tokens: int, completion_tokens: int, num_devices: int = 1
) -> Work:
    """The share of one of `num_devices`. Raises DataError where they cannot share the prompts."""
    per_step = recipe.train.prompts_per_step
    if per_step % num_devices:
        raise DataError(
            f"train.prompts_per_step is {per_step}, which {num_devices} devices cannot share "
            f"evenly; use a multiple of {num_devices}"
        )
    num_rollouts = recipe.rollouts_per_step // num_devices
    positions = prompt_tokens + completion_tokens - 1
    rows = min(max(recipe.train.tokens_per_batch // positions, 1), num_rollouts)
    return Work(
        num_rollouts=num_rollouts,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        rows=rows,
        num_batches=math.ceil(num_rollouts / rows),
    )


def rollout_like(work: Work, writer: Writer) -> Rollout:
    """A rollout of these lengths, for functions that count what one takes."""
    prompt = Prompt(example=Example(id="", prompt=""), token_ids=(0,) * work.prompt_tokens)
    num = work.completion_tokens
    return Rollout(
        prompt=prompt,
        completion_ids=(0,) * num,
        trained=(True,) * num,
        writers=(writer,) * num,
        stop="length",
    )


def compute_dtype_on(recipe: Recipe, config: Any, *, on_cpu: bool) -> str:
    """The autocast type of the student's passes: the recipe's, else that in which the configuration
    says that its checkpoint is, where the device is made for it."""
    if recipe.train.compute_dtype is not None:
        return recipe.train.compute_dtype
    return "bfloat16" if config.dtype == torch.bfloat16 and not on_cpu else "float32"


def with_field(recipe: Recipe, field: str, value: Any) -> Recipe:
    """The recipe with another value of a field, unchecked: it is for counting alone."""
    section, _, name = field.partition(".")
    changed = getattr(recipe, section).model_copy(update={name: value})
    return recipe.model_copy(update={section: changed})
