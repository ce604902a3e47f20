"""A teacher elsewhere, whatever its servers are asked for: its tokenizer and its sizes are here,
and rows of token ids are asked about."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from potstill.config import TeacherModel
from potstill.kl.head import Head
from potstill.kl.topk import TopK
from potstill.models.batch import Batch
from potstill.models.flops import ModelFlops, head_flops
from potstill.teachers.protocol import OfWritten
from potstill.teachers.remote.servers import IN_FLIGHT, Servers
from potstill.teachers.skeleton import skeleton_of
from potstill.types import ModelError, Rollout

# Rows of a request: of states their places are in one header, whose size servers limit.
ROWS_A_REQUEST = 8
# Ids of the checks at the start: both rows hold each other's beginning.
CHECKED = ((1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4))

# Token ids of each row that is asked about.
IdRows = tuple[tuple[int, ...], ...]


class RemoteTeacher:
    """A teacher whose body is at `spec.url`. Its kinds say what is asked there."""

    can_score = True
    decoder: Any | None = None
    head: Head | None = None

    def __init__(self, spec: TeacherModel, device: torch.device):
        self.skeleton = skeleton_of(spec)
        self.spec, self.device, self.name = spec, device, spec.model
        self.tokenizer, self.end_ids = self.skeleton.tokenizer, self.skeleton.end_ids
        self.config = self.skeleton.model.config
        self.vocab_size, self.width = self.skeleton.head.weight_VD.shape
        self.servers = Servers(spec)
        known = [self.skeleton.context_length, *(each.longest for each in self.servers.served)]
        self.context_length = min((each for each in known if each is not None), default=None)
        self.expected: dict[IdRows, list[Future[list[Any]]]] = {}

    @property
    def flops(self) -> ModelFlops:
        return head_flops(self.head)

    def weights_digest(self) -> str | None:
        """The fingerprint that the server tells; stock servers tell none."""
        return self.servers.fingerprint

    def rows_of(self, batch: Batch) -> IdRows:
        """The rows that are asked about for a batch."""
        raise NotImplementedError

    def told_of(self, rows: IdRows, first: int = 0) -> list[Any]:
        """Whatever the servers tell of each of some rows; `first` says which is asked first."""
        raise NotImplementedError

    def signal_at(self, batch: Batch) -> Tensor | TopK | OfWritten:
        raise NotImplementedError

    def expect(self, batches: Sequence[Batch]) -> None:
        """Begin to ask for what `signal_at` will be asked for."""
        rows = map(self.rows_of, batches)
        self.expected = {ids: self.begin(ids) for ids in rows}

    def answers(self, rows: IdRows) -> list[Any]:
        """Whatever the servers tell of each row, which they may have been asked already."""
        asked = self.expected.pop(rows, None) or self.begin(rows)
        return [each for future in asked for each in future.result()]

    def begin(self, rows: IdRows) -> list[Future[list[Any]]]:
        """Requests for all of some rows, under way."""
        starts = range(0, len(rows), ROWS_A_REQUEST)
        parts = [rows[start : start + ROWS_A_REQUEST] for start in starts]
        pool = self.servers.pool
        return [pool.submit(self.told_of, part, first) for first, part in enumerate(parts)]


def read_by_teacher(rollout: Rollout) -> tuple[int, ...]:
    """A rollout as its teacher reads it."""
    return (*rollout.prompt.ids_of("teacher"), *rollout.read_by("teacher")[0])


def asked_twice(teacher: RemoteTeacher) -> tuple[list[Any], list[Any]]:
    """Whatever each server tells of the CHECKED rows, one after the other: asked about one at a
    time, and about both with others under way. Raises ModelError for different fingerprints."""
    fingerprints = {each.fingerprint for each in teacher.servers.served}
    if len(fingerprints) > 1:
        raise ModelError(f"the servers of teacher.url have different weights: {fingerprints}")
    rows = tuple(tuple(i % teacher.vocab_size for i in row) for row in CHECKED)
    num, pool = len(teacher.servers.urls), teacher.servers.pool
    alone = [teacher.told_of((row,), place)[0] for place in range(num) for row in rows]
    many = [pool.submit(teacher.told_of, rows, place) for place in range(2 * IN_FLIGHT)]
    return alone, [each for future in many for each in future.result()]


def refuse_disagreement(teacher: RemoteTeacher, gap: float, rounding: float) -> None:
    """Raise ModelError where what was told twice of the same ids differs by more nats than
    rounding."""
    if gap > rounding:
        raise ModelError(
            f"the teacher at {', '.join(teacher.servers.urls)} disagrees with itself: the same ids "
            f"had log-probabilities that differ by {gap:.3g} nats, and rounding is {rounding:g}"
        )
