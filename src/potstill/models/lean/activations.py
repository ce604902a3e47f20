"""Activation checkpointing: layers that keep their input alone, and run again in the backward
pass."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from potstill.types import ModelError


def layers_of(model) -> list[nn.Module]:
    """The layers of a model, by the types that it names as those not to be split."""
    named = set(model._no_split_modules or ())
    # A layer that is sharded has a type that is made from its own.
    return [
        module
        for module in model.modules()
        if any(kind.__name__ in named for kind in type(module).__mro__)
    ]


def checkpointed_layers(model) -> list[nn.Module]:
    """The layers that can run again. Raises ModelError for a model that does not name them."""
    layers = layers_of(model)
    if not layers:
        raise ModelError(
            f"train.activation_checkpointing is on, and {type(model).__name__} does not name its "
            "layers; leave it off, or lower train.tokens_per_batch to save memory"
        )
    return layers


@contextlib.contextmanager
def layers_run_again(model) -> Iterator[None]:
    """Within, a pass with gradients keeps the input of each layer and no activation in it. The
    backward pass runs the layer once more, with the same dropout, so gradients are the same bits.

    It needs no training mode, which would turn a model's dropout on.
    """
    with forwards_changed(checkpointed_layers(model), lambda own: functools.partial(_run, own)):
        yield


@contextlib.contextmanager
def forwards_changed(layers: Sequence[nn.Module], change: Callable[..., Any]) -> Iterator[None]:
    """Within, the forward function of each layer is what `change` makes of its own."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = change(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _run(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
