"""The learning rate of each step, what it is where the recipe does not say, and when a run is
spent."""

import math

from potstill.config import Train

# The rate of up to a billion weights; a larger student takes that over its billions, but no less
# than LEAST_LR.
USUAL_LR, LEAST_LR = 1e-5, 1e-6
# The best rate for an adapter over that for all weights (Schulman et al., LoRA Without Regret,
# 2025).
ADAPTER_LR = 10


def usual_lr(num_weights: int, has_adapter: bool = False) -> float:
    """The peak learning rate where a recipe has none: 1e-5 to 1e-6, by the size of the student, and
    ten times that where an adapter learns."""
    of_all = max(USUAL_LR / max(num_weights / 1e9, 1.0), LEAST_LR)
    return ADAPTER_LR * of_all if has_adapter else of_all


def with_lr(config: Train, num_weights: int, has_adapter: bool = False) -> Train:
    """The settings with a learning rate, whether the recipe says one or not."""
    if config.lr is not None:
        return config
    return config.model_copy(update={"lr": usual_lr(num_weights, has_adapter)})


def describe_lr(num_weights: int, has_adapter: bool = False) -> str:
    """A line on the rate for the user of a recipe that says none."""
    what = "the adapter of a student" if has_adapter else "a student"
    return (
        f"train.lr is not set: {usual_lr(num_weights, has_adapter):.2g}, which is usual for {what} "
        f"of {num_weights:,} weights; very small or fresh ones need far more"
    )


def planned_steps(config: Train, step: int) -> int:
    """How many steps the run was to have when step 0, 1, ... was taken: what schedules over all
    steps go by."""
    return next((steps for until, steps in config.extended if step < until), config.steps)


def learning_rate(config: Train, step: int, flops: float = 0.0) -> float:
    """The rate of step 0, 1, ..., before which `flops` were spent: linear warm-up, then constant or
    a cosine.

    The cosine would reach 0 after the last step, or when the operations are spent, whichever is
    nearer.
    """
    assert config.lr is not None
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(
        planned_steps(config, step) - config.warmup_steps, 1
    )
    if config.flops is not None:
        progress = max(progress, flops / config.flops)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def is_spent(config: Train, num_steps: int, flops: float) -> bool:
    """Whether a run that has done this much has reached its last step or its operations."""
    return num_steps >= config.steps or (config.flops is not None and flops >= config.flops)


def is_extended_at(config: Train, num_steps: int) -> bool:
    """Whether a run ended after so many steps once and was extended."""
    return any(num_steps == until for until, _ in config.extended)
