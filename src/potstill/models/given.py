"""Models that Python gives in place of what a recipe names: names, Hugging Face objects, or models
that were loaded before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from potstill.config import Recipe, make_recipe, with_fields
from potstill.models.language_model import LanguageModel
from potstill.types import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GivenModel: TypeAlias = "PreTrainedModel | LanguageModel | str | Path"
GivenTokenizer: TypeAlias = "PreTrainedTokenizerBase"


def with_names(
    recipe: Recipe, *, student: GivenModel | None, teacher: GivenModel | None, tokenizer: Any
) -> tuple[Recipe, Any, Any]:
    """The recipe with the models that are given by name, and the student and the teacher that are
    given as objects.

    Raises ModelError for a tokenizer that is none, or that belongs to no object.
    """
    objects = {"student": student, "teacher": teacher}
    names = {role: str(it) for role, it in objects.items() if isinstance(it, str | Path)}
    if names:
        fields = {f"{role}.model": name for role, name in names.items()}
        named = make_recipe(with_fields(recipe.resolved(), fields), "train()")
        named._notes = recipe.notes
        recipe = named
    found = {role: None if role in names else it for role, it in objects.items()}
    has_object = any(it is not None for it in found.values())
    if tokenizer is not None and not has_object:
        raise ModelError(
            "tokenizer= is given and neither student= nor teacher= is an object that needs it; "
            "models bring theirs by their names, so remove it"
        )
    if tokenizer is not None and not hasattr(tokenizer, "batch_decode"):
        raise ModelError(
            f"tokenizer= is {tokenizer!r}, which is no tokenizer; give what "
            "AutoTokenizer.from_pretrained(...) returns"
        )
    return recipe, found["student"], found["teacher"]


def share_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have a weight in common, so that what changes the one changes the
    other."""
    of_a = {id(weight) for weight in a.parameters()}
    return any(id(weight) in of_a for weight in b.parameters())


@contextmanager
def left_as_it_was(given: GivenModel | None) -> Iterator[None]:
    """Have an object trainable afterwards where it was so before, and in the mode that it was
    in."""
    if not isinstance(given, nn.Module):
        yield
        return
    mode, before = given.training, [(w, w.requires_grad) for w in given.parameters()]
    try:
        yield
    finally:
        given.train(mode)
        for weight, was_trainable in before:
            weight.requires_grad_(was_trainable)
