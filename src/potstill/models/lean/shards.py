"""Weights and moments that ranks share, in safetensors files of which each rank writes its own, and
which any number of ranks reads (torch.distributed.checkpoint)."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from potstill.files import file_digest

# Weights by name, and an optimiser's state of each. No name of theirs has a slash.
NamedWeights: TypeAlias = dict[str, Tensor]
NamedMoments: TypeAlias = dict[str, dict[str, Tensor]]


def file_names(folder: Path) -> list[str]:
    """The shards in a folder; none where a checkpoint is whole."""
    return sorted(path.name for path in folder.glob("shard-*.safetensors"))


def write_shards(
    weights: Mapping[str, Tensor], moments: Mapping[str, Any], folder: Path, rank: int
) -> dict[str, str]:
    """Write this rank's share; the SHA-256 of its file by name. Every rank must call this."""
    # The writer flushes each file to the disk.
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(_as_one(weights, moments), storage_writer=writer)
    mine = folder.glob(f"shard-{rank + 1:05d}-*.safetensors")
    return {path.name: file_digest(path) for path in mine}


def read_shards(
    weights: Mapping[str, Tensor], moments: Mapping[str, Any], folder: Path
) -> tuple[NamedWeights, NamedMoments] | None:
    """The values that a folder has for tensors of these names and places; None where its names are
    others. Without moments the weights alone are read. Every rank must call this."""
    tensors = _as_one(weights, moments)
    reader = HuggingFaceStorageReader(str(folder))
    names = set(reader.read_metadata().state_dict_metadata)
    if not moments:
        names = {name for name in names if name.startswith("weight/")}
    if names != tensors.keys():
        return None
    with warnings.catch_warnings():
        # One process is told that it is alone.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    found: tuple[NamedWeights, NamedMoments] = ({}, {})
    for place, tensor in tensors.items():
        kind, name, *key = place.split("/")
        if kind == "weight":
            found[0][name] = tensor
        else:
            found[1].setdefault(name, {})[key[0]] = tensor
    return found


def _as_one(weights: Mapping[str, Tensor], moments: Mapping[str, Any]) -> NamedWeights:
    tensors = {f"weight/{name}": tensor for name, tensor in weights.items()}
    for name, values in moments.items():
        tensors |= {f"moment/{name}/{key}": value for key, value in values.items()}
    return tensors
