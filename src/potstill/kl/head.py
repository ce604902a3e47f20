"""The LM head as tensors: what turns hidden states into logits."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """Hidden states [N, D] to logits [N, V]: softcap * tanh(scale * (h W' + b) / softcap), or
    without the cap."""

    weight_VD: Tensor
    _: KW_ONLY
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden_ND: Tensor, vocab_size: int | None = None) -> Tensor:
        """Logits over the first `vocab_size` rows, in float32 (float64 for float64 hidden
        states)."""
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        bias_V = None if self.bias_V is None else self.bias_V[:vocab_size].to(dtype)
        # The product is taken in float32: logits rounded to bfloat16 bias both the gradient and the
        # entropy.
        logits_NV = nn.functional.linear(
            hidden_ND.to(dtype), self.weight_VD[:vocab_size].to(dtype), bias_V
        )
        logits_NV = logits_NV * self.scale
        return (
            logits_NV
            if self.softcap is None
            else torch.tanh(logits_NV / self.softcap) * self.softcap
        )
