"""The gradient of an embedding whose weight is also the head's, without a second tensor of its
size."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def embedding_added_late(model) -> Iterator[None]:
    """Within, a tied embedding keeps the gradient of its output in each backward pass. It is added
    to the weight's, which the head has given by then, before the next forward pass or on leaving.

    The engine would make a tensor of the embedding's own gradient, [V, D] of zeros but for a few
    rows, and then add all of it. The sum is the same but for rounding. An embedding that is not
    tied, or more than a look-up, stays as it is, and so does one that is sharded or in 16 bits.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not _is_plain(embedding) or embedding.weight is not getattr(head, "weight", None):
        yield
        return
    found: list[tuple[Tensor, Tensor]] = []

    def forward(ids: Tensor) -> Tensor:
        _add(embedding, found)
        return _LateEmbedding.apply(ids, embedding.weight, found)  # pyright: ignore

    embedding.forward = forward
    try:
        yield
        _add(embedding, found)
    finally:
        del embedding.forward


def _add(embedding: nn.Embedding, found: list[tuple[Tensor, Tensor]]) -> None:
    """Add to the weight's gradient what was found, and forget it."""
    while found:
        ids, rows = found.pop()
        if embedding.padding_idx is not None:
            rows = rows * (ids != embedding.padding_idx)[..., None]
        assert embedding.weight.grad is not None, "the head has a gradient wherever this has one"
        # On a GPU this is the kind of sum that has one order.
        embedding.weight.grad.index_put_((ids,), rows, accumulate=True)


def _is_plain(embedding) -> bool:
    is_looked_up = type(embedding) is nn.Embedding and "forward" not in vars(embedding)
    if not is_looked_up or embedding.max_norm is not None or embedding.scale_grad_by_freq:
        return False
    weight = embedding.weight
    return weight.requires_grad and weight.dtype == torch.float32 and type(weight) is nn.Parameter


class _LateEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, found):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.found = found
        ctx.save_for_backward(ids)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, rows):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.found.append((ctx.saved_tensors[0], rows))
        return None, None, None
