"""The optimiser of a run: AdamW of PyTorch, or one of torchao that takes less memory."""

from typing import Any

import torch
from torch import nn

from potstill.config import RecipeError, Train


def make_optimizer(student: nn.Module, settings: Train) -> torch.optim.Optimizer:
    """AdamW of the weights that learn, at a rate of 0: each step sets it."""
    learning = [weight for weight in student.parameters() if weight.requires_grad]
    options: Any = {"lr": 0.0, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if not settings.needs_torchao:
        # Fused, the update needs no copy of the weights.
        return torch.optim.AdamW(learning, **options, fused=True)
    from torchao.optim import AdamW8bit, _AdamW  # pyright: ignore[reportMissingImports]

    kind: Any = AdamW8bit if settings.optimizer == "adamw-8bit" else _AdamW
    return kind(learning, **options, bf16_stochastic_round=settings.stochastic_rounding)


def refuse_optimizer(settings: Train, num_ranks: int) -> None:
    """Raise RecipeError where torchao's optimisers are missing, or the student is in shards."""
    if not settings.needs_torchao:
        return
    if num_ranks > 1:
        raise RecipeError(
            'train.optimizer = "adamw-8bit" and train.stochastic_rounding are for one rank, and '
            f"there are {num_ranks}; leave them out"
        )
    try:
        import torchao.optim  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RecipeError(
            'train.optimizer = "adamw-8bit" and train.stochastic_rounding take torchao, which is '
            "not installed; run `pip install 'potstill[torchao]'`"
        ) from None
