"""A teacher elsewhere that writes: rows of token ids to its server, completions back.

A request holds what `potstill serve` draws one batch of completions from: prompts, the key of each
one's random numbers, and the caps. So it is pure, and what is written is what the model here would
write, to rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from potstill.config import Sampling
from potstill.engines.answers import choices_in, read_completion
from potstill.seeds import Key
from potstill.teachers.remote.pooling import MAX_DRAWN, MAX_ROWS
from potstill.teachers.remote.states import RemoteDecoder
from potstill.types import Completion

# Requests under way at once, a server: one is computed, and the next one is there.
REQUESTS_A_SERVER = 2


class RemoteEngine:
    """A model that keeps its weights, behind URLs."""

    is_native, is_another = False, False

    def __init__(self, model: RemoteDecoder):
        self.model = model

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
        lengths = [len(prompt) + cap for prompt, cap in zip(prompts, caps, strict=True)]
        # As the native engine, so that rows that it decodes together are here.
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        parts = list(_parts(order, lengths, sampling.batch_size))
        bodies = [
            {
                "prompt": [prompts[place] for place in places],
                "seed": [seeds[place] for place in places],
                "max_tokens": [caps[place] for place in places],
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "stop_token_ids": list(end_ids),
                "vocab_size": vocab_size,
            }
            for places in parts
        ]
        found: dict[int, Completion] = {}
        num_threads = REQUESTS_A_SERVER * self.model.num_servers
        with ThreadPoolExecutor(num_threads) as pool:
            answers = pool.map(self.model.ask, bodies, range(len(bodies)))
            for places, answer in zip(parts, answers, strict=True):
                for place, choice in zip(places, choices_in(answer, len(places)), strict=True):
                    found[place] = read_completion(
                        choice,
                        caps[place],
                        end_ids=frozenset(end_ids),
                        vocab_size=vocab_size,
                        sampling=sampling,
                    )
                    for token_id in found[place].token_ids:
                        on_token(place, token_id)
        return [found[place] for place in range(len(prompts))]

    def update_weights(self, version: int) -> None:
        pass

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass


def _parts(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """The rows of each request: as many as are decoded together, if a server takes as many."""
    part: list[int] = []
    for place in order:
        longest = max(lengths[each] for each in (*part, place))
        if part and (len(part) == min(batch_size, MAX_ROWS) or _is_much(len(part) + 1, longest)):
            yield part
            part = []
        part.append(place)
    if part:
        yield part


def _is_much(num_rows: int, longest: int) -> bool:
    return num_rows * longest > MAX_DRAWN
