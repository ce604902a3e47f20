"""Teachers at URLs, reached and checked; and what a run asks of one wherever it is."""

from collections.abc import Sequence

import torch

from potstill.config import TeacherModel
from potstill.models.batch import Batch
from potstill.teachers.protocol import Teacher
from potstill.teachers.remote.base import RemoteTeacher
from potstill.teachers.remote.logprobs import LogProbTeacher, check_log_probs
from potstill.teachers.remote.states import StatesTeacher, check_states


def reach(
    spec: TeacherModel, device: torch.device, must_write: bool = False, top_k: int = 0
) -> RemoteTeacher:
    """The teacher of a recipe at its URL, checked; `top_k` likeliest tokens are asked for where it
    tells log-probabilities. Raises ModelError, also where it must write and does not."""
    if spec.protocol == "logprobs":
        asked = LogProbTeacher(spec, device, top_k)
        check_log_probs(asked)
        return asked
    teacher = StatesTeacher(spec, device)
    check_states(teacher)
    teacher.find_decoder(must_write)
    return teacher


def fit_to_loss(
    teacher: Teacher | None, vocab_size: int | None, end_class: tuple[int, ...]
) -> None:
    """Tell a teacher of log-probabilities which rows and which end class the loss is over, as its
    servers are asked by that. Raises ModelError for what they do not tell."""
    if isinstance(teacher, LogProbTeacher):
        assert vocab_size is not None, "there is a teacher"
        teacher.fit(vocab_size, end_class)


def expect(teacher: Teacher | None, batches: Sequence[Batch]) -> None:
    """Tell a teacher elsewhere which batches it will be asked for, so that it begins at once;
    nothing for any other."""
    if isinstance(teacher, RemoteTeacher):
        teacher.expect(batches)


def works_here(teacher: Teacher | None) -> bool:
    """Whether what a teacher computes is computed by this process."""
    return not isinstance(teacher, RemoteTeacher)
