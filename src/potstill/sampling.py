"""Completions by decoding with a model's own weights: token ids in, completions out. No text, no data sets.

It drives transformers' forward and cache, so any causal LM works. Rows are decoded together in batches of similar
length, and a finished row leaves its batch. Each row draws from a random stream of its own, so a completion depends on
its seed and not on what else is in the batch, on how many ranks there are, or on what was sampled before.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.config import Sampling
from potstill.types import Completion

# Rows are dropped when the rest is at most this share of the batch: dropping copies the cache, keeping wastes compute.
COMPACT_AT = 0.9


@torch.inference_mode()
def sample(
    model,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[tuple[int, ...]],
    *,
    max_tokens: int,
    end_ids: Sequence[int],
    sampling: Sampling,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
) -> list[Completion]:
    """Draw one completion of 1 to `max_tokens` tokens for each prompt, in the order of the prompts.

    `model` is a Hugging Face causal LM, `seeds` holds integers that name each row's random stream, and decoding stops
    after any of `end_ids`, which is then part of the completion. `on_tokens` is told how many tokens each batch wrote.
    With temperature 1 and no truncation this is exact ancestral sampling, by inversion of the cumulative distribution.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[Completion | None] = [None] * len(prompts)
    for start in range(0, len(order), sampling.batch_size):
        rows = order[start : start + sampling.batch_size]
        decoded = _decode(model, [prompts[i] for i in rows], [seeds[i] for i in rows], max_tokens, end_ids, sampling)
        for i, completion in zip(rows, decoded, strict=True):
            completions[i] = completion
        on_tokens(sum(len(completion.token_ids) for completion in decoded))
    return completions  # pyright: ignore[reportReturnType]


def _decode(model, prompts, seeds, max_tokens: int, end_ids: Sequence[int], sampling: Sampling) -> list[Completion]:
    """Decode one batch. B is the number of prompts, R the number of rows still in the batch, L is `max_tokens`."""
    device = next(model.parameters()).device
    ends = torch.tensor(list(end_ids), device=device)
    uniforms_BL = torch.from_numpy(np.stack([np.random.default_rng(seed).random(max_tokens) for seed in seeds])).to(
        device
    )
    inputs = _left_pad(prompts, device)
    ids_BL = torch.zeros(len(prompts), max_tokens, dtype=torch.long, device=device)
    log_probs_BL = torch.zeros(len(prompts), max_tokens, device=device)
    entropies_BL = torch.zeros(len(prompts), max_tokens, device=device)
    rows_R = torch.arange(len(prompts), device=device)
    running_R = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for position in range(max_tokens):
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        ids_R, log_probs_R, entropies_R = draw(output.logits[:, -1], uniforms_BL[rows_R, position], sampling)
        # Rows that have finished but not left yet write past their end, where nothing is read.
        ids_BL[rows_R, position] = ids_R
        log_probs_BL[rows_R, position] = log_probs_R
        entropies_BL[rows_R, position] = entropies_R
        running_R = running_R & ~torch.isin(ids_R, ends)
        num_running = int(running_R.sum())
        if num_running == 0:
            break
        mask_RT, positions_R1 = inputs.get("attention_mask"), inputs["position_ids"][:, -1:] + 1
        cache = output.past_key_values
        if num_running <= COMPACT_AT * len(rows_R):
            kept = running_R.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            ids_R, rows_R, running_R, positions_R1 = ids_R[kept], rows_R[kept], running_R[kept], positions_R1[kept]
            mask_RT = None if mask_RT is None else mask_RT[kept]
        inputs = {"input_ids": ids_R[:, None], "position_ids": positions_R1, "past_key_values": cache}
        if mask_RT is not None:
            inputs["attention_mask"] = torch.cat([mask_RT, mask_RT.new_ones(len(rows_R), 1)], dim=1)
    is_end_BL = torch.isin(ids_BL, ends)
    # Zeros after the last step could be an end id; only the first end of a row counts, and unwritten rows have one.
    lengths = torch.where(is_end_BL.any(1), is_end_BL.int().argmax(1) + 1, max_tokens).tolist()
    stopped = is_end_BL.any(1).tolist()
    ids, log_probs, entropies = ids_BL.tolist(), log_probs_BL.tolist(), entropies_BL.tolist()
    return [
        Completion(
            tuple(ids[b][:n]), "end" if stopped[b] else "length", tuple(log_probs[b][:n]), tuple(entropies[b][:n])
        )
        for b, n in enumerate(lengths)
    ]


def _left_pad(prompts, device) -> dict[str, Any]:
    """Inputs of the first forward pass; no mask where all prompts are equally long, as attention is faster without."""
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    ids_BT = torch.tensor(
        [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=device
    )
    positions_BT = torch.arange(longest, device=device) - torch.tensor(padding, device=device)[:, None]
    if not any(padding):
        return {"input_ids": ids_BT, "position_ids": positions_BT}
    mask_BT = (positions_BT >= 0).long()
    return {"input_ids": ids_BT, "position_ids": positions_BT.clamp(min=0), "attention_mask": mask_BT}


def draw(logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [R], their log-probabilities and the entropies of the distribution they are drawn from (nats).

    `uniforms_R` are float64 in [0, 1). At temperature 0 the likeliest token is taken, with log-probability and entropy 0.
    """
    if sampling.temperature == 0:
        ids_R = logits_RV.argmax(-1)
        zeros_R = torch.zeros(len(ids_R), device=logits_RV.device)
        return ids_R, zeros_R, zeros_R
    log_probs_RV = (logits_RV.float() / sampling.temperature).log_softmax(-1)
    if sampling.top_k or sampling.top_p < 1:
        log_probs_RV = truncate(log_probs_RV, sampling.top_k, sampling.top_p).log_softmax(-1)
    probs_RV = log_probs_RV.exp()
    # Float64, so that the sum over a large vocabulary does not round small probabilities away.
    cumulative_RV = probs_RV.double().cumsum(-1)
    ids_R = torch.searchsorted(cumulative_RV, uniforms_R[:, None] * cumulative_RV[:, -1:], right=True)[:, 0]
    entropies_R = torch.special.entr(probs_RV).sum(-1)
    return ids_R, log_probs_RV.gather(-1, ids_R[:, None])[:, 0], entropies_R


def truncate(log_probs_RV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the `top_k` likeliest (0: all) tokens, then all outside the `top_p` nucleus of the rest, to -inf.

    The nucleus is the smallest set of likeliest tokens with at least `top_p` of the mass; it holds at least one token.
    """
    sorted_RV, order_RV = log_probs_RV.sort(-1, descending=True, stable=True)
    if top_k:
        sorted_RV[:, top_k:] = -torch.inf
    if top_p < 1:
        probs_RV = sorted_RV.softmax(-1)
        sorted_RV[probs_RV.cumsum(-1) - probs_RV >= top_p] = -torch.inf
    return torch.empty_like(log_probs_RV).scatter_(-1, order_RV, sorted_RV)
