"""The implementation of attention that a model computes with."""

from potstill.console.printable import error_text
from potstill.types import ModelError


def set_attention(name: str, model, attention: str | None) -> None:
    """Let the model `name` of transformers compute attention so; None leaves its own. Raises
    ModelError where that is not installed, or not made for the model."""
    if attention is None:
        return
    if attention.startswith("flash") and model.dtype.itemsize > 2:
        raise ModelError(
            f"attention = {attention!r} of model {name!r} computes in 16 bits and its weights are "
            f"{str(model.dtype).removeprefix('torch.')}; set its dtype to bfloat16, or choose sdpa"
        )
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        why = error_text(error).rstrip(".")
        raise ModelError(
            f"attention = {attention!r} cannot be had for model {name!r}: {why}; install it, or "
            "choose sdpa or eager"
        ) from None
