"""Batch of token ids with the masks of its loss tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from potstill.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rollouts laid out for one forward pass, already shifted: right-padded, or packed.

    `target_ids_BT[b, t]` is the token that follows `input_ids_BT[b, t]`, and `loss_mask_BT[b, t]`
    is true iff that token is a loss token. The teacher's prompts may differ, so it has its own
    inputs and mask; the loss tokens, taken row by row, are the same N. A teacher with another
    tokenizer has loss tokens of its own.

    Packed, all rollouts are one sequence [1, T], whose positions start anew with each. Padded,
    there are no positions, as they are those of a row.
    """

    input_ids_BT: Tensor
    target_ids_BT: Tensor
    loss_mask_BT: Tensor
    positions_BT: Tensor | None
    teacher_ids_BT: Tensor
    teacher_mask_BT: Tensor
    teacher_positions_BT: Tensor | None
    rollouts: tuple[Rollout, ...]

    @property
    def student_inputs(self) -> tuple[Tensor, ...]:
        """The arguments of a student's forward pass."""
        return _inputs(self.input_ids_BT, self.positions_BT)

    @property
    def teacher_inputs(self) -> tuple[Tensor, ...]:
        """The arguments of a teacher's forward pass."""
        return _inputs(self.teacher_ids_BT, self.teacher_positions_BT)


def _inputs(ids_BT: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, ...]:
    return (ids_BT,) if positions_BT is None else (ids_BT, positions_BT)
