"""The native engine: this process decodes. It is the reference of the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.config import Sampling
from potstill.models.sampling import sample
from potstill.types import Completion


@dataclass(frozen=True)
class NativeEngine:
    """Decoding with the module itself, whose weights are new by themselves.

    `is_another` where the module is a copy of the student in another type.
    """

    model: Any
    is_another: bool = False
    is_native = True

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        seeds: Sequence[tuple[int, ...]],
        *,
        max_tokens: int | Sequence[int],
        end_ids: Sequence[int],
        sampling: Sampling,
        vocab_size: int | None = None,
        on_token: Callable[[int, int], None] = lambda place, token_id: None,
    ) -> list[Completion]:
        return sample(
            self.model,
            prompts,
            seeds,
            max_tokens=max_tokens,
            end_ids=end_ids,
            sampling=sampling,
            vocab_size=vocab_size,
            on_token=on_token,
        )

    def update_weights(self, version: int) -> None:
        pass

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass
