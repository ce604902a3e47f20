"""Batches without padding: rows one after the other in one sequence, of which each attends to
itself alone.

Positions start anew with each row, by which transformers' flash attention tells them apart. For
sdpa it would make a mask of all positions by all; here each row is computed by itself.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from potstill.types import ModelError

# The name of `_attend` among transformers' implementations. It has no function that makes masks.
ROWS_ATTENTION = "potstill_rows"
# How far states may be from those of padded rows, relative to the largest of them.
ALLOWED, ALLOWED_IN_16_BITS = 1e-4, 3e-2
# Rows of the comparison, which are longer than a model's window where that is quick.
ROW_LENGTHS, WIDEST_WINDOW = (5, 3, 4), 128


@contextlib.contextmanager
def rows_apart(*models: Any) -> Iterator[None]:
    """Within, passes of those that are models, and have sdpa attention, take packed batches; the
    backward pass of a layer that runs again included."""
    from transformers import AttentionInterface

    # The rows' lengths, as plain numbers, would be compiled anew for each batch.
    AttentionInterface.register(ROWS_ATTENTION, torch.compiler.disable(_attend))
    whole = [model for model in models if isinstance(model, nn.Module)]
    configs: list[Any] = [
        getattr(each, "config", None) for model in whole for each in model.modules()
    ]
    changed = [config for config in configs if _attention_of(config) == "sdpa"]
    for config in changed:
        config._attn_implementation_internal = ROWS_ATTENTION
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation_internal = "sdpa"


def refuse_unpackable(*models: Any) -> None:
    """Raise ModelError unless packed rows give the states that padded ones do, of those that are
    models here."""
    for model in models:
        if isinstance(model, nn.Module):
            _refuse_attention(model)
            was_training = model.training
            try:
                _refuse_states(model.eval())
            finally:
                model.train(was_training)


def _refuse_attention(model: Any) -> None:
    attention = str(_attention_of(model.model.config.get_text_config()))
    if attention != "sdpa" and not attention.startswith("flash"):
        raise ModelError(
            f"train.packing is on, and model {model.name!r} computes attention by {attention!r}; "
            "set its attention to sdpa or flash_attention_2, or leave packing off"
        )


def _refuse_states(model: Any) -> None:
    window = getattr(model.model.config.get_text_config(), "sliding_window", None)
    more = window if isinstance(window, int) and window <= WIDEST_WINDOW else 0
    lengths = [length + more for length in ROW_LENGTHS]
    # Ids from all over the vocabulary.
    ids = torch.arange(sum(lengths), device=model.device) * 7919 % model.vocab_size
    rows = ids.split(lengths)
    positions = [torch.arange(len(row), device=model.device) for row in rows]
    with torch.no_grad():
        padded_BTD = model(nn.utils.rnn.pad_sequence(rows, batch_first=True))
        expected = torch.cat([padded_BTD[i, :length] for i, length in enumerate(lengths)])
        try:
            with rows_apart(model):
                found = model(torch.cat(rows)[None], torch.cat(positions)[None])[0]
        except (TypeError, ValueError, RuntimeError) as error:
            raise _unpackable(model, " ".join(str(error).split())[:200]) from None
    error = (found - expected).abs().max() / expected.abs().max()
    if not error <= (ALLOWED if expected.dtype.itemsize > 2 else ALLOWED_IN_16_BITS):
        raise _unpackable(model, f"its hidden states are others, by {error:.3g}")


def _unpackable(model: Any, why: str) -> ModelError:
    return ModelError(
        f"train.packing is on, and model {model.name!r} ({type(model.model).__name__}) cannot take "
        f"rows one after the other: {why}; leave it off"
    )


def _attention_of(config: Any) -> str | None:
    return getattr(config, "_attn_implementation", None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention [1, T, heads, dim] of packed rows: transformers' own of each, one after the
    other."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if position_ids is None:
        raise ValueError("it does not tell its attention the positions")
    starts = (position_ids.flatten() == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], query.shape[2]]
    outputs = []
    for start, end in zip(starts, ends, strict=True):
        mask = _window(end - start, sliding_window, query.device)
        q, k, v = (each[:, :, start:end] for each in (query, key, value))
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(outputs, 1), None


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask of a row that is longer than its window; None for one that is not."""
    if window is None or length <= window:
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - window)[None, None]
