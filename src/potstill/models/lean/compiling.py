"""Layers that torch.compile has compiled."""

import contextlib
import functools
from collections.abc import Iterator

import torch

from potstill.config import RecipeError
from potstill.console.printable import error_text
from potstill.models.lean.activations import forwards_changed, layers_of
from potstill.types import ModelError


def refuse_compiling(model, device: torch.device, num_ranks: int) -> None:
    """Raise where the layers of a model cannot be compiled here: a small function is, to see
    whether anything can."""
    if num_ranks > 1:
        raise RecipeError(f"train.compile is for one rank, and there are {num_ranks}; leave it off")
    if not layers_of(model):
        raise ModelError(
            f"train.compile is on, and {type(model).__name__} does not name its layers; leave it "
            "off"
        )
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:
        raise RecipeError(
            f"train.compile is on, and nothing can be compiled here: {error_text(error, 200)}; "
            "install a C++ compiler, with a GPU Triton as well, or leave it off"
        ) from None


@contextlib.contextmanager
def layers_compiled(model) -> Iterator[None]:
    """Within, a model's layers compute by compiled code, one for all layers and all lengths.

    Code is made with the first pass, and kept by the process from one step to the next.
    """
    with forwards_changed(layers_of(model), functools.partial(torch.compile, dynamic=True)):
        yield
