"""potstill distils large language models: who writes the prefixes, and which KL is minimised there."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.cache_build import build_cache, verify_cache
    from potstill.config import CacheOptions, GrpoRecipe, Recipe, load_grpo_recipe, load_recipe
    from potstill.divergence import token_divergence
    from potstill.evaluation import evaluate
    from potstill.fused import fused_loss, fused_statistics
    from potstill.grpo import run_grpo
    from potstill.heads import Head
    from potstill.training import train
    from potstill.types import LossTerms, VocabShard

# Imported on first use, so that `potstill --help` does not wait for torch.
_HOMES = {
    "CacheOptions": "potstill.config",
    "build_cache": "potstill.cache_build",
    "verify_cache": "potstill.cache_build",
    "GrpoRecipe": "potstill.config",
    "Recipe": "potstill.config",
    "load_grpo_recipe": "potstill.config",
    "load_recipe": "potstill.config",
    "token_divergence": "potstill.divergence",
    "evaluate": "potstill.evaluation",
    "fused_loss": "potstill.fused",
    "fused_statistics": "potstill.fused",
    "Head": "potstill.heads",
    "LossTerms": "potstill.types",
    "VocabShard": "potstill.types",
    "run_grpo": "potstill.grpo",
    "train": "potstill.training",
}
__all__ = [
    "CacheOptions",
    "GrpoRecipe",
    "Head",
    "LossTerms",
    "Recipe",
    "VocabShard",
    "build_cache",
    "evaluate",
    "fused_loss",
    "fused_statistics",
    "load_grpo_recipe",
    "load_recipe",
    "run_grpo",
    "token_divergence",
    "train",
    "verify_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'potstill' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
