"""The same model with wider heads, as vLLM's CPU build has none of the shipped models' width."""

import copy

import torch


def with_wide_heads(model):
    """A Qwen3 model whose heads are twice as wide and which computes the same to rounding.

    The new entries are zeros, placed so that the others keep their frequencies; RMSNorm and the
    attention's scale, which follow the width, are made up for in the norms' weights. Zeros get no
    gradient.
    """
    config = copy.deepcopy(model.config)
    width, config.head_dim = config.head_dim, 2 * config.head_dim
    half = torch.arange(width // 2)
    places = torch.cat([2 * half, width + 2 * half])
    wide = type(model)(config)
    state = {}
    for name, weight in model.state_dict().items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            heads = weight.unflatten(0, (-1, width))
            new = weight.new_zeros(len(heads), 2 * width, heads.shape[2])
            new[:, places] = heads
            weight = new.flatten(0, 1)
        elif kind == "o_proj":
            heads = weight.unflatten(1, (-1, width))
            new = weight.new_zeros(len(heads), heads.shape[1], 2 * width)
            new[:, :, places] = heads
            weight = new.flatten(1)
        elif kind in ("q_norm", "k_norm"):
            new = weight.new_zeros(2 * width)
            # The mean of squares is half of what it was; of the scale's root of 2 both norms share.
            new[places] = weight if kind == "q_norm" else weight / 2**0.5
            weight = new
        state[name] = weight
    wide.load_state_dict(state)
    return wide.eval()
