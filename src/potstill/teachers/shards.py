"""Shards of a teacher cache: the columns of a file, how each is stored, its checked index.

Shapes: R rollouts of a shard, N their completion tokens, E teacher hidden, K kept tokens.
"""

import hashlib
import os
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from potstill.teachers.manifest import CacheError, ShardRecord, arrays_digest
from potstill.types import Prompt

KEY_BYTES = 16
# One file with the indices of all shards, so that a cache of thousands opens without opening them.
INDEX_OF_ALL = "index.safetensors"
INDEX = ("keys", "completion_indices", "prompt_starts", "completion_starts", "ended", "checksums")
TEXT = ("prompt_ids", "completion_ids")
# A student's text has its log-probability of each token, when it drew it.
TEXTS = {"teacher": TEXT, "dataset": TEXT, "student": (*TEXT, "drawn_log_prob")}
SIGNALS = {
    "hidden": ("hidden", "scale", "log_sum_exp", "entropy", "log_prob"),
    "topk": ("top_ids", "top_log_probs", "end_log_prob", "tail_log_prob", "entropy"),
    "completions": (),
}
# A shard of a cache, and a rollout of it.
CachePlace = tuple[int, int]
_REPAIR = "restore it, or run `potstill cache verify {} --drop-broken` and build again"


def checksum(tensors: Sequence[Tensor]) -> int:
    """CRC-32 of some tensors' bytes: any one changed byte changes it."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, value)
    return value


def key_of(prompt: Prompt, writer: str) -> bytes:
    """The key of a rollout: a digest of what the teacher read, of what the student read where it
    wrote, and of the completion where it comes with the data."""
    ids = [prompt.ids_of("teacher")]
    if writer == "student":
        ids.append(prompt.ids_of("student"))
    if writer == "dataset":
        assert prompt.completion_ids is not None, "make_prompts checks this"
        ids.append(prompt.completion_ids)
    return hashlib.blake2b(repr(ids).encode(), digest_size=KEY_BYTES).digest()


def encode_rows(hidden_NE: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Hidden states as they are stored, and a scale [N, 1] for int8 (else [N, 0])."""
    if dtype != "int8":
        return hidden_NE.to(getattr(torch, dtype)), torch.zeros(len(hidden_NE), 0)
    scale_N1 = (
        hidden_NE.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        / 127
    )
    return (hidden_NE.float() / scale_N1).round().to(torch.int8), scale_N1


def decode_rows(stored_NE: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `encode_rows`, but for rounding."""
    if scale.shape[1]:
        return (stored_NE.float() * scale.to(stored_NE.device)).to(dtype)
    return stored_NE.to(dtype)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where the rollouts of a shard are."""

    keys: np.ndarray
    completion_indices: np.ndarray
    prompt_starts: np.ndarray
    completion_starts: np.ndarray
    ended: np.ndarray
    checksums: np.ndarray


def open_shard(path: Path):
    """Map a shard into memory. Raises CacheError for a file that is no shard."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CacheError(f"shard {str(path)!r} cannot be read: {error}") from None


def read_index(folder: Path, record: ShardRecord) -> ShardIndex:
    """The index of a cache's shard. Raises CacheError for a file that is not the one recorded."""
    path = folder / record.file
    if not path.is_file():
        raise CacheError(f"shard {str(path)!r} is missing; {_REPAIR.format(folder)}")
    if (size := path.stat().st_size) != record.num_bytes:
        raise CacheError(
            f"shard {str(path)!r} has {size} bytes and not {record.num_bytes}; "
            f"{_REPAIR.format(folder)}"
        )
    file = open_shard(path)
    try:
        arrays = {name: file.get_tensor(name).numpy() for name in INDEX}
    except SafetensorError:
        arrays = {}
    if not arrays or arrays_digest(arrays, INDEX) != record.index:
        raise CacheError(
            f"shard {str(path)!r} is damaged: its index is not the manifest's; "
            f"{_REPAIR.format(folder)}"
        )
    index = ShardIndex(**arrays)
    if not _has_counts(index, record):
        raise CacheError(
            f"shard {str(path)!r} does not have the manifest's number of rollouts and tokens; "
            f"{_REPAIR.format(folder)}"
        )
    return index


def _has_counts(index: ShardIndex, record: ShardRecord) -> bool:
    counts = (len(index.keys), int(index.completion_starts[-1]))
    return counts == (record.num_rollouts, record.num_tokens)


def read_indices(folder: Path, records: Sequence[ShardRecord]) -> list[ShardIndex]:
    """The index of each shard: from the cache's one file of them, and from the shard itself where
    that does not have it. Raises CacheError."""
    there = read_together(folder, records)
    return [there.get(record.file) or read_index(folder, record) for record in records]


def read_together(folder: Path, records: Sequence[ShardRecord]) -> dict[str, ShardIndex]:
    """The indices of whole shards that the cache's one file of them has, by name: a build that was
    killed has left its last shards out. Raises CacheError for a file that says other things than
    the manifest."""
    path = folder / INDEX_OF_ALL
    if not path.is_file():
        return {}
    wrong = (
        f"{str(path)!r} is not the index of this cache's shards; remove it: the shards say the "
        "same, and the next `potstill cache build` writes it again"
    )
    try:
        tensors = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        files = [f"shards/{bytes(name).decode()}.safetensors" for name in tensors["files"]]
        counts = tensors["num_rollouts"].tolist()
        arrays = {name: _split(name, tensors[name], counts) for name in INDEX}
    except (SafetensorError, OSError, KeyError, ValueError):
        raise CacheError(wrong) from None
    shards = folder / "shards"
    entries = os.scandir(shards) if shards.is_dir() else ()
    sizes = {entry.name: entry.stat().st_size for entry in entries}
    places = {file: place for place, file in enumerate(files)}
    found = {}
    for record in records:
        place = places.get(record.file)
        if place is None:
            continue
        of_shard = {name: parts[place] for name, parts in arrays.items()}
        if arrays_digest(of_shard, INDEX) != record.index:
            raise CacheError(wrong)
        index = ShardIndex(**of_shard)
        is_whole = sizes.get(record.file.removeprefix("shards/")) == record.num_bytes
        # Whatever is wrong of a shard is said where it is read itself.
        if is_whole and _has_counts(index, record):
            found[record.file] = index
    return found


def places_by_key(indices: Sequence[ShardIndex]) -> dict[bytes, list[CachePlace]]:
    """Where the completions of each key are, in the order of their numbers."""
    if not indices:
        return {}
    numbers = np.concatenate([index.completion_indices for index in indices])
    order = np.argsort(numbers, kind="stable")
    keys = np.concatenate([index.keys for index in indices])[order].tobytes()
    counts = [len(index.keys) for index in indices]
    shards = np.repeat(np.arange(len(counts)), counts)[order].tolist()
    rows = np.concatenate([np.arange(count) for count in counts])[order].tolist()
    found: dict[bytes, list[CachePlace]] = defaultdict(list)
    for place, shard_and_row in enumerate(zip(shards, rows, strict=True)):
        start = KEY_BYTES * place
        found[keys[start : start + KEY_BYTES]].append(shard_and_row)
    return dict(found)


def index_together(
    records: Sequence[ShardRecord], indices: Sequence[ShardIndex]
) -> dict[str, Tensor]:
    """The tensors of the one file with the indices of these shards."""
    names = [Path(record.file).stem.encode() for record in records]
    tensors = {
        name: torch.from_numpy(np.concatenate([getattr(index, name) for index in indices]))
        for name in INDEX
    }
    return tensors | {
        "files": torch.tensor([list(name) for name in names], dtype=torch.uint8),
        "num_rollouts": torch.tensor([len(index.keys) for index in indices]),
    }


def _split(name: str, array: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """A column of all shards as one of each; starts have one number more than a shard's
    rollouts."""
    more = 1 if name.endswith("_starts") else 0
    places = np.cumsum([count + more for count in counts])
    if places[-1] != len(array):
        raise ValueError(f"{name} has {len(array)} rows")
    return np.split(array, places[:-1])
