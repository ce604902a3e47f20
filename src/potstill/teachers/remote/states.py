"""A teacher elsewhere that tells its last hidden states: its head is here.

So the divergence is exact in every direction, at E numbers a token. Where its servers write
completions, it writes too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.config import TeacherModel
from potstill.models.batch import Batch
from potstill.teachers.remote.base import (
    CHECKED,
    IdRows,
    RemoteTeacher,
    asked_twice,
    read_by_teacher,
    refuse_disagreement,
)
from potstill.teachers.remote.pooling import PATH, read_states, states_request
from potstill.teachers.remote.servers import REQUEST_SECONDS
from potstill.teachers.skeleton import head_of
from potstill.types import ModelError
from potstill.wire import Answer, Unavailable, request

# Where completions are asked for.
WRITING = "/v1/completions"
# Nats, in log-probabilities of likely tokens.
WIRE_ROUNDING = {"float32": 1e-3, "bfloat16": 0.5}
NUM_LIKELY = 5


@dataclass(frozen=True, kw_only=True)
class RemoteDecoder:
    """A model elsewhere that writes, for `engines.remote`: the body of a request in, its answer
    out.

    Several servers answer alike; the number says which is asked first. `config` is the model's.
    """

    ask: Callable[[dict[str, Any], int], Any]
    num_servers: int
    config: Any


class StatesTeacher(RemoteTeacher):
    """A teacher whose body is at `spec.url`. It scores, and writes where its servers do."""

    def __init__(self, spec: TeacherModel, device: torch.device):
        super().__init__(spec, device)
        self.head = head_of(self.skeleton, device)

    def rows_of(self, batch: Batch) -> IdRows:
        """All ids but the last of each row, which predicts nothing."""
        return tuple(read_by_teacher(rollout)[:-1] for rollout in batch.rollouts)

    def told_of(self, rows: Sequence[Sequence[int]], first: int = 0) -> list[Tensor]:
        """The states [T, E] of some rows of ids."""
        lengths, dtype = [len(row) for row in rows], self.spec.wire_dtype

        def read(answer: Answer, url: str) -> list[Tensor]:
            return read_states(answer, lengths, self.width, dtype, url)

        return self.servers.ask(PATH, states_request(rows, dtype), read, first=first)

    def signal_at(self, batch: Batch) -> Tensor:
        states = self.answers(self.rows_of(batch))
        rows = []
        for rollout, row_TE in zip(batch.rollouts, states, strict=True):
            # The state after an id is about the next one.
            is_trained = torch.tensor(rollout.read_by("teacher")[1])
            rows.append(row_TE[-len(is_trained) :][is_trained])
        return torch.cat(rows).to(self.device)

    def find_decoder(self, must_write: bool) -> None:
        """Ask each server whether it writes. Raises ModelError for one that must and does not."""
        body = {"prompt": [[1]], "seed": [[0]], "max_tokens": 1}
        token, servers = self.servers.token, self.servers
        for url, served in zip(servers.urls, servers.served, strict=True):
            asked = {"model": served.name, **body}
            try:
                answer = request(url, WRITING, asked, seconds=REQUEST_SECONDS, token=token)
                trouble = None if answer.status == 200 else f"status {answer.status}: {answer.text}"
            except Unavailable as error:
                trouble = str(error)
            if trouble is not None and must_write:
                raise ModelError(
                    f"the teacher at {url} writes no completions as `potstill serve` does "
                    f"({trouble}); serve it so, or let it write into a cache first "
                    "(`potstill cache build`)"
                )
            if trouble is not None:
                return
        self.decoder = RemoteDecoder(
            ask=self._completions, num_servers=len(servers.urls), config=self.config
        )

    def _completions(self, body: dict[str, Any], first: int) -> Any:
        def read(answer: Answer, url: str) -> Any:
            if answer.status != 200:
                raise ModelError(
                    f"the teacher at {url} refuses {WRITING} (status {answer.status}): "
                    f"{answer.text}"
                )
            return answer.json()

        return self.servers.ask(WRITING, body, read, first=first, seconds=self.spec.patience)


def check_states(teacher: StatesTeacher) -> None:
    """Raise ModelError for servers that disagree with each other, or with themselves when they are
    asked for the same ids alone and beside others, by more than rounding."""
    assert teacher.head is not None, "it was read"
    alone, found = asked_twice(teacher)
    log_probs = [
        teacher.head(row_TE.to(teacher.device)).log_softmax(-1) for row_TE in (*alone, *found)
    ]
    likely = [first_TV.topk(NUM_LIKELY, dim=-1).indices for first_TV in log_probs[: len(CHECKED)]]
    gap = 0.0
    for place, log_probs_TV in enumerate(log_probs):
        first_TV, likely_T5 = log_probs[place % len(CHECKED)], likely[place % len(CHECKED)]
        differences = (log_probs_TV - first_TV).gather(-1, likely_T5).abs()
        gap = max(gap, float(differences.max()))
    refuse_disagreement(teacher, gap, WIRE_ROUNDING[teacher.spec.wire_dtype])
