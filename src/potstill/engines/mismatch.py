"""How far the log-probabilities of whoever drew tokens are from the trainer's, and what follows
from it: an engine in another process, or the student that wrote a cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.config import Recipe
from potstill.engines.protocol import EngineError
from potstill.types import Rollout

# Nats a token that are rounding, in float32 and with bfloat16 on either side (docs/engines.md).
FINE_GAP, COARSE_GAP = 1e-3, 0.1


def told_log_probs(
    rollouts: Sequence[Rollout], merged_ids: Sequence[int], like: Tensor
) -> Tensor | None:
    """The writer's log-probability [N] of each loss token that the student wrote, else NaN; None
    where it told none.

    `merged_ids` are one class in the loss, whose log-probability is not that of one of them.
    """
    if any(rollout.engine_log_probs is None for rollout in rollouts):
        return None
    merged = set(merged_ids) if len(merged_ids) > 1 else set()
    values: list[float] = []
    for rollout in rollouts:
        told = rollout.engine_log_probs or ()
        columns = (rollout.completion_ids, rollout.writers, rollout.trained, told)
        for token_id, writer, is_trained, log_prob in zip(*columns, strict=True):
            if is_trained:
                is_known = writer == "student" and token_id not in merged
                values.append(log_prob if is_known else torch.nan)
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def gaps(told_N: Tensor, ours_N: Tensor) -> Tensor:
    """The differences, of the tokens that both know: above 0 where whoever drew found it
    likelier."""
    return (told_N - ours_N)[~told_N.isnan()]


def importance_ratio(told_N: Tensor, ours_N: Tensor, cap: float) -> Tensor:
    """The ratio [N] of the trainer's probability to the writer's, at most `cap`; 1 where it is not
    known."""
    ratio_N = (ours_N - told_N).exp().clamp(max=cap)
    return torch.where(told_N.isnan(), 1.0, ratio_N)


def warned_above(recipe: Recipe, compute_dtype: str) -> float:
    """The mean difference that is warned of, where the student computes in a type."""
    if recipe.engine.warn_above is not None:
        return recipe.engine.warn_above
    types = {recipe.student.dtype, compute_dtype, recipe.writes_in(compute_dtype)}
    return FINE_GAP if types == {"float32"} else COARSE_GAP


def refuse_mismatch(recipe: Recipe, mean: float, step: int) -> None:
    """Raise EngineError where the engine draws from other weights than the trainer has."""
    if mean > recipe.engine.stop_above:
        instead = 'set rollouts.dtype = "float32"'
        if recipe.rollouts.engine != "native":
            instead = (
                "compare the engine's dtype and arguments with the student's, or use "
                'rollouts.engine = "native" with rollouts.dtype = "float32"'
            )
        raise EngineError(
            f"step {step + 1}: the engine's log-probabilities are {mean:.3g} nats a token from the "
            f"trainer's, above engine.stop_above = {recipe.engine.stop_above:g}; nothing was "
            f"updated; {instead}"
        )


def describe_mismatch(
    recipe: Recipe, compute_dtype: str, mean: float, largest: float
) -> str | None:
    """A warning where the difference is more than rounding."""
    usual = warned_above(recipe, compute_dtype)
    if mean <= usual:
        return None
    return (
        f"the engine's log-probabilities are {mean:.3g} nats a token from the trainer's (at most "
        f"{largest:.3g}), more than engine.warn_above = {usual:g}: it draws from "
        "another distribution than the one that is trained. Compare its dtype and arguments with "
        "the student's"
    )
