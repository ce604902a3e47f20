"""A teacher elsewhere: its head is here, and its last hidden states come over HTTP.

So the divergence is exact in every direction, at E numbers a token. Where its servers write
completions, it writes too. Requests are pure: one that fails is asked again, of the same server or
another, until it is given up.
"""

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.config import TeacherModel
from potstill.models.batch import Batch
from potstill.models.flops import ModelFlops, head_flops
from potstill.teachers.pooling import PATH, read_states, states_request
from potstill.teachers.protocol import Teacher
from potstill.teachers.skeleton import head_of, skeleton_of
from potstill.types import ModelError
from potstill.wire import Answer, Unavailable, request, token_in

# Where completions are asked for.
WRITING = "/v1/completions"
# Rows of a request: their places are in one header, whose size servers limit.
ROWS_A_REQUEST = 8
# Requests under way at once, a server.
IN_FLIGHT = 4
# Seconds between two attempts, at first and at most.
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
# Seconds until a request is given up and asked again.
REQUEST_SECONDS = 120.0
# Ids of the checks at the start: both rows hold each other's beginning.
CHECKED = ((1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4))
# Nats, in log-probabilities of likely tokens.
WIRE_ROUNDING = {"float32": 1e-3, "bfloat16": 0.5}
NUM_LIKELY = 5

# Token ids of each row of a batch.
IdRows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class RemoteDecoder:
    """A model elsewhere that writes, for `engines.remote`: the body of a request in, its answer
    out.

    Several servers answer alike; the number says which is asked first. `config` is the model's.
    """

    ask: Callable[[dict[str, Any], int], Any]
    num_servers: int
    config: Any


class RemoteTeacher:
    """A teacher whose body is at `spec.url`. It scores, and writes where its servers do."""

    can_score = True
    decoder: RemoteDecoder | None = None

    def __init__(self, spec: TeacherModel, device: torch.device):
        skeleton = skeleton_of(spec)
        self.spec, self.device, self.name = spec, device, spec.model
        self.tokenizer, self.end_ids = skeleton.tokenizer, skeleton.end_ids
        self.context_length, self.config = skeleton.context_length, skeleton.model.config
        self.head = head_of(skeleton, device)
        self.vocab_size, self.width = self.head.weight_VD.shape
        self.urls = (spec.url,) if isinstance(spec.url, str) else tuple(spec.url or ())
        self.token = token_in(spec.token_variable)
        self.pool = ThreadPoolExecutor(IN_FLIGHT * len(self.urls), "teacher")
        self.expected: dict[IdRows, list[Future[list[Tensor]]]] = {}
        self.served = [served_by(url, self) for url in self.urls]

    @property
    def flops(self) -> ModelFlops:
        return head_flops(self.head)

    def weights_digest(self) -> str | None:
        """The fingerprint that the server tells; stock servers tell none."""
        return self.served[0][1]

    def expect(self, batches: Sequence[Batch]) -> None:
        """Begin to ask for what `signal_at` will be asked for."""
        rows = map(_rows_of, batches)
        self.expected = {ids: self._begin(ids) for ids in rows}

    def signal_at(self, batch: Batch) -> Tensor:
        ids = _rows_of(batch)
        asked = self.expected.pop(ids, None) or self._begin(ids)
        states = [row_TE for future in asked for row_TE in future.result()]
        rows = []
        for rollout, row_TE in zip(batch.rollouts, states, strict=True):
            # The state after an id is about the next one.
            of_completion = row_TE[-len(rollout.completion_ids) :]
            rows.append(of_completion[torch.tensor(rollout.trained)])
        return torch.cat(rows).to(self.device)

    def _begin(self, ids: IdRows) -> list[Future[list[Tensor]]]:
        """Requests for all rows of a batch, under way."""
        starts = range(0, len(ids), ROWS_A_REQUEST)
        parts = [ids[start : start + ROWS_A_REQUEST] for start in starts]
        return [self.pool.submit(self.states, part, first) for first, part in enumerate(parts)]

    def states(self, ids: Sequence[Sequence[int]], first: int = 0) -> list[Tensor]:
        """The states [T, E] of some rows of ids, from whichever server answers; `first` says which
        is asked first. Raises ModelError when none does for `teacher.patience` seconds."""
        lengths = [len(row) for row in ids]

        def read(answer: Answer, url: str) -> list[Tensor]:
            return read_states(answer, lengths, self.width, self.spec.wire_dtype, url)

        body = states_request(ids, self.spec.wire_dtype)
        return self._asked(PATH, body, read, first=first, seconds=REQUEST_SECONDS)

    def _asked(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[Answer, str], Any],
        *,
        first: int,
        seconds: float,
    ) -> Any:
        """The answer to a pure question, from whichever server gives one within so many seconds;
        `read` is told its URL."""
        deadline, pause = time.monotonic() + self.spec.patience, FIRST_WAIT
        place = first % len(self.urls)
        while True:
            url, (model, _) = self.urls[place], self.served[place]
            try:
                asked = {"model": model, **body}
                answer = request(url, path, asked, seconds=seconds, token=self.token)
                return read(answer, url)
            except Unavailable as error:
                if time.monotonic() + pause > deadline:
                    raise ModelError(
                        f"the teacher at {url} has not answered for teacher.patience = "
                        f"{self.spec.patience:g} seconds ({error}); start it again, and the same "
                        "command goes on"
                    ) from None
            # Not all at once, when a server is back.
            time.sleep(pause * random.uniform(0.5, 1.0))
            place, pause = (place + 1) % len(self.urls), min(2 * pause, LONGEST_WAIT)

    def find_decoder(self, must_write: bool) -> None:
        """Ask each server whether it writes. Raises ModelError for one that must and does not."""
        body = {"prompt": [[1]], "seed": [[0]], "max_tokens": 1}
        for url, (model, _) in zip(self.urls, self.served, strict=True):
            asked = {"model": model, **body}
            try:
                answer = request(url, WRITING, asked, seconds=REQUEST_SECONDS, token=self.token)
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
            ask=self._completions, num_servers=len(self.urls), config=self.config
        )

    def _completions(self, body: dict[str, Any], first: int) -> Any:
        def read(answer: Answer, url: str) -> Any:
            if answer.status != 200:
                raise ModelError(
                    f"the teacher at {url} refuses {WRITING} (status {answer.status}): "
                    f"{answer.text}"
                )
            return answer.json()

        return self._asked(WRITING, body, read, first=first, seconds=self.spec.patience)


def _rows_of(batch: Batch) -> IdRows:
    """The ids that the teacher reads: all but the last, which predicts nothing."""
    return tuple(
        (*rollout.prompt.ids_of("teacher"), *rollout.completion_ids)[:-1]
        for rollout in batch.rollouts
    )


def expect(teacher: Teacher | None, batches: Sequence[Batch]) -> None:
    """Tell a teacher elsewhere which batches it will be asked for, so that it begins at once;
    nothing for any other."""
    if isinstance(teacher, RemoteTeacher):
        teacher.expect(batches)


def reach(spec: TeacherModel, device: torch.device, must_write: bool = False) -> RemoteTeacher:
    """The teacher of a recipe at its URL, checked. Raises ModelError, also where it must write and
    does not."""
    teacher = RemoteTeacher(spec, device)
    check_identity(teacher)
    teacher.find_decoder(must_write)
    return teacher


def works_here(teacher: Teacher | None) -> bool:
    """Whether what a teacher computes is computed by this process."""
    return not isinstance(teacher, RemoteTeacher)


def served_by(url: str, teacher: RemoteTeacher) -> tuple[str, str | None]:
    """The name under which a server has its model, and the fingerprint of the weights where it
    tells one. Raises ModelError where it cannot be reached, or refuses us."""
    try:
        answer = request(url, "/v1/models", seconds=REQUEST_SECONDS, token=teacher.token)
    except Unavailable as error:
        raise ModelError(
            f"the teacher at {url} cannot be reached ({error}); start it, or mend teacher.url"
        ) from None
    _refuse_status(url, answer)
    try:
        (model,) = answer.json()["data"]
        return model["id"], model.get("fingerprint")
    except (Unavailable, AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(
            f"{url} is no server of one model: /v1/models answers {answer.text}"
        ) from None


def _refuse_status(url: str, answer: Answer) -> None:
    if answer.status in (401, 403):
        raise ModelError(
            f"the teacher at {url} wants a token (status {answer.status}); put it into an "
            "environment variable and name that in teacher.token_variable"
        )
    if answer.status != 200:
        raise ModelError(f"the teacher at {url} answers {answer.status}: {answer.text}")


def check_identity(teacher: RemoteTeacher) -> None:
    """Raise ModelError for servers that disagree with each other, or with themselves when they are
    asked for the same ids alone and beside others, by more than rounding."""
    ids = [[i % teacher.vocab_size for i in row] for row in CHECKED]
    fingerprints = {fingerprint for _, fingerprint in teacher.served}
    if len(fingerprints) > 1:
        raise ModelError(f"the servers of teacher.url have different weights: {fingerprints}")
    alone = [teacher.states([row], place)[0] for place in range(len(teacher.urls)) for row in ids]
    many = [teacher.pool.submit(teacher.states, ids, place) for place in range(2 * IN_FLIGHT)]
    found = [row for future in many for row in future.result()]
    log_probs = [
        teacher.head(row_TE.to(teacher.device)).log_softmax(-1) for row_TE in (*alone, *found)
    ]
    likely = [first_TV.topk(NUM_LIKELY, dim=-1).indices for first_TV in log_probs[: len(ids)]]
    rounding = WIRE_ROUNDING[teacher.spec.wire_dtype]
    for place, log_probs_TV in enumerate(log_probs):
        first_TV, likely_T5 = log_probs[place % len(ids)], likely[place % len(ids)]
        gap = float((log_probs_TV - first_TV).gather(-1, likely_T5).abs().max())
        if gap > rounding:
            raise ModelError(
                f"the teacher at {', '.join(teacher.urls)} disagrees with itself: the same ids had "
                f"log-probabilities that differ by {gap:.3g} nats, and rounding is {rounding:g}"
            )
