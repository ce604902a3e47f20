"""potstill distils large language models: who writes the prefixes, and which KL is minimised there."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.batching import make_batches
    from potstill.cache_build import build_cache, verify_cache
    from potstill.config import (
        CacheOptions,
        Evaluation,
        GrpoRecipe,
        Objective,
        Recipe,
        Sampling,
        load_grpo_recipe,
        load_recipe,
    )
    from potstill.data import load_examples, make_prompts
    from potstill.divergence import token_divergence
    from potstill.ends import end_set
    from potstill.evaluation import evaluate
    from potstill.fused import fused_loss, fused_statistics
    from potstill.grading import Grade
    from potstill.grpo import run_grpo
    from potstill.heads import Head
    from potstill.models import LanguageModel, load_model, save_model
    from potstill.prefixes import Writing, write_rollouts
    from potstill.tasks import Task
    from potstill.training import train
    from potstill.types import Example, LossTerms, VocabShard

# Imported on first use, so that `potstill --help` does not wait for torch.
_HOMES = {
    "CacheOptions": "potstill.config",
    "Evaluation": "potstill.config",
    "Objective": "potstill.config",
    "Sampling": "potstill.config",
    "GrpoRecipe": "potstill.config",
    "Recipe": "potstill.config",
    "load_grpo_recipe": "potstill.config",
    "load_recipe": "potstill.config",
    "make_batches": "potstill.batching",
    "build_cache": "potstill.cache_build",
    "verify_cache": "potstill.cache_build",
    "load_examples": "potstill.data",
    "make_prompts": "potstill.data",
    "token_divergence": "potstill.divergence",
    "end_set": "potstill.ends",
    "evaluate": "potstill.evaluation",
    "fused_loss": "potstill.fused",
    "fused_statistics": "potstill.fused",
    "Grade": "potstill.grading",
    "run_grpo": "potstill.grpo",
    "Head": "potstill.heads",
    "LanguageModel": "potstill.models",
    "load_model": "potstill.models",
    "save_model": "potstill.models",
    "Writing": "potstill.prefixes",
    "write_rollouts": "potstill.prefixes",
    "Task": "potstill.tasks",
    "train": "potstill.training",
    "Example": "potstill.types",
    "LossTerms": "potstill.types",
    "VocabShard": "potstill.types",
}
__all__ = [
    "CacheOptions",
    "Evaluation",
    "Example",
    "Grade",
    "GrpoRecipe",
    "Head",
    "LanguageModel",
    "LossTerms",
    "Objective",
    "Recipe",
    "Sampling",
    "Task",
    "VocabShard",
    "Writing",
    "build_cache",
    "end_set",
    "evaluate",
    "fused_loss",
    "fused_statistics",
    "load_examples",
    "load_grpo_recipe",
    "load_model",
    "load_recipe",
    "make_batches",
    "make_prompts",
    "run_grpo",
    "save_model",
    "token_divergence",
    "train",
    "verify_cache",
    "write_rollouts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'potstill' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
