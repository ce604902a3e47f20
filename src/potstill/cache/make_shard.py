"""One shard of a teacher cache: its completions written, scored, and stored.

A shard is made from its own prompts and seeds alone, and named by them.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from potstill.config import Recipe
from potstill.engines.protocol import Engine
from potstill.files import file_digest, flush
from potstill.kl.fused import close_kl, fused_statistics
from potstill.kl.topk import top_k_of
from potstill.models.batch import Batch
from potstill.rollouts.batching import batch_places, make_batch
from potstill.rollouts.prefixes import Writing, write_rollouts
from potstill.teachers.manifest import Settings, ShardRecord, arrays_digest
from potstill.teachers.protocol import Teacher
from potstill.teachers.remote.reach import expect
from potstill.teachers.shards import (
    INDEX,
    KEY_BYTES,
    SIGNALS,
    TEXTS,
    checksum,
    decode_rows,
    encode_rows,
)
from potstill.training.setup import Setup
from potstill.types import Prompt, Rollout

# A shard holds many of these: a prompt, its key, and the number of its completion.
CacheEntry = tuple[Prompt, bytes, int]


def make_shard(
    entries: Sequence[CacheEntry],
    recipe: Recipe,
    setup: Setup,
    teacher: Teacher,
    engine: Engine,
    settings: Settings,
    out: Path,
) -> ShardRecord:
    """Let the engine write completions of some entries, have the teacher score them, and store
    both."""
    rollouts = _write(entries, recipe, setup, engine, settings)
    signals: list[dict[str, Tensor]] = [{} for _ in rollouts]
    kls: list[float] = []
    if settings.payload != "completions":
        groups = batch_places(rollouts, recipe.train.tokens_per_batch)
        signals, kls = _signals_of(rollouts, groups, teacher, setup, settings)
    # Ids are most of what is stored beside the signal, where prompts are long.
    ids_type = torch.uint16 if teacher.vocab_size <= 2**16 else torch.int32
    columns = (TEXTS[settings.writer], SIGNALS[settings.payload])
    tensors = _tensors_of(entries, rollouts, signals, columns, ids_type)
    named = repr([(key, number) for _, key, number in entries])
    name = hashlib.sha256(named.encode()).hexdigest()[:16]
    path = out / "shards" / f"{name}.safetensors"
    save_whole(tensors, path)
    return ShardRecord(
        file=str(path.relative_to(out)),
        num_rollouts=len(entries),
        num_tokens=len(tensors["completion_ids"]),
        num_bytes=path.stat().st_size,
        sha256=file_digest(path),
        index=arrays_digest({name: tensors[name].numpy() for name in INDEX}, INDEX),
        kl=sum(kls) / len(kls) if kls else None,
    )


def _write(
    entries: Sequence[CacheEntry],
    recipe: Recipe,
    setup: Setup,
    engine: Engine,
    settings: Settings,
) -> list[Rollout]:
    """The completions of some entries, each from its own seed."""
    writing = Writing(
        objective=recipe.objective,
        engines={settings.writer: engine},
        window=settings.window,
        end_ids=setup.ends.stop_ids,
        sampling=recipe.sampling,
        rollouts_per_step=len(entries),
        vocab_size=settings.vocab_size,
        stores_log_probs=settings.writer == "student",
    )
    prompts = [prompt for prompt, _, _ in entries]
    seeds = [(recipe.train.seed, int.from_bytes(key), number) for _, key, number in entries]
    return [
        # Rows are stored for all tokens; which of them are trained on is for the run to say.
        dataclasses.replace(rollout, trained=(True,) * len(rollout.completion_ids))
        for rollout in write_rollouts(writing, prompts, seeds)
    ]


def _tensors_of(
    entries: Sequence[CacheEntry],
    rollouts: Sequence[Rollout],
    signals: Sequence[dict[str, Tensor]],
    columns: tuple[Sequence[str], Sequence[str]],
    ids_type: torch.dtype,
) -> dict[str, Tensor]:
    """A shard's file: the columns of the text and of the signal, and the index."""
    of_text, of_signal = columns
    texts = [
        {
            "prompt_ids": torch.tensor(rollout.prompt.ids_of("teacher"), dtype=ids_type),
            "completion_ids": torch.tensor(rollout.completion_ids, dtype=ids_type),
            "drawn_log_prob": torch.tensor(rollout.engine_log_probs or ()),
        }
        for rollout in rollouts
    ]
    rows = [text | signal for text, signal in zip(texts, signals, strict=True)]
    tensors = {
        name: torch.cat([row[name] for row in rows]).contiguous() for name in (*of_text, *of_signal)
    }
    keys = np.frombuffer(b"".join(key for _, key, _ in entries), np.uint8).reshape(-1, KEY_BYTES)
    return tensors | {
        "keys": torch.from_numpy(keys.copy()),
        "completion_indices": torch.tensor([number for _, _, number in entries], dtype=torch.int32),
        "prompt_starts": _starts([len(row["prompt_ids"]) for row in rows]),
        "completion_starts": _starts([len(row["completion_ids"]) for row in rows]),
        "ended": torch.tensor([rollout.stop == "end" for rollout in rollouts]),
        "checksums": torch.tensor(
            [[checksum([row[n] for n in names]) for names in columns] for row in rows]
        ),
    }


def _signals_of(
    rollouts: Sequence[Rollout],
    groups: Sequence[Sequence[int]],
    teacher: Teacher,
    setup: Setup,
    settings: Settings,
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """The stored columns of each rollout, by its place, and the KL of each token to what is
    stored."""
    signals: list[dict[str, Tensor]] = [{} for _ in rollouts]
    kls: list[float] = []
    device = setup.student.device
    batches = [make_batch([rollouts[place] for place in places], device) for places in groups]
    expect(teacher, batches)
    for places, batch in zip(groups, batches, strict=True):
        columns, kl_N = _score(batch, teacher, setup, settings)
        kls += [] if kl_N is None else kl_N.tolist()
        lengths = [len(rollout.completion_ids) for rollout in batch.rollouts]
        split = {name: column.cpu().split(lengths) for name, column in columns.items()}
        for i, place in enumerate(places):
            signals[place] = {name: parts[i] for name, parts in split.items()}
    return signals, kls


@torch.no_grad()
def _score(
    batch: Batch, teacher: Teacher, setup: Setup, settings: Settings
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The values to store for each token [N, ...], and KL(teacher || stored) [N] where something is
    rounded."""
    hidden_NE, head = teacher.signal_at(batch), teacher.head
    assert isinstance(hidden_NE, Tensor) and head is not None, "only a cache has less"
    if settings.payload == "topk":
        assert settings.top_k is not None
        options = setup.loss.shared_options()
        known = top_k_of(
            hidden_NE,
            head,
            settings.top_k,
            **{k: options[k] for k in ("vocab_size", "temperature", "end_ids")},
        )
        columns = (
            known.token_ids_NK.int(),
            known.log_probs_NK,
            _column(known.end_log_prob_N, hidden_NE),
        )
        assert known.entropy_N is not None, "the whole distribution is known"
        columns += (_column(known.tail_log_prob_N, hidden_NE), known.entropy_N)
        return dict(zip(SIGNALS["topk"], columns, strict=True)), None
    assert settings.dtype is not None
    stored_NE, scale = encode_rows(hidden_NE, settings.dtype)
    rounded_NE = decode_rows(stored_NE, scale, hidden_NE.dtype)
    labels_N = batch.target_ids_BT[batch.loss_mask_BT]
    if torch.equal(rounded_NE, hidden_NE):
        kl_N, stats = None, fused_statistics(rounded_NE, head, labels_N=labels_N)
    else:
        kl_N, stats = close_kl(rounded_NE, head, hidden_NE, head, labels_N=labels_N)
    columns = (
        stored_NE,
        scale,
        stats.student_log_sum_exp_N,
        stats.student_entropy_N,
        stats.student_log_prob_N,
    )
    return dict(zip(SIGNALS["hidden"], columns, strict=True)), kl_N  # pyright: ignore[reportReturnType]


def _column(values_N: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros(len(like), 0) if values_N is None else values_N[:, None]


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that has its name only once it is whole on disk. Raises OSError."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        # safetensors makes its files readable for their owner alone; this one has the user's own
        # mode.
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, unfinished)
        unfinished.chmod(mode)
        flush(unfinished)
    except (SafetensorError, OSError) as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(getattr(error, "errno", None) or 0, str(error), str(path)) from None
    unfinished.rename(path)
    flush(path.parent)
