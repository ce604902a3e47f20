"""What the parts of potstill say to each other. No logic; torch is imported for annotations alone.

Shapes: B sequences, T positions, N loss tokens (flattened), V shared vocabulary, D student hidden, E teacher hidden.
Position t of every `_BT` tensor is about predicting token t+1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Message = dict[str, str]
PrefixSource = Literal["teacher", "student", "dataset"]
Stop = Literal["end", "length"]


class NonFiniteError(ArithmeticError):
    """A loss, gradient or logit that is not finite; raised before any update with it."""


@dataclass(frozen=True, slots=True)
class Example:
    """One problem as text: what a task or a data file provides.

    `prompt` is a string or a list of chat messages; `completion` is a list of (text, is it trained on) segments;
    `answer` is for the task's scorer; `level` names a difficulty.
    """

    id: str
    prompt: str | tuple[Message, ...]
    completion: tuple[tuple[str, bool], ...] | None = None
    answer: str | None = None
    level: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """An example after tokenisation. `completion_ids` and `trained`, of one length, exist when the data has them."""

    example: Example
    token_ids: tuple[int, ...]
    completion_ids: tuple[int, ...] | None = None
    trained: tuple[bool, ...] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote after a prompt, its stop token included.

    `log_probs` and `entropies` (nats, one a token) are those of the distribution that each token was drawn from.
    """

    token_ids: tuple[int, ...]
    stop: Stop
    log_probs: tuple[float, ...]
    entropies: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One prompt, one completion, and who wrote it. `trained[i]` is false where token i is no loss token."""

    prompt: Prompt
    completion_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    source: PrefixSource
    stop: Stop


@dataclass(frozen=True, slots=True)
class Batch:
    """Rollouts laid out for one forward pass: right-padded, already shifted.

    `target_ids_BT[b, t]` is the token that follows `input_ids_BT[b, t]`, and `loss_mask_BT[b, t]` is true iff that
    token is a loss token.
    """

    input_ids_BT: Tensor
    target_ids_BT: Tensor
    loss_mask_BT: Tensor
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Detached float32 statistics of N loss tokens, in nats. The teacher's are None when there is no teacher."""

    student_entropy_N: Tensor
    forward_kl_N: Tensor | None = None
    reverse_kl_N: Tensor | None = None
    teacher_entropy_N: Tensor | None = None
