"""Values that the parts of potstill exchange. No logic; torch is imported for annotations alone.

Shapes: B sequences, T positions, N loss tokens (flattened), V shared vocabulary, D student hidden,
E teacher hidden. Position t of every `_BT` tensor is about predicting token t+1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# A message of a chat: `role`, `content` (a text, or a list of text parts) and whatever else a
# template may read.
Message = dict[str, Any]
# Roles of messages that say how to answer.
SYSTEM_ROLES = ("system", "developer")
Writer = Literal["teacher", "student", "dataset"]
Stop = Literal["end", "length"]


class NonFiniteError(ArithmeticError):
    """A loss, gradient or logit that is not finite; raised before any update with it."""


class ModelError(ValueError):
    """A model that cannot be used as asked; the message is one line and says what to do."""


class DataError(ValueError):
    """Prompts that cannot be used; the message is one line and says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One problem as text: what a task or a data file provides.

    `prompt` is a string or a list of chat messages, `teacher_prompt` what the teacher is asked
    instead; `completion` is a list of (text, is it trained on) segments, taken as they are, or of
    messages, whose assistant's turns are trained on; `tools` are what the messages may call;
    `system` is put before a chat that has no such message; `answer` is for the task's scorer;
    `level` names a difficulty; `where` says in messages where the example came from, and `source`
    is the place of its data source among several.
    """

    id: str
    prompt: str | tuple[Message, ...]
    completion: tuple[tuple[str, bool], ...] | tuple[Message, ...] | None = None
    answer: str | None = None
    level: str = ""
    teacher_prompt: str | tuple[Message, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    system: str | None = None
    where: str = field(default="", compare=False)
    source: int = field(default=0, compare=False)

    @property
    def name(self) -> str:
        """Its name in messages to the user."""
        return f"prompt {self.id!r}" + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """An example after tokenisation. `completion_ids` and `trained`, of one length, exist when the
    data has them.

    `teacher_ids` is the teacher's prompt where it is not the student's. The completion is the same
    for both. `cached` says where a completion and the teacher's signal on it are in the cache:
    shard and row. `num_cut` tokens of the prompt were left out at its beginning.
    """

    example: Example
    token_ids: tuple[int, ...]
    completion_ids: tuple[int, ...] | None = None
    trained: tuple[bool, ...] | None = None
    teacher_ids: tuple[int, ...] | None = None
    cached: tuple[int, int] | None = None
    num_cut: int = 0

    def ids_of(self, who: Writer) -> tuple[int, ...]:
        """The prompt of this model, as token ids."""
        return (
            self.teacher_ids
            if who == "teacher" and self.teacher_ids is not None
            else self.token_ids
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The tokens that a model wrote after a prompt, its stop token included.

    `log_probs` and `entropies` (nats, one a token) are those of the distribution that each token
    was drawn from; an engine in another process tells no entropies. `models` says which of the
    models that write by turns it was, 0 where there is one.
    """

    token_ids: tuple[int, ...]
    stop: Stop
    log_probs: tuple[float, ...]
    entropies: tuple[float, ...]
    models: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """The score of a response beside those of its group, the responses to the same prompt: their
    mean, their standard deviation, and its advantage over them."""

    score: float
    group_score: float
    group_deviation: float
    advantage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A completion as a teacher with another tokenizer reads it: its own tokens, of which `trained`
    are in the loss, and the number of the span that each loss token is in, of the student's and of
    its own."""

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    student_spans: tuple[int, ...]
    teacher_spans: tuple[int, ...]
    num_spans: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One prompt, one completion, and who wrote each token. `trained[i]` is false where token i is
    no loss token.

    `log_probs` are the student's of its loss tokens when the rollout was new, None while it is;
    `credit` is there where responses are scored. `engine_log_probs` are those of all tokens as an
    engine in another process told them, or the cache of an older student; None where this student
    wrote in this process. `reading` is there where the teacher has another tokenizer.
    """

    prompt: Prompt
    completion_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    writers: tuple[Writer, ...]
    stop: Stop
    log_probs: tuple[float, ...] | None = None
    credit: Credit | None = None
    engine_log_probs: tuple[float, ...] | None = None
    reading: Reading | None = None

    def read_by(self, who: Writer) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """The tokens of the completion as this model reads it, and which of them are loss
        tokens."""
        if who == "teacher" and self.reading is not None:
            return self.reading.token_ids, self.reading.trained
        return self.completion_ids, self.trained
