"""The protocol of an engine: it writes completions with a model's weights, and takes new ones."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from potstill.config import Sampling
from potstill.types import Completion


class EngineError(ValueError):
    """An engine that cannot be used or has died; the message is one line and says what to do."""


class Engine(Protocol):
    """A writer of completions."""

    @property
    def model(self) -> Any:
        """The module whose weights it writes with, or an empty copy of it. They stay as they are
        from `update_weights` until the last completion is written."""
        ...

    @property
    def is_native(self) -> bool:
        """Whether this process decodes."""
        ...

    @property
    def is_another(self) -> bool:
        """Whether it draws from a slightly other distribution than the trainer's model has, with
        which it is compared."""
        ...

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
        """Draw one completion for each prompt; arguments and result are those of `sample`.

        Only the native engine tells entropies. Raises NonFiniteError where there is no distribution
        to draw from, and EngineError.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Write with the weights that the model has now, after so many steps. Every rank must call
        this."""
        ...

    def rest(self) -> None:
        """Need as little as it can of the device, until the next completion."""
        ...

    def close(self) -> None:
        """End what the engine has started."""
        ...
