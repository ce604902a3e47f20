"""The protocol of a teacher: who it is, what it costs, its signal at the loss tokens, and whether
it can write; its part among several; and the least of signals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from potstill.kl.head import Head
    from potstill.kl.topk import TopK
    from potstill.models.batch import Batch
    from potstill.models.flops import ModelFlops
    from potstill.types import Prompt


@dataclass(frozen=True, eq=False, kw_only=True)
class Teaching:
    """A teacher by its name in metrics, the operations that its signal takes of us, the weight of
    its divergence, and the levels of the prompts that it teaches; None: all."""

    name: str
    teacher: Teacher
    flops: ModelFlops
    weight: float
    only: tuple[str, ...] | None

    def is_for(self, prompt: Prompt) -> bool:
        """Whether it teaches the completion of this prompt."""
        return self.only is None or prompt.example.level in self.only


@dataclass(frozen=True, kw_only=True)
class OfWritten:
    """A teacher's log-probabilities [N] (nats) of the written tokens, and nothing else of it; for a
    token of the end class, that of the class."""

    log_prob_N: Tensor


class Teacher(Protocol):
    """A teacher, wherever its model is: loaded (`models.LanguageModel`) or behind a cache
    (`cache.CachedTeacher`)."""

    # Who it is.
    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Its own end tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """The rows of its head."""
        ...

    @property
    def context_length(self) -> int | None:
        """How many tokens it can read; None where nothing limits it."""
        ...

    @property
    def config(self) -> Any | None:
        """The configuration that transformers makes of it; None where it reads nothing."""
        ...

    def weights_digest(self) -> str | None:
        """A hash of its weights; None where they are not known."""
        ...

    @property
    def flops(self) -> ModelFlops:
        """The operations that its signal takes of us, and its writing where it writes."""
        ...

    @property
    def head(self) -> Head | None:
        """The head that makes logits of its hidden states; None where its signal is no hidden
        states."""
        ...

    @property
    def can_score(self) -> bool:
        """Whether it has a signal for any rollouts, and not only for those that are stored with
        one."""
        ...

    def signal_at(self, batch: Batch) -> Tensor | TopK | OfWritten:
        """All that is known of it at a batch's N loss tokens: hidden states [N, E], its likeliest
        tokens, or how likely the written ones are."""
        ...

    @property
    def decoder(self) -> Any | None:
        """The causal LM that writes for it (`sampling.sample`); None where it cannot write."""
        ...
