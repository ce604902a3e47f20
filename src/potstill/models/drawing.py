"""One token for each row of logits: truncation to the likeliest tokens, and the draw."""

import math

import torch
from torch import Tensor, nn

from potstill.config import Sampling

# Tokens that are sorted in search of a nucleus, and how many times more where it is not among them.
NUCLEUS, GROWTH = 128, 8
# A difference of logits whose exponential is 0 in float32, as that of -inf is, and whose products
# are finite.
NOTHING = -200.0


def draw(
    logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [R], their log-probabilities and the entropies of the distribution they are drawn
    from (nats).

    `uniforms_R` are float64 in [0, 1). At temperature 0 the likeliest token is taken; both numbers
    are then 0.
    """
    if sampling.temperature == 0:
        ids_R = logits_RV.argmax(-1)
        zeros_R = torch.zeros(len(ids_R), device=logits_RV.device)
        return ids_R, zeros_R, zeros_R
    scaled_RV = scaled(logits_RV, sampling)
    num_rows, vocab_size = scaled_RV.shape
    length = math.isqrt(vocab_size - 1) + 1
    num_chunks = -(-vocab_size // length)
    shifted_RV = (scaled_RV - scaled_RV.amax(-1, keepdim=True)).clamp_(min=NOTHING)
    # The last chunk ends with tokens that are not there.
    weights = shifted_RV.new_zeros(num_rows, num_chunks * length)
    weights_RV = torch.exp(shifted_RV, out=weights[:, :vocab_size])
    ids_R1, total_R1 = _invert(weights.view(num_rows, num_chunks, length), uniforms_R[:, None])
    # Only NaN has no place in the sum. It gets an id that exists, and its log-probability, NaN too,
    # tells of it.
    ids_R1 = ids_R1.clamp(max=vocab_size - 1)
    log_total_R, total_R = total_R1.log().squeeze(-1), total_R1.squeeze(-1)
    log_probs_R = shifted_RV.gather(-1, ids_R1).squeeze(-1) - log_total_R
    entropies_R = log_total_R - shifted_RV.mul_(weights_RV).sum(-1) / total_R
    return ids_R1.squeeze(-1), log_probs_R.float(), entropies_R.float()


def scaled(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """The logits of the distribution that is drawn from, in float32."""
    scaled_RV = logits_RV.float()
    if sampling.temperature != 1:
        scaled_RV = scaled_RV / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        scaled_RV = truncate(scaled_RV, sampling.top_k, sampling.top_p)
    return scaled_RV


def _invert(weights_RCL: Tensor, uniforms_R1: Tensor) -> tuple[Tensor, Tensor]:
    """The place [R, 1] at which the cumulative sum of a row's weights passes that share of their
    sum, and the sum.

    The weights are cut into C chunks of L: first the chunk is found, then the place within it. The
    sums are in float64, so that those over a large vocabulary do not round small ones away.
    """
    ends_RC = weights_RCL.sum(-1, dtype=torch.float64).cumsum(-1)
    total_R1 = ends_RC[:, -1:]
    target_R1 = uniforms_R1 * total_R1
    num_chunks, length = weights_RCL.shape[1:]
    chunk_R1 = torch.searchsorted(ends_RC, target_R1, right=True).clamp(max=num_chunks - 1)
    start_R1 = nn.functional.pad(ends_RC, (1, 0)).gather(-1, chunk_R1)
    chunk_RL = weights_RCL.gather(1, chunk_R1[:, :, None].expand(-1, -1, length)).squeeze(1)
    cumulative_RL = chunk_RL.cumsum(-1, dtype=torch.float64)
    place_R1 = torch.searchsorted(cumulative_RL, target_R1 - start_R1, right=True)
    # The chunk's sum was added up in another order; nothing beyond its last weight is drawn.
    last_R1 = torch.searchsorted(cumulative_RL, cumulative_RL[:, -1:].contiguous())
    return chunk_R1 * length + torch.minimum(place_R1, last_R1), total_R1


def truncate(log_probs_RV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the `top_k` likeliest (0: all) tokens, then all outside the `top_p` nucleus of
    the rest, to -inf.

    A constant added to a row, such as that between logits and log-probabilities, changes nothing
    but the row itself. The nucleus is the smallest set of likeliest tokens with at least `top_p` of
    the mass; it holds at least one token.
    """
    vocab_size = log_probs_RV.shape[-1]
    limit = min(top_k or vocab_size, vocab_size)
    top_R1 = log_probs_RV.amax(-1, keepdim=True)
    if top_p == 1:
        total_R1, num_sorted = torch.ones_like(top_R1, dtype=torch.float64), limit
    else:
        whole = _largest(log_probs_RV, limit) if top_k else log_probs_RV
        total_R1, num_sorted = (
            (whole - top_R1).exp().sum(-1, keepdim=True, dtype=torch.float64),
            NUCLEUS,
        )
    num_R1, least_R1, next_R1 = _nucleus(log_probs_RV, top_R1, total_R1, top_p, limit, num_sorted)
    is_kept_RV, is_tied_R = log_probs_RV >= least_R1, (next_R1 == least_R1).squeeze(-1)
    if is_tied_R.any():
        # Among equally likely tokens those with the smallest ids are kept.
        tied_RV, least_R1 = log_probs_RV[is_tied_R], least_R1[is_tied_R]
        is_above_RV, is_least_RV = tied_RV > least_R1, tied_RV == least_R1
        num_least_R1 = num_R1[is_tied_R] - is_above_RV.sum(-1, keepdim=True)
        is_kept_RV[is_tied_R] = is_above_RV | (
            is_least_RV & (is_least_RV.cumsum(-1) <= num_least_R1)
        )
    return log_probs_RV.masked_fill(~is_kept_RV, -torch.inf)


def _nucleus(
    log_probs_RV: Tensor,
    top_R1: Tensor,
    total_R1: Tensor,
    top_p: float,
    limit: int,
    num_sorted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """How many tokens the nucleus of each row has, how likely its least is, and the likeliest
    outside (else NaN).

    Few tokens hold most of the mass as a rule, so few are sorted at first, and more in the rows
    where that was not enough. `top_R1` is the largest log-probability, `total_R1` the sum of all
    that may be kept, over its exponential. With `top_p` 1 the first `limit` tokens are kept.
    """
    num_sorted = min(num_sorted, limit)
    sorted_RK = nn.functional.pad(
        _largest(log_probs_RV, min(num_sorted + 1, log_probs_RV.shape[-1])), (0, 1), value=math.nan
    )
    probs_RK = (sorted_RK[:, :num_sorted] - top_R1).exp().double() / total_R1
    mass_RK = probs_RK.cumsum(-1)
    num_R1 = (mass_RK - probs_RK < top_p).sum(-1, keepdim=True).clamp(min=1)
    if top_p == 1:
        num_R1.fill_(limit)
    found = [num_R1, sorted_RK.gather(-1, num_R1 - 1), sorted_RK.gather(-1, num_R1)]
    is_open_R = mass_RK[:, -1] < top_p
    if num_sorted < limit and is_open_R.any():
        open_RV, top_R1, total_R1 = log_probs_RV[is_open_R], top_R1[is_open_R], total_R1[is_open_R]
        num_next = GROWTH * num_sorted if GROWTH**2 * num_sorted < limit else limit
        for mine, theirs in zip(
            found, _nucleus(open_RV, top_R1, total_R1, top_p, limit, num_next), strict=True
        ):
            mine[is_open_R] = theirs
    return found[0], found[1], found[2]


def _largest(values_RV: Tensor, k: int) -> Tensor:
    """The `k` largest values [R, k] of each row, the largest first.

    The columns are cut into chunks: only in the k chunks with the largest maxima can one of the k
    be.
    """
    length = math.isqrt(values_RV.shape[-1] // k)
    if length < 2:
        return values_RV.sort(-1, descending=True).values[:, :k]
    num_chunks = values_RV.shape[-1] // length
    chunks_RLC = values_RV[:, : length * num_chunks].unflatten(1, (length, num_chunks))
    chosen_RK = chunks_RLC.amax(1).topk(k, sorted=False).indices
    found_RK = chunks_RLC.gather(2, chosen_RK[:, None].expand(-1, length, -1)).flatten(1)
    return torch.cat([found_RK, values_RV[:, length * num_chunks :]], 1).topk(k).values
