"""Check of a cache: every checksum, the head, and some rows against the live teacher."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from potstill.cache.build import sizes_of
from potstill.config import TeacherSpec
from potstill.console.progress import CacheDisplay
from potstill.files import write_atomically
from potstill.kl.fused import close_kl, fused_statistics
from potstill.kl.head import Head
from potstill.kl.topk import TopK, picked_log_probs
from potstill.models import distributed
from potstill.models.language_model import LanguageModel, find_folder
from potstill.models.probe import ready
from potstill.rollouts.batching import make_batch
from potstill.teachers.manifest import CacheError, Manifest, ShardRecord, read_manifest
from potstill.teachers.shards import read_index, read_together
from potstill.teachers.store import Cache

# `verify_cache` computes so many log-sum-exps of each shard again.
VERIFIED_ROWS = 256
# It gives so many rollouts of the whole cache to the live teacher.
VERIFIED_ROLLOUTS = 32


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The findings of `verify_cache`. `head_error` is the largest relative error of a log-sum-exp
    computed again, `live_kl` the mean KL(teacher || what is stored) against the live teacher in
    nats (None without one).
    """

    manifest: Manifest
    broken: tuple[str, ...]
    head_error: float | None
    live_kl: float | None
    note: str | None


def verify_cache(
    folder: Path | str,
    *,
    teacher: LanguageModel | str | None = None,
    drop_broken: bool = False,
    quiet: bool = False,
) -> Verified:
    """Read a whole cache: checksums of all files, log-sum-exps against the head, some rollouts
    against the teacher.

    `teacher` is where the teacher is now, if it is not where it was at the build; without one at
    either place that last check is left out, which `note` then says. With `drop_broken` damaged
    shards are removed, so that a build makes them again. Raises CacheError for a damaged manifest,
    head or index of all shards, and for another teacher.
    """
    folder, device = Path(folder), distributed.start().device
    manifest = read_manifest(folder)
    whole = Cache(folder, dataclasses.replace(manifest, shards=()), ())
    read_together(folder, manifest.shards)
    head = whole.head(device) if manifest.settings.payload == "hidden" else None
    broken: dict[ShardRecord, str] = {}
    errors = [0.0]
    with CacheDisplay(quiet) as display:
        display.begin(0, manifest.total("num_rollouts"))
        for record in manifest.shards:
            try:
                index = read_index(folder, record)
                alone = Cache(folder, dataclasses.replace(manifest, shards=(record,)), (index,))
                errors.append(alone.check_shard(0, head, VERIFIED_ROWS))
            except CacheError as error:
                broken[record] = str(error)
            display.update(**sizes_of([record]))
    kept = dataclasses.replace(
        manifest, shards=tuple(r for r in manifest.shards if r not in broken)
    )
    if broken and drop_broken:
        for record in broken:
            (folder / record.file).unlink(missing_ok=True)
        write_atomically(folder / "manifest.json", kept.to_json())
    live, note = _live_teacher(whole, teacher)
    kl = None if live is None else _live_kl(Cache(folder, kept), live.to(device), head)
    return Verified(
        manifest=manifest,
        broken=tuple(broken.values()),
        head_error=max(errors) if head is not None else None,
        live_kl=kl,
        note=note,
    )


def _live_teacher(
    cache: Cache, teacher: LanguageModel | str | None
) -> tuple[LanguageModel | None, str | None]:
    """The cache's teacher, checked to be it, or why there is none."""
    mine = cache.manifest.teacher
    if not isinstance(teacher, LanguageModel):
        if find_folder(teacher or mine.name) is None:
            return (
                None,
                f"the teacher {teacher or mine.name!r} is not on this machine: nothing was "
                "compared with it",
            )
        teacher = ready(teacher or mine.name, dtype=mine.dtype)
    cache.check_teacher(TeacherSpec(), teacher)
    return teacher.eval(), None


@torch.no_grad()
def _live_kl(cache: Cache, teacher: LanguageModel, head: Head | None) -> float | None:
    """Mean KL(live teacher || stored) of some rollouts' tokens; of the kept tokens alone where only
    they are stored."""
    places = [
        (shard, row) for shard, index in enumerate(cache.indices) for row in range(len(index.keys))
    ]
    if not places or cache.manifest.settings.payload == "completions":
        return None
    step = max(len(places) // VERIFIED_ROLLOUTS, 1)
    kl = num_tokens = 0.0
    for place in places[::step]:
        batch = make_batch([cache.stored_rollout(place)], teacher.device)
        hidden_NE = teacher.signal_at(batch)
        if head is not None:
            kl_N, _ = close_kl(cache.rows_of(batch.rollouts, head), head, hidden_NE, teacher.head)
        else:
            kl_N = _kept_kl(
                cache.top_k_of(batch.rollouts, teacher.device), hidden_NE, teacher.head, cache
            )
        kl += float(kl_N.sum())
        num_tokens += len(kl_N)
    return kl / num_tokens


def _kept_kl(stored: TopK, hidden_NE: Tensor, head: Head, cache: Cache) -> Tensor:
    """KL(live teacher || stored) [N] of the kept tokens' measures, in float64, term by term: none
    is negative."""
    settings = cache.manifest.settings
    options = {"vocab_size": settings.vocab_size, "temperature": settings.temperature or 1}
    log_sum_exp_N = fused_statistics(hidden_NE, head, **options).student_log_sum_exp_N
    live = picked_log_probs(
        hidden_NE, head, stored.token_ids_NK, log_sum_exp_N, options["temperature"]
    ).double()
    d = live - stored.log_probs_NK
    return (live.exp() * (d + torch.expm1(-d))).sum(-1)
