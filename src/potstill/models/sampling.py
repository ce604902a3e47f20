"""Completions by decoding with a model's own weights: token ids in, completions out. No text, no
data sets.

It drives transformers' forward and cache, so any causal LM with `past_key_values` works. Rows are
decoded together in batches of similar length, and a finished row leaves its batch. Each row draws
from a random stream of its own, so a completion depends on its seed and not on what was sampled
before. Nor does it depend on what else is in the batch, or on how many ranks there are, but for
rounding: a model's numbers for a row differ in their last bits with the batch's shape, and a token
is another one where its random number falls into that gap. The same batch on the same machine gives
the same bits.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from potstill.config import Sampling
from potstill.models.drawing import draw
from potstill.models.lean.head import thin_head
from potstill.types import Completion, NonFiniteError

# Rows are dropped when the rest is at most this share of the batch: dropping copies the cache,
# keeping wastes compute.
COMPACT_AT = 0.85
# Tokens that a full cache gets room for: making room copies it, and dropping rows copies the unused
# room as well.
ROOM = 32


class OtherWriter(NamedTuple):
    """A second model that may write each token, what it reads, and the probability that a token is
    its own.

    `seeds` name the random stream of each row that says whose turn it is. They are not those that
    draw the tokens, so that the draws are those of one model alone.
    """

    model: Any
    prompts: Sequence[tuple[int, ...]]
    share: float
    seeds: Sequence[tuple[int, ...]]

    def only(self, rows: Sequence[int]) -> "OtherWriter":
        """The same for some of the rows."""
        return self._replace(
            prompts=[self.prompts[i] for i in rows], seeds=[self.seeds[i] for i in rows]
        )


@torch.inference_mode()
def sample(
    model,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[tuple[int, ...]],
    *,
    max_tokens: int | Sequence[int],
    end_ids: Sequence[int],
    sampling: Sampling,
    vocab_size: int | None = None,
    on_token: Callable[[int, int], None] = lambda place, token_id: None,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
    other: OtherWriter | None = None,
) -> list[Completion]:
    """Draw one completion of 1 to `max_tokens` tokens (one number, or one a prompt) for each
    prompt, in their order.

    `model` is a Hugging Face causal LM, `seeds` holds integers that name each row's random stream,
    and decoding stops after any of `end_ids`, which is then part of the completion. Only ids below
    `vocab_size` are drawn, from the distribution over them; the rows of a head beyond that may have
    no token. `on_token` is told each token as it is drawn, after the place of its prompt, and
    `on_tokens` how many tokens each batch wrote. With an `other` writer each token comes from it
    with the probability that is its share: an exact draw from the mixture of both distributions, of
    which it is also known whose it was. Raises NonFiniteError when a model gives no distribution to
    draw from. With temperature 1 and no truncation this is exact ancestral sampling, by inversion
    of the cumulative distribution.
    """
    caps = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[Completion | None] = [None] * len(prompts)
    for start in range(0, len(order), sampling.batch_size):
        rows = order[start : start + sampling.batch_size]
        max_length = max(caps[i] for i in rows)
        decoders = [_Decoder(model, [prompts[i] for i in rows], max_length)]
        others = None if other is None else other.only(rows)
        if others is not None:
            decoders.append(_Decoder(others.model, others.prompts, max_length))
        decoded = _decode(
            decoders,
            _Draws.of([seeds[i] for i in rows], max_length, others, decoders[0].device),
            [caps[i] for i in rows],
            end_ids=frozenset(end_ids),
            sampling=sampling,
            vocab_size=vocab_size,
            on_token=[functools.partial(on_token, i) for i in rows],
        )
        for i, completion in zip(rows, decoded, strict=True):
            completions[i] = completion
        on_tokens(sum(len(completion.token_ids) for completion in decoded))
    return completions  # pyright: ignore[reportReturnType]


class _Draws(NamedTuple):
    """Random numbers of a batch: one a token to draw it with, and whether it is the other writer's
    turn."""

    uniforms_LR: Tensor
    is_others_LR: Tensor

    @staticmethod
    def of(
        seeds: Sequence[tuple[int, ...]],
        max_length: int,
        other: OtherWriter | None,
        device: torch.device,
    ) -> "_Draws":
        streams = [np.random.default_rng(seed).random(max_length) for seed in seeds]
        uniforms_LR = torch.from_numpy(np.stack(streams, axis=1)).to(device)
        if other is None:
            return _Draws(
                uniforms_LR, torch.zeros(uniforms_LR.shape, dtype=torch.bool, device=device)
            )
        turns = [
            np.random.default_rng(seed).random(max_length) < other.share for seed in other.seeds
        ]
        return _Draws(uniforms_LR, torch.from_numpy(np.stack(turns, axis=1)).to(device))

    def keep(self, kept: Tensor) -> "_Draws":
        return _Draws(self.uniforms_LR[:, kept], self.is_others_LR[:, kept])


class _Decoder:
    """One model in the middle of a batch: the ids that come next, positions, mask, and cache.

    `length` is how many ids the cache holds after the next pass.
    """

    def __init__(self, model, prompts: Sequence[tuple[int, ...]], max_length: int):
        self.model, self.cache = model, None
        self.device = next(model.parameters()).device
        self.next_ids_RT, self.positions_RT, self.mask_RT = _left_pad(
            prompts, max_length, self.device
        )
        self.length = self.next_ids_RT.shape[1]

    def next_logits(self) -> Tensor:
        """The logits [R, V] after the ids that come next, which are then in the cache."""
        places = slice(self.length - self.next_ids_RT.shape[1], self.length)
        positions_RT = self.positions_RT[:, places]
        inputs = {
            "input_ids": self.next_ids_RT,
            "position_ids": positions_RT,
            "past_key_values": self.cache,
        }
        if self.mask_RT is not None:
            inputs["attention_mask"] = self.mask_RT[:, : self.length]
        with thin_head(self.model):
            output = self.model(
                **inputs, **_quiet_routers(self.model), use_cache=True, logits_to_keep=1
            )
        if self.cache is None:
            self.cache = _with_room(output.past_key_values)
        return output.logits[:, -1]

    def push(self, ids_R: Tensor) -> None:
        self.next_ids_RT = ids_R[:, None]
        self.length += 1

    def keep(self, kept: Tensor) -> None:
        """Drop all rows but these."""
        assert self.cache is not None, "a pass comes first"
        # Not batch_select_indices, which layers with recurrent states do not have.
        self.cache.reorder_cache(kept)
        if self.mask_RT is not None:
            self.positions_RT, self.mask_RT = self.positions_RT[kept], self.mask_RT[kept]


def _decode(
    decoders: list[_Decoder],
    draws: _Draws,
    caps: list[int],
    *,
    end_ids: frozenset[int],
    sampling: Sampling,
    vocab_size: int | None,
    on_token: Sequence[Callable[[int], None]],
) -> list[Completion]:
    """Decode one batch. R is the number of rows still in it, L the largest cap. Each row has an
    `on_token`."""
    written = [_Written([], [], [], []) for _ in caps]
    rows = list(range(len(caps)))
    running = set(rows)
    # The rows of each draw, and tensors of its numbers, which stay on their device for now.
    drawn_rows: list[int] = []
    numbers: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(max(caps)):
        drawn = [
            draw(decoder.next_logits()[:, :vocab_size], draws.uniforms_LR[step], sampling)
            for decoder in decoders
        ]
        is_others_R = draws.is_others_LR[step]
        ids_R, log_probs_R, entropies_R = (
            drawn[0] if len(drawn) == 1 else _by_turns(*drawn, is_others_R)
        )
        drawn_rows += rows
        numbers.append((log_probs_R, entropies_R, is_others_R))
        # The one wait of a token for a GPU. Finished rows that have not left yet draw tokens which
        # are thrown away.
        for row, token_id in zip(rows, ids_R.tolist(), strict=True):
            if row in running:
                written[row].token_ids.append(token_id)
                on_token[row](token_id)
                if token_id in end_ids or step + 1 == caps[row]:
                    running.remove(row)
        if not running:
            break
        if len(running) <= COMPACT_AT * len(rows):
            kept = torch.tensor(
                [i for i, row in enumerate(rows) if row in running], device=ids_R.device
            )
            rows = [row for row in rows if row in running]
            ids_R, draws = ids_R[kept], draws.keep(kept)
            for decoder in decoders:
                decoder.keep(kept)
        for decoder in decoders:
            decoder.push(ids_R)
    columns = [torch.cat(column).tolist() for column in zip(*numbers, strict=True)]
    for row, *of_token in zip(drawn_rows, *columns, strict=True):
        written[row].add(*of_token)
    return [completion.finished(end_ids) for completion in written]


def _by_turns(
    ours: tuple[Tensor, ...], others: tuple[Tensor, ...], is_others_R: Tensor
) -> list[Tensor]:
    """The other writer's draw where it is its turn, else ours."""
    return [
        torch.where(is_others_R, theirs, mine) for mine, theirs in zip(ours, others, strict=True)
    ]


def _quiet_routers(model) -> dict[str, bool]:
    """Keeps a mixture of experts from computing its auxiliary loss, which wants a mask as long as
    its input."""
    wants_loss = getattr(model.config.get_text_config(), "output_router_logits", False)
    return {"output_router_logits": False} if wants_loss else {}


class _Written(NamedTuple):
    """The tokens of one completion so far, with their log-probabilities, entropies and writers."""

    token_ids: list[int]
    log_probs: list[float]
    entropies: list[float]
    models: list[int]

    def add(self, log_prob: float, entropy: float, is_others: bool) -> None:
        """The numbers of the next token; those of what was drawn after the last one are left
        out."""
        if len(self.models) < len(self.token_ids):
            self.log_probs.append(log_prob)
            self.entropies.append(entropy)
            self.models.append(int(is_others))

    def finished(self, end_ids: frozenset[int]) -> Completion:
        """Raises NonFiniteError for a token that was drawn from no distribution."""
        if not all(map(math.isfinite, self.log_probs)):
            raise NonFiniteError(
                "the logits of the model that writes are not finite, so nothing can be drawn "
                "from them"
            )
        stop = "end" if self.token_ids[-1] in end_ids else "length"
        return Completion(
            token_ids=tuple(self.token_ids),
            stop=stop,
            log_probs=tuple(self.log_probs),
            entropies=tuple(self.entropies),
            models=tuple(self.models),
        )


def _left_pad(prompts, max_tokens: int, device) -> tuple[Tensor, Tensor, Tensor | None]:
    """The prompts' ids, and positions and mask over prompts and completions.

    Where all prompts are equally long there is no mask, as attention is faster without, and one row
    of positions.
    """
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    ids_RT = torch.tensor(
        [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)],
        device=device,
    )
    positions_1T = torch.arange(longest + max_tokens, device=device)[None]
    if not any(padding):
        return ids_RT, positions_1T, None
    positions_RT = positions_1T - torch.tensor(padding, device=device)[:, None]
    return ids_RT, positions_RT.clamp(min=0), (positions_RT >= 0).long()


class _RoomyLayer(DynamicLayer):
    """Keys and values with room to write the next ones into; transformers' own layer copies them
    all at every token."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        vars(self).update(vars(layer))
        self.key_room, self.value_room = self.keys, self.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        start, num_new = self.keys.shape[-2], key_states.shape[-2]
        if start + num_new > self.key_room.shape[-2]:
            self.key_room = nn.functional.pad(self.keys, (0, 0, 0, num_new + ROOM))
            self.value_room = nn.functional.pad(self.values, (0, 0, 0, num_new + ROOM))
        self.key_room.narrow(-2, start, num_new).copy_(key_states)
        self.value_room.narrow(-2, start, num_new).copy_(value_states)
        self.keys = self.key_room.narrow(-2, 0, start + num_new)
        self.values = self.value_room.narrow(-2, 0, start + num_new)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        length = self.keys.shape[-2]
        self.key_room, self.value_room = self.key_room[beam_idx], self.value_room[beam_idx]
        self.keys, self.values = (
            self.key_room.narrow(-2, 0, length),
            self.value_room.narrow(-2, 0, length),
        )


def _with_room(cache):
    """The cache with its plain layers made roomy; others, such as sliding windows, stay as the
    model made them."""
    cache.layers = [
        _RoomyLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer
        for layer in cache.layers
    ]
    return cache
