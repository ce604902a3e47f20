"""Rollouts to batches. The only place that shifts, pads or packs."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    rollouts: Sequence[Rollout],
    tokens_per_batch: int,
    num_batches: int = 1,
    *,
    is_packed: bool = False,
    kinds: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """The places in `rollouts` of each batch: longest first, at least `num_batches` of at most
    `tokens_per_batch` tokens, padding included. With `kinds`, one of each rollout, a batch has one
    kind.

    Ranks of a sharded model must take the same number of forward passes, which is what
    `num_batches` is for; it may not exceed the number of rollouts. A rollout that is longer than
    the budget gets a batch of its own: a budget for memory is no reason to drop data.
    """
    lengths = [_num_inputs(rollout) for rollout in rollouts]
    kinds = [None] * len(rollouts) if kinds is None else kinds
    first_of = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    ordered = sorted(
        range(len(rollouts)), key=lambda place: (first_of[kinds[place]], -lengths[place])
    )
    groups: list[list[int]] = []

    def num_tokens(group: list[int]) -> int:
        return sum(lengths[i] for i in group) if is_packed else len(group) * lengths[group[0]]

    for i, place in enumerate(ordered):
        full = (
            not groups
            or kinds[groups[-1][0]] != kinds[place]
            or num_tokens([*groups[-1], place]) > tokens_per_batch
        )
        # Start a new batch as well when only as many rollouts are left as there are batches still
        # to be made.
        if full or len(ordered) - i <= num_batches - len(groups):
            groups.append([])
        groups[-1].append(place)
    return groups


def make_batch(
    rollouts: Sequence[Rollout], device: torch.device | str = "cpu", *, is_packed: bool = False
) -> Batch:
    """One batch, right-padded or packed. Masks come from lengths, never from token ids: the padding
    id may be a real token."""
    input_ids_BT, target_ids_BT, loss_mask_BT, positions_BT = _lay_out(
        rollouts, "student", device, is_packed
    )
    has_own = any(
        rollout.prompt.teacher_ids is not None or rollout.reading is not None
        for rollout in rollouts
    )
    teacher_ids_BT, teacher_mask_BT, teacher_positions_BT = input_ids_BT, loss_mask_BT, positions_BT
    if has_own:
        teacher_ids_BT, _, teacher_mask_BT, teacher_positions_BT = _lay_out(
            rollouts, "teacher", device, is_packed
        )
    return Batch(
        input_ids_BT=input_ids_BT,
        target_ids_BT=target_ids_BT,
        loss_mask_BT=loss_mask_BT,
        positions_BT=positions_BT,
        teacher_ids_BT=teacher_ids_BT,
        teacher_mask_BT=teacher_mask_BT,
        teacher_positions_BT=teacher_positions_BT,
        rollouts=tuple(rollouts),
    )


def without_teacher_prompt(rollout: Rollout) -> Rollout:
    """The rollout with one prompt for both models, the student's."""
    return replace(rollout, prompt=replace(rollout.prompt, teacher_ids=None))


def as_the_student_reads(batch: Batch) -> Batch:
    """The batch for a teacher that reads the student's prompts."""
    return replace(
        batch,
        rollouts=tuple(map(without_teacher_prompt, batch.rollouts)),
        teacher_ids_BT=batch.input_ids_BT,
        teacher_mask_BT=batch.loss_mask_BT,
        teacher_positions_BT=batch.positions_BT,
    )


def _lay_out(
    rollouts: Sequence[Rollout], who: Writer, device: torch.device | str, is_packed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Inputs, targets and loss mask [B, T] of one model; positions where they are packed."""
    inputs, targets, masks, positions = [], [], [], []
    for rollout in rollouts:
        prompt_ids, (completion_ids, trained) = rollout.prompt.ids_of(who), rollout.read_by(who)
        ids = torch.tensor(prompt_ids + completion_ids)
        mask = torch.zeros(len(ids) - 1, dtype=torch.bool)
        mask[len(prompt_ids) - 1 :] = torch.tensor(trained)
        inputs.append(ids[:-1])
        targets.append(ids[1:])
        masks.append(mask)
        positions.append(torch.arange(len(mask)))
    if is_packed:
        packed = [torch.cat(rows)[None].to(device) for rows in (inputs, targets, masks, positions)]
        return packed[0], packed[1], packed[2], packed[3]
    padded = [pad_sequence(rows, batch_first=True).to(device) for rows in (inputs, targets, masks)]
    return padded[0], padded[1], padded[2], None


def _num_inputs(rollout: Rollout) -> int:
    # The last token is predicted and predicts nothing.
    readers: tuple[Writer, ...] = ("student", "teacher")
    lengths = [len(rollout.prompt.ids_of(who)) + len(rollout.read_by(who)[0]) for who in readers]
    return max(lengths) - 1
