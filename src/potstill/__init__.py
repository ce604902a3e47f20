"""potstill distils large language models: who writes the prefixes, and which KL is minimised
there."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.answers.grading import Grade
    from potstill.cache.build import build_cache
    from potstill.cache.verify import verify_cache
    from potstill.config import (
        CacheOptions,
        Data,
        EngineSpec,
        Evaluation,
        FurtherTeacher,
        Objective,
        Recipe,
        Reward,
        Rollouts,
        Sampling,
        StudentSpec,
        TeacherSpec,
        Train,
        Validation,
        WeightSchedule,
        Window,
        load_recipe,
    )
    from potstill.engines.native import NativeEngine
    from potstill.evaluation.scores import evaluate
    from potstill.kl.definition import token_divergence
    from potstill.kl.fused import fused_loss, fused_statistics
    from potstill.kl.head import Head
    from potstill.kl.terms import LossTerms, VocabShard
    from potstill.models.language_model import LanguageModel, load_model, save_model
    from potstill.objectives.tokens import Tokens
    from potstill.prompts.examples import load_examples, make_prompts
    from potstill.rollouts.batching import make_batches
    from potstill.rollouts.prefixes import Writing, write_rollouts
    from potstill.tasks import Task
    from potstill.teachers.ends import end_set
    from potstill.training.loop import train
    from potstill.types import Example

# Imported on first use, so that `potstill --help` does not wait for torch.
_HOMES = {
    "CacheOptions": "potstill.config",
    "EngineSpec": "potstill.config",
    "Evaluation": "potstill.config",
    "Objective": "potstill.config",
    "Sampling": "potstill.config",
    "Data": "potstill.config",
    "Rollouts": "potstill.config",
    "StudentSpec": "potstill.config",
    "FurtherTeacher": "potstill.config",
    "TeacherSpec": "potstill.config",
    "Train": "potstill.config",
    "Validation": "potstill.config",
    "Reward": "potstill.config",
    "WeightSchedule": "potstill.config",
    "Window": "potstill.config",
    "Recipe": "potstill.config",
    "load_recipe": "potstill.config",
    "make_batches": "potstill.rollouts.batching",
    "build_cache": "potstill.cache.build",
    "verify_cache": "potstill.cache.verify",
    "load_examples": "potstill.prompts.examples",
    "make_prompts": "potstill.prompts.examples",
    "token_divergence": "potstill.kl.definition",
    "end_set": "potstill.teachers.ends",
    "evaluate": "potstill.evaluation.scores",
    "fused_loss": "potstill.kl.fused",
    "fused_statistics": "potstill.kl.fused",
    "Grade": "potstill.answers.grading",
    "Head": "potstill.kl.head",
    "LanguageModel": "potstill.models.language_model",
    "load_model": "potstill.models.language_model",
    "save_model": "potstill.models.language_model",
    "NativeEngine": "potstill.engines.native",
    "Writing": "potstill.rollouts.prefixes",
    "write_rollouts": "potstill.rollouts.prefixes",
    "Task": "potstill.tasks",
    "train": "potstill.training.loop",
    "Example": "potstill.types",
    "LossTerms": "potstill.kl.terms",
    "Tokens": "potstill.objectives.tokens",
    "VocabShard": "potstill.kl.terms",
}
__all__ = [
    "CacheOptions",
    "Data",
    "EngineSpec",
    "Evaluation",
    "Example",
    "FurtherTeacher",
    "Grade",
    "Head",
    "LanguageModel",
    "LossTerms",
    "NativeEngine",
    "Objective",
    "Recipe",
    "Reward",
    "Rollouts",
    "Sampling",
    "StudentSpec",
    "Task",
    "TeacherSpec",
    "Tokens",
    "Train",
    "Validation",
    "VocabShard",
    "WeightSchedule",
    "Window",
    "Writing",
    "build_cache",
    "end_set",
    "evaluate",
    "fused_loss",
    "fused_statistics",
    "load_examples",
    "load_model",
    "load_recipe",
    "make_batches",
    "make_prompts",
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
