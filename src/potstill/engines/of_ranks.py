"""One engine for all ranks: rank 0 asks for what each wants, and deals out what was written."""

from collections.abc import Callable, Sequence
from typing import Any

from potstill.config import Sampling
from potstill.engines.protocol import Engine, EngineError
from potstill.engines.shared import Weights
from potstill.models import distributed
from potstill.models.distributed import World
from potstill.seeds import Key
from potstill.types import Completion, NonFiniteError


class EngineOfRanks:
    """An engine that rank 0 has, for all ranks. Every rank must call `write` as often as the
    others."""

    is_native, is_another = False, True

    def __init__(self, model: Any, alone: Engine | None, world: World, weights: Weights):
        """`alone` is the engine, on rank 0, which has its weights; the others take part."""
        self.model, self.alone, self.world, self.weights = model, alone, world, weights

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        seeds: Sequence[Key],
        *,
        max_tokens: int | Sequence[int],
        end_ids: Sequence[int],
        sampling: Sampling,
        vocab_size: int | None = None,
        on_token: Callable[[int, int], None] = lambda place, token_id: None,
    ) -> list[Completion]:
        caps = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        asked = distributed.gather((list(prompts), list(seeds), caps), self.world)
        written: list[Completion] | EngineError | NonFiniteError | None = None
        if self.alone is not None:
            every_prompt, every_seed, every_cap = (
                [each for of_rank in asked for each in of_rank[part]] for part in range(3)
            )
            try:
                written = self.alone.write(
                    every_prompt,
                    every_seed,
                    max_tokens=every_cap,
                    end_ids=end_ids,
                    sampling=sampling,
                    vocab_size=vocab_size,
                )
            except (EngineError, NonFiniteError) as error:
                written = error
        # A round may take longer than ranks wait for each other in a step.
        distributed.wait_for_rank_0(self.world)
        found = distributed.gather(written, self.world)[0]
        if isinstance(found, Exception):
            raise found
        first = sum(len(of_rank[0]) for of_rank in asked[: self.world.rank])
        mine = found[first : first + len(prompts)]
        for place, completion in enumerate(mine):
            for token_id in completion.token_ids:
                on_token(place, token_id)
        return mine

    def update_weights(self, version: int) -> None:
        if self.alone is None:
            self.weights.renew(version)
        else:
            self.alone.update_weights(version)

    def rest(self) -> None:
        if self.alone is not None:
            self.alone.rest()

    def close(self) -> None:
        if self.alone is not None:
            self.alone.close()
