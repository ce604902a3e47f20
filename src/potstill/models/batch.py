"""Batch of token ids with the masks of its loss tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from potstill.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rollouts laid out for one forward pass: right-padded, already shifted.

    `target_ids_BT[b, t]` is the token that follows `input_ids_BT[b, t]`, and `loss_mask_BT[b, t]`
    is true iff that token is a loss token. The teacher's prompts may differ, so it has its own
    inputs and mask; the loss tokens, taken row by row, are the same N.
    """

    input_ids_BT: Tensor
    target_ids_BT: Tensor
    loss_mask_BT: Tensor
    teacher_ids_BT: Tensor
    teacher_mask_BT: Tensor
    rollouts: tuple[Rollout, ...]
