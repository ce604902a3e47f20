"""Models whose weights are quantised, as transformers loads them: checkpoints of torchao and
bitsandbytes, and others that no test here has loaded."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from potstill.config import Recipe, RecipeError
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


def refuse_to_train(name: str, model: Any, recipe: Recipe, num_ranks: int) -> None:
    """Raise for a quantised student without an adapter, and for what is not made of one that has
    it."""
    if not is_quantized(model):
        return
    lora = recipe.student.lora
    says = f"student {name!r} is quantised ({describe_quantized(model.config)})"
    if lora.rank is None:
        raise ModelError(
            f"{says}, and its weights are codes that cannot learn; set student.lora.rank, so that "
            "an adapter learns beside them"
        )
    if lora.save == "merged":
        raise RecipeError(
            f'{says}, and student.lora.save is "merged", which codes cannot hold; use save = '
            '"adapter" (potstill merge makes a whole model of it)'
        )
    if bits_a_weight(model.config) == 8 and "bitsandbytes" in says:
        raise ModelError(
            f"{says} by LLM.int8(), which loses its scales at its first pass, so that no "
            "checkpoint could be written; use nf4, or int8 of torchao"
        )
    if num_ranks > 1 or recipe.rollouts.engine != "native":
        raise RecipeError(
            f'{says}, which is for one rank and rollouts.engine = "native"; there are '
            f'{num_ranks}, and the engine is "{recipe.rollouts.engine}"'
        )


def leave_as_stored(model: Any) -> None:
    """Have a quantised model compute from its codes as they are in its files."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On some CPUs bitsandbytes would pack its codes anew at the first pass, with scales in
            # bfloat16, and back when they are saved, which loses bits.
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def make_whole(model: Any) -> None:
    """Give a quantised model the values that its codes stand for, in place."""
    if not is_quantized(model):
        return
    # How files become codes, by which transformers would save them again.
    vars(model).pop("_weight_conversions", None)
    if model.hf_quantizer.quantization_config.quant_method != "torchao":
        model.dequantize()
        return
    # Which transformers cannot do.
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if hasattr(weight, "__tensor_flatten__"):
            module.weight = nn.Parameter(weight.dequantize())
    del model.hf_quantizer, model.config.quantization_config


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
