"""Models whose weights are quantised, as transformers loads them: checkpoints of torchao and
bitsandbytes, and others that no test here has loaded."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from potstill.types import ModelError

# Names of torchao's settings, such as Int8WeightOnlyConfig, say how wide a weight is.
BITS = re.compile(r"(?:int|float|nf)(\d)", re.IGNORECASE)


def is_quantized(model: Any) -> bool:
    """Whether a Hugging Face model has quantised weights."""
    return getattr(model, "hf_quantizer", None) is not None


def is_quantized_by(config: Any) -> bool:
    """Whether a configuration is that of a quantised checkpoint."""
    return bool(_settings(config))


def type_to_load(config: Any, dtype: str) -> torch.dtype:
    """The type of a model's weights as they are loaded: the one asked for, or of a quantised
    checkpoint, whose codes are made for it, its own."""
    if _settings(config):
        return config.dtype or torch.float32
    return getattr(torch, dtype)


def bits_a_weight(config: Any) -> int | None:
    """The width of a quantised weight; None for a model with whole ones, and where the settings do
    not say."""
    settings = _settings(config)
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return 4 if settings["load_in_4bit"] else 8
    if isinstance(bits := settings.get("bits"), int):
        return bits
    found = BITS.search(str(settings.get("quant_type", "")))
    return None if found is None else int(found[1])


def describe_quantized(config: Any) -> str:
    """Words on how the weights of a model are quantised."""
    method, bits = _settings(config).get("quant_method"), bits_a_weight(config)
    return f"{getattr(method, 'value', method)}{'' if bits is None else f', {bits} bits'}"


def _settings(config: Any) -> dict[str, Any]:
    """The settings of a quantised checkpoint; none for another."""
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def refuse_to_train(name: str, model: Any) -> None:
    """Raise ModelError for a model whose weights are codes, which no step can change."""
    if is_quantized(model):
        raise ModelError(
            f"student {name!r} is quantised ({describe_quantized(model.config)}), and its weights "
            "are codes that cannot learn; use the model that it was made of"
        )


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model by their names; of quantised ones the codes and scales that they are
    made of."""
    if not is_quantized(model):
        yield from model.named_parameters()
        return
    for name, tensor in model.state_dict().items():
        yield from _parts(name, tensor)


def _parts(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    parts, _ = tensor.__tensor_flatten__()
    for part in parts:
        yield from _parts(f"{name}.{part}", getattr(tensor, part))
