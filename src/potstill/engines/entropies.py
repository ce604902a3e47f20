"""Entropies of completions whose engine tells none: one pass over what was written."""

import dataclasses
from collections.abc import Sequence

import torch

from potstill.config import Sampling
from potstill.models.drawing import scaled
from potstill.models.language_model import LanguageModel
from potstill.types import Completion

# Rows of logits at a time: their memory is that of so many rows of the vocabulary.
LOGIT_ROWS = 256


@torch.inference_mode()
def with_entropies(
    model: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    completions: Sequence[Completion],
    *,
    sampling: Sampling,
    vocab_size: int | None = None,
) -> list[Completion]:
    """The same completions with the entropies of the distributions that they were drawn from, as
    the native engine tells them."""
    told = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if not completion.entropies:
            completion = _with(model, prompt, completion, sampling, vocab_size)
        told.append(completion)
    return told


def _with(
    model: LanguageModel,
    prompt: tuple[int, ...],
    completion: Completion,
    sampling: Sampling,
    vocab_size: int | None,
) -> Completion:
    if sampling.temperature == 0:
        return dataclasses.replace(completion, entropies=(0.0,) * len(completion.token_ids))
    ids_1T = torch.tensor([(*prompt, *completion.token_ids)], device=model.device)
    hidden_ND = model(ids_1T[:, :-1])[0, len(prompt) - 1 :]
    parts = []
    for rows_ND in hidden_ND.split(LOGIT_ROWS):
        probs_RV = scaled(model.head(rows_ND, vocab_size), sampling).softmax(-1)
        parts += torch.special.entr(probs_RV).sum(-1).tolist()
    return dataclasses.replace(completion, entropies=tuple(parts))
