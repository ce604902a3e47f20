"""Adapters (LoRA, by peft): narrow matrices beside weights that stay, trained, saved and merged.

A matrix W of the base becomes W + alpha / rank · B A. B begins as zeros, so that at first the model
is its base to the bit.
"""

import json
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.config import Lora
from potstill.types import ModelError

# The name of peft for an adapter that is alone, what the names of its weights contain, what the
# names of the weights beside it do, and what its files have before each name.
NAME, MARK, BASE_MARK, IN_FILES = "default", "lora_", ".base_layer", "base_model.model."
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def require_peft() -> Any:
    """The library peft. Raises ModelError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise ModelError(
            "adapters (LoRA) take peft, which is not installed; run `pip install 'potstill[lora]'`"
        ) from None
    return peft


def has_adapter(model: Any) -> bool:
    """Whether a Hugging Face model has an adapter beside its weights."""
    return hasattr(model, "peft_config")


def is_of_adapter(name: str) -> bool:
    """Whether a weight of this name is an adapter's."""
    return MARK in name


def attach(model: Any, lora: Lora, seed: int) -> None:
    """Freeze a Hugging Face model and put a fresh adapter beside its matrices.

    The adapter's weights are in float32, whatever the base is in. Raises ModelError where peft is
    missing, and for targets that are no linear layers, or the head.
    """
    peft = require_peft()
    from peft.tuners.tuners_utils import cast_adapter_dtype

    if lora.targets != "all-linear":
        _refuse_targets(model, lora.targets)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(config, model, NAME)
    cast_adapter_dtype(model, NAME)


def _refuse_targets(model: Any, targets: Sequence[str]) -> None:
    """Raise ModelError for the end of a name that no linear layer has, and for the head's, which
    the loss reads without an adapter."""
    head = model.get_output_embeddings()
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) or type(layer).__name__ == "Conv1D"
    }
    known = sorted({name.rpartition(".")[2] for name, x in layers.items() if x is not head})
    for target in targets:
        meant = [layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")]
        if not meant or head in meant:
            fault = "is the head, which stays as it is" if meant else "ends no linear layer's name"
            raise ModelError(
                f"student.lora.targets names {target!r}, which {fault}; {type(model).__name__} has "
                f"{', '.join(known)}"
            )


def adapted(model: Any) -> list[tuple[str, Any]]:
    """The layers that have an adapter, by their names in the base."""
    return [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "lora_A")]


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Have a model compute as its base alone, without dropout."""
    layers, was_training = [layer for _, layer in adapted(model)], model.training
    model.eval()
    for layer in layers:
        # Not peft's enable_adapters, which also freezes the weights, here in the midst of a step.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        model.train(was_training)


def base_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights of the base by their names in it."""
    for name, weight in model.named_parameters():
        if not is_of_adapter(name):
            yield name.replace(BASE_MARK, ""), weight


@torch.no_grad()
def merged_weights(model: Any, names: Container[str] | None = None) -> dict[str, Tensor]:
    """Copies of the weights of the whole model, the adapter merged, by their names in the base; or
    of those that have some names in the model.

    Second names of one tensor are left out.
    """
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    state = {
        name.replace(BASE_MARK, ""): weight.cpu()
        for name, weight in model.state_dict().items()
        if name in own and not is_of_adapter(name) and (names is None or name in names)
    }
    for name, layer in adapted(model):
        if f"{name}.weight" in state:
            merged = layer.get_base_layer().weight.detach().clone()
            merged += layer.get_delta_weight(NAME)
            state[f"{name}.weight"] = merged.cpu()
    return state


def merge_in_place(model: Any) -> None:
    """Make a model with an adapter a plain one, in place. All its weights may change again."""
    for name, layer in adapted(model):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


def name_of_base(model: Any) -> str:
    """The folder or hub id that a model was loaded from. Raises ModelError where there is none."""
    name = str(model.name_or_path or "")
    if not name:
        raise ModelError(
            'student.lora.save is "adapter", which names the folder or hub id of its base, and '
            "this student comes from none (an adapter that is merged, or an object); use "
            'student.lora.save = "merged", or save the base first and name its folder'
        )
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def write_adapter(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter's weights, by their names in the model, and its settings as peft does."""
    from safetensors.torch import save_file

    config = model.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = name_of_base(model), True
    # A list as it is given, sorted: a set has another order in each process.
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    named = {f"{IN_FILES}{name.replace(f'.{NAME}', '')}": w for name, w in weights.items()}
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def base_of(folder: Path) -> str | None:
    """The name of the model that an adapter's folder is of; None for a folder of another kind.

    Raises ModelError where it is damaged, or names none.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_bytes()).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{str(path)!r} is damaged ({error}); get the file again") from None
    if not isinstance(base, str) or not base or Path(base).resolve() == folder.resolve():
        raise ModelError(
            f"{str(path)!r} names no model that the adapter is of; write its folder or hub id as "
            "base_model_name_or_path"
        )
    return base


def merge_from(folder: Path, model: Any) -> Any:
    """The base `model` with the adapter in a folder merged into its weights, in place.

    Raises what peft does where the two do not belong together.
    """
    import warnings

    peft = require_peft()
    with warnings.catch_warnings():
        # Calls of peft itself that transformers will drop are not our affair.
        warnings.filterwarnings("ignore", category=FutureWarning)
        # Weights that are not there would stay as they are drawn.
        warnings.filterwarnings("error", "Found missing adapter keys")
        return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def describe_adapter(model: Any) -> str:
    """A line on what learns of a model with an adapter."""
    config = model.peft_config[NAME]
    learns = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    whole = sum(weight.numel() for weight in model.parameters())
    return (
        f"adapter of rank {config.r}, alpha {config.lora_alpha:g}, beside {len(adapted(model))} "
        f"matrices: {learns:,} of {whole:,} weights learn ({learns / whole:.2%}), and the base "
        "stays as it is"
    )
