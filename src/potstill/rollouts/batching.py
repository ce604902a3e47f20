"""Rollouts to batches. The only place that shifts or pads."""

from collections.abc import Sequence

import torch

from potstill.models.batch import Batch
from potstill.types import Rollout, Writer


def make_batches(
    rollouts: Sequence[Rollout],
    tokens_per_batch: int,
    device: torch.device | str = "cpu",
    num_batches: int = 1,
) -> list[Batch]:
    """The batches of `batch_places`, laid out."""
    groups = batch_places(rollouts, tokens_per_batch, num_batches)
    return [make_batch([rollouts[place] for place in places], device) for places in groups]


def batch_places(
    rollouts: Sequence[Rollout], tokens_per_batch: int, num_batches: int = 1
) -> list[list[int]]:
    """The places in `rollouts` of each batch: longest first, at least `num_batches` of at most
    `tokens_per_batch` padded tokens.

    Ranks of a sharded model must take the same number of forward passes, which is what
    `num_batches` is for; it may not exceed the number of rollouts. A rollout that is longer than
    the budget gets a batch of its own: a budget for memory is no reason to drop data.
    """
    lengths = [_num_inputs(rollout) for rollout in rollouts]
    ordered = sorted(range(len(rollouts)), key=lambda place: -lengths[place])
    groups: list[list[int]] = []
    for i, place in enumerate(ordered):
        full = not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > tokens_per_batch
        # Start a new batch as well when only as many rollouts are left as there are batches still
        # to be made.
        if full or len(ordered) - i <= num_batches - len(groups):
            groups.append([])
        groups[-1].append(place)
    return groups


def make_batch(rollouts: Sequence[Rollout], device: torch.device | str = "cpu") -> Batch:
    """One batch, right-padded. Masks come from lengths, never from token ids: the padding id may be
    a real token."""
    input_ids_BT, target_ids_BT, loss_mask_BT = _lay_out(rollouts, "student", device)
    has_own = any(rollout.prompt.teacher_ids is not None for rollout in rollouts)
    teacher_ids_BT, teacher_mask_BT = input_ids_BT, loss_mask_BT
    if has_own:
        teacher_ids_BT, _, teacher_mask_BT = _lay_out(rollouts, "teacher", device)
    return Batch(
        input_ids_BT=input_ids_BT,
        target_ids_BT=target_ids_BT,
        loss_mask_BT=loss_mask_BT,
        teacher_ids_BT=teacher_ids_BT,
        teacher_mask_BT=teacher_mask_BT,
        rollouts=tuple(rollouts),
    )


def _lay_out(
    rollouts: Sequence[Rollout], who: Writer, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets and loss mask [B, T] of one model."""
    num_positions = max(
        len(rollout.prompt.ids_of(who)) + len(rollout.completion_ids) - 1 for rollout in rollouts
    )
    input_ids_BT = torch.zeros(len(rollouts), num_positions, dtype=torch.long)
    target_ids_BT = torch.zeros_like(input_ids_BT)
    loss_mask_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    for b, rollout in enumerate(rollouts):
        prompt_ids = rollout.prompt.ids_of(who)
        ids = torch.tensor(prompt_ids + rollout.completion_ids)
        length, first = len(ids) - 1, len(prompt_ids) - 1
        input_ids_BT[b, :length] = ids[:-1]
        target_ids_BT[b, :length] = ids[1:]
        loss_mask_BT[b, first:length] = torch.tensor(rollout.trained)
    return input_ids_BT.to(device), target_ids_BT.to(device), loss_mask_BT.to(device)


def _num_inputs(rollout: Rollout) -> int:
    # The last token is predicted and predicts nothing.
    longest = max(len(rollout.prompt.ids_of("student")), len(rollout.prompt.ids_of("teacher")))
    return longest + len(rollout.completion_ids) - 1
