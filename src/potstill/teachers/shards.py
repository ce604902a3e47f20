"""Shards of a teacher cache: the columns of a file, how each is stored, its checked index.

Shapes: R rollouts of a shard, N their completion tokens, E teacher hidden, K kept tokens.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from potstill.teachers.manifest import CacheError, ShardRecord, tensors_digest
from potstill.types import Prompt

KEY_BYTES = 16
INDEX = ("keys", "completion_indices", "prompt_starts", "completion_starts", "ended", "checksums")
TEXT = ("prompt_ids", "completion_ids")
# A student's text has its log-probability of each token, when it drew it.
TEXTS = {"teacher": TEXT, "dataset": TEXT, "student": (*TEXT, "drawn_log_prob")}
SIGNALS = {
    "hidden": ("hidden", "scale", "log_sum_exp", "entropy", "log_prob"),
    "topk": ("top_ids", "top_log_probs", "end_log_prob", "tail_log_prob", "entropy"),
    "completions": (),
}
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
        tensors = {name: file.get_tensor(name) for name in INDEX}
    except SafetensorError:
        tensors = {}
    if not tensors or tensors_digest(tensors, INDEX) != record.index:
        raise CacheError(
            f"shard {str(path)!r} is damaged: its index is not the manifest's; "
            f"{_REPAIR.format(folder)}"
        )
    index = ShardIndex(**{name: tensor.numpy() for name, tensor in tensors.items()})
    if (len(index.keys), index.completion_starts[-1]) != (
        record.num_rollouts,
        record.num_tokens,
    ):
        raise CacheError(
            f"shard {str(path)!r} does not have the manifest's number of rollouts and tokens; "
            f"{_REPAIR.format(folder)}"
        )
    return index
