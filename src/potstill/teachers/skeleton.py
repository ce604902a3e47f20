"""A model without its body: configuration, tokenizer, end tokens, and of its weights the head
alone."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from potstill.config import TeacherModel
from potstill.kl.head import Head
from potstill.models.language_model import LanguageModel, load_config, load_tokenizer, locate
from potstill.models.lean.attention import set_attention
from potstill.types import ModelError

ONE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def skeleton_of(spec: TeacherModel) -> LanguageModel:
    """The model with weights that have a shape and no values. Raises ModelError."""
    import transformers

    told: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    config = load_config(spec.model, spec.trust_remote_code)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, spec.dtype), **told
        )
    set_attention(spec.model, model, spec.attention)
    # A model without a file of these settings has those that follow from its configuration.
    with contextlib.suppress(OSError):
        path = locate(spec.model)
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    tokenizer = load_tokenizer(spec.model, spec.trust_remote_code)
    skeleton = LanguageModel(model.eval(), tokenizer, spec.model)
    skeleton.requires_grad_(False)
    return skeleton


def head_of(skeleton: LanguageModel, device: torch.device) -> Head:
    """The head with its values, which are the only ones that are read. Raises ModelError for files
    that do not have it."""
    head = skeleton.head
    weight_VD = _value_of(skeleton, head.weight_VD).to(device, head.weight_VD.dtype)
    bias_V = head.bias_V
    if bias_V is not None:
        bias_V = _value_of(skeleton, bias_V).to(device, bias_V.dtype)
    return dataclasses.replace(head, weight_VD=weight_VD, bias_V=bias_V)


def _value_of(skeleton: LanguageModel, wanted: Tensor) -> Tensor:
    """A tensor's value from the files, where a tied one has either name."""
    all_names = skeleton.model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in all_names if parameter is wanted]
    with _file_with(skeleton.name, names) as (file, name):
        value = file.get_tensor(name)
    if value.shape != wanted.shape:
        raise ModelError(
            f"model {skeleton.name!r}: {name} is {list(value.shape)} in its files and "
            f"{list(wanted.shape)} by its config.json; the two do not belong together"
        )
    return value


@contextlib.contextmanager
def _file_with(model: str, names: list[str]):
    """The open safetensors file that has one of these tensors, and the tensor's name."""
    index = _fetched(model, INDEX_FILE)
    if index is None:
        path = _fetched(model, ONE_FILE)
        places = dict.fromkeys(names, ONE_FILE)
    else:
        places = json.loads(index.read_text())["weight_map"]
        found = next((places[name] for name in names if name in places), None)
        path = None if found is None else _fetched(model, found)
    if path is not None:
        with safe_open(path, framework="pt") as file:
            known = set(file.keys())
            name = next((name for name in names if name in known), None)
            if name is not None:
                yield file, name
                return
    raise ModelError(
        f"model {model!r} has no safetensors file with its head ({' or '.join(names)}); give the "
        "folder or hub id of the model that the server has"
    )


def _fetched(model: str, file: str) -> Path | None:
    """A file of a model's, from its folder or the hub; None where there is none."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    place = locate(model)
    if Path(place).is_dir():
        path = Path(place) / file
        return path if path.is_file() else None
    try:
        return Path(huggingface_hub.hf_hub_download(place, file))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
