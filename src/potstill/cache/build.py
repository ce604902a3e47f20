"""Making and checking a teacher cache.

The work is cut into shards of a fixed number of rollouts. Each is made from its own prompts and
seeds alone, and named by them. So a build that was killed goes on with the shards that are missing
and ends with the same files, and several ranks end with the files of one. A shard gets its name
when it is whole on disk, and the manifest lists it after that.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from potstill.config import CacheOptions, Recipe, RecipeError, check_recipe
from potstill.console.progress import CacheDisplay
from potstill.files import file_digest, flush, write_atomically
from potstill.kl.fused import close_kl, fused_statistics
from potstill.kl.topk import top_k_of
from potstill.models import distributed
from potstill.models.batch import Batch
from potstill.models.distributed import World
from potstill.models.language_model import LanguageModel
from potstill.rollouts.batching import batch_places, make_batch
from potstill.rollouts.prefixes import Writing, write_rollouts
from potstill.teachers.manifest import (
    SHARD_FILE,
    CacheError,
    Manifest,
    Settings,
    ShardRecord,
    identify,
    read_manifest,
    sampling_settings,
    tensors_digest,
)
from potstill.teachers.shards import (
    INDEX,
    KEY_BYTES,
    SIGNALS,
    TEXT,
    checksum,
    decode_rows,
    encode_rows,
    key_of,
)
from potstill.teachers.store import Cache
from potstill.training.setup import Setup, prepare
from potstill.types import Example, Prompt, Rollout

# What a shard holds many of: a prompt, its key, and the number of its completion.
Entry = tuple[Prompt, bytes, int]


def build_cache(
    recipe: Recipe,
    out: Path | str,
    options: CacheOptions | None = None,
    *,
    student=None,
    teacher=None,
    tokenizer=None,
    prompts: Sequence[str | dict | Example] | None = None,
    quiet: bool = False,
) -> Manifest:
    """Write the completions and the signal of a recipe's teacher to the folder `out`, or what is
    missing of them there.

    With `objective.prefix = "dataset"` the completions are the data's, with any other the teacher
    writes them. A cache that is there is added to: more prompts, more completions of each. Objects
    take the place of names as in `train`. Raises CacheError for a folder with anything else in it,
    for a cache of another teacher or of other settings, and for a full disk; what was finished
    stays.
    """
    from filelock import FileLock, Timeout

    check_recipe(recipe, Recipe)
    options, out = options or CacheOptions(), Path(out)
    recipe = _as_written(recipe, options)
    _check_folder(out)
    world = distributed.start()
    date = read_manifest(out).date if (out / "manifest.json").exists() else None
    setup = prepare(
        recipe,
        world,
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        prompts=prompts,
        date=date,
    )
    assert isinstance(setup.teacher, LanguageModel), "the recipe asks for a live teacher's signal"
    wanted = _manifest(recipe, setup, setup.teacher, options)
    try:
        with contextlib.ExitStack() as stack:
            if world.is_main:
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(out / ".lock", timeout=0))
                _begin(out, wanted, setup.teacher)
            distributed.wait_for_all(world)
            cache = Cache(out)
            refuse_other_cache(cache, wanted)
            display = stack.enter_context(CacheDisplay(quiet or not world.is_main))
            return _fill(cache, recipe, setup, setup.teacher, options, world, display)
    except Timeout:
        raise CacheError(
            f"cache {str(out)!r} is being built by another process; wait for it or stop it"
        ) from None
    except OSError as error:
        raise CacheError(
            f"{str(error.filename or out)!r} cannot be written: {error.strerror}; what is "
            "finished is kept: make room and run the same command again"
        ) from None


def _as_written(recipe: Recipe, options: CacheOptions) -> Recipe:
    """The recipe of what is stored: a live teacher's signal on its own completions, or on the
    data's."""
    if recipe.teacher.model == "self":
        raise RecipeError(
            'teacher.model is "self", which changes from run to run; name the model to cache'
        )
    if min(options.completions, options.rollouts_per_shard) < 1:
        raise RecipeError(
            f"--completions is {options.completions} and --rollouts-per-shard "
            f"{options.rollouts_per_shard}; both must be at least 1"
        )
    writer = "dataset" if recipe.objective.prefix == "dataset" else "teacher"
    if writer == "dataset" and (options.payload == "completions" or options.completions > 1):
        raise RecipeError(
            'objective.prefix is "dataset", whose completions are there already, one a prompt; '
            "use --payload hidden or topk and --completions 1"
        )
    signal = "topk" if options.payload == "topk" else "full"
    objective = recipe.objective.model_copy(update={"prefix": writer, "signal": signal})
    teacher = recipe.teacher.model_copy(update={"cache": None})
    return recipe.model_copy(update={"objective": objective, "teacher": teacher})


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise CacheError(f"cache folder {str(out)!r} is a file; choose another --out")
    is_empty = not out.exists() or all(path.name.startswith(".") for path in out.iterdir())
    # A build that was killed before its manifest was written leaves these.
    began = {"tokenizer", "head.safetensors", "shards"}
    if is_empty or (out / "manifest.json").exists():
        return
    if {path.name for path in out.iterdir() if path.name[0] != "."} <= began and not any(
        (out / "shards").glob("[!.]*")
    ):
        return
    raise CacheError(
        f"folder {str(out)!r} is not empty and holds no teacher cache; choose another --out"
    )


def _manifest(
    recipe: Recipe, setup: Setup, teacher: LanguageModel, options: CacheOptions
) -> Manifest:
    """What the cache's manifest says before any shard is made."""
    is_hidden, is_topk = options.payload == "hidden", options.payload == "topk"
    writes = recipe.objective.prefix == "teacher"
    settings = Settings(
        payload=options.payload,
        dtype=options.dtype if is_hidden else None,
        writer="teacher" if writes else "dataset",
        window=recipe.window.tokens,
        end_ids=setup.ends.stop_ids,
        sampling=sampling_settings(recipe) if writes else None,
        seed=recipe.train.seed if writes else None,
        top_k=recipe.objective.top_k if is_topk else None,
        temperature=recipe.objective.temperature if is_topk else None,
        vocab_size=setup.loss.vocab_size if is_topk or writes else None,
        end_class=setup.ends.class_ids if is_topk else None,
        rollouts_per_shard=options.rollouts_per_shard,
    )
    head = teacher.head
    return Manifest(
        teacher=identify(teacher),
        teacher_end_ids=teacher.end_ids,
        teacher_vocab_size=teacher.vocab_size,
        hidden_size=head.weight_VD.shape[1],
        head_scale=head.scale,
        head_softcap=head.softcap,
        head_sha256=None,
        settings=settings,
        date=setup.date,
    )


def _begin(out: Path, wanted: Manifest, teacher: LanguageModel) -> None:
    """Write what does not change, and remove what a killed build left that no manifest lists."""
    (out / "shards").mkdir(exist_ok=True)
    if not (out / "manifest.json").exists():
        teacher.tokenizer.save_pretrained(out / "tokenizer")
        sha256 = None
        if wanted.settings.payload == "hidden":
            tensors = {"weight": teacher.head.weight_VD.detach(), "bias": teacher.head.bias_V}
            save_whole(
                {name: t for name, t in tensors.items() if t is not None}, out / "head.safetensors"
            )
            sha256 = file_digest(out / "head.safetensors")
        write_atomically(
            out / "manifest.json", dataclasses.replace(wanted, head_sha256=sha256).to_json()
        )
    listed = {record.file for record in read_manifest(out).shards}
    for path in (out / "shards").iterdir():
        name = f"shards/{path.name.removeprefix('.unfinished-')}"
        if (
            re.match(SHARD_FILE, name)
            and (path.name[0] == "." or name not in listed)
            and path.is_file()
        ):
            path.unlink()


def refuse_other_cache(cache: Cache, wanted: Manifest) -> None:
    """Raise CacheError if a build would add what does not belong to what is there."""
    for part in ("teacher", "settings"):
        mine, theirs = getattr(cache.manifest, part), getattr(wanted, part)
        for field in dataclasses.fields(mine):
            if field.name not in ("name", "files"):
                cache.refuse_other(
                    field.name, getattr(mine, field.name), getattr(theirs, field.name)
                )


def _fill(
    cache: Cache,
    recipe: Recipe,
    setup: Setup,
    teacher: LanguageModel,
    options: CacheOptions,
    world: World,
    display: CacheDisplay,
) -> Manifest:
    """Make the missing shards, one a rank at a time; after each round the manifest lists them."""
    manifest, out = cache.manifest, cache.folder
    # Of one text there is one entry, however often the data has it.
    unique = {key_of(prompt, manifest.settings.writer): prompt for prompt in setup.prompts}
    there = cache.entries()
    entries = [
        (prompt, key, number)
        for number in range(options.completions)
        for key, prompt in unique.items()
        if (key, number) not in there
    ]
    size = options.rollouts_per_shard
    portions = [entries[start : start + size] for start in range(0, len(entries), size)]
    display.begin(manifest.total("num_rollouts"), len(entries))
    for first in range(0, len(portions), world.size):
        mine = portions[first + world.rank] if first + world.rank < len(portions) else None
        record = (
            None
            if mine is None
            else _make_shard(mine, recipe, setup, teacher, manifest.settings, out)
        )
        new = tuple(each for each in distributed.gather(record, world) if each is not None)
        manifest = dataclasses.replace(manifest, shards=manifest.shards + new)
        if world.is_main:
            write_atomically(out / "manifest.json", manifest.to_json())
        display.update(**sizes_of(new))
    return manifest


def sizes_of(records: Sequence[ShardRecord]) -> dict[str, int]:
    """Everything that a display is told of finished shards."""
    return {
        "num_rollouts": sum(record.num_rollouts for record in records),
        "num_tokens": sum(record.num_tokens for record in records),
        "num_bytes": sum(record.num_bytes for record in records),
    }


def _make_shard(
    entries: Sequence[Entry],
    recipe: Recipe,
    setup: Setup,
    teacher: LanguageModel,
    settings: Settings,
    out: Path,
) -> ShardRecord:
    """Write the completions of some entries, score them, and store both."""
    writing = Writing(
        objective=recipe.objective,
        models={"teacher": teacher.model},
        window=settings.window,
        end_ids=setup.ends.stop_ids,
        sampling=recipe.sampling,
        rollouts_per_step=len(entries),
        vocab_size=settings.vocab_size,
    )
    prompts = [prompt for prompt, _, _ in entries]
    seeds = [(recipe.train.seed, int.from_bytes(key), number) for _, key, number in entries]
    rollouts = [
        # Rows are stored for all tokens; which of them are trained on is for the run to say.
        dataclasses.replace(rollout, trained=(True,) * len(rollout.completion_ids))
        for rollout in write_rollouts(writing, prompts, seeds)
    ]
    signals: list[dict[str, Tensor]] = [{} for _ in rollouts]
    kls: list[float] = []
    if settings.payload != "completions":
        groups = batch_places(rollouts, recipe.train.tokens_per_batch)
        signals, kls = _signals_of(rollouts, groups, teacher, setup, settings)
    # Ids are most of what is stored beside the signal, where prompts are long.
    ids_type = torch.uint16 if teacher.vocab_size <= 2**16 else torch.int32
    texts = [
        {
            "prompt_ids": torch.tensor(rollout.prompt.ids_of("teacher"), dtype=ids_type),
            "completion_ids": torch.tensor(rollout.completion_ids, dtype=ids_type),
        }
        for rollout in rollouts
    ]
    of_signal = SIGNALS[settings.payload]
    rows = [text | signal for text, signal in zip(texts, signals, strict=True)]
    tensors = {
        name: torch.cat([row[name] for row in rows]).contiguous() for name in (*TEXT, *of_signal)
    }
    keys = np.frombuffer(b"".join(key for _, key, _ in entries), np.uint8).reshape(-1, KEY_BYTES)
    tensors |= {
        "keys": torch.from_numpy(keys.copy()),
        "completion_indices": torch.tensor([number for _, _, number in entries], dtype=torch.int32),
        "prompt_starts": _starts([len(row["prompt_ids"]) for row in rows]),
        "completion_starts": _starts([len(row["completion_ids"]) for row in rows]),
        "ended": torch.tensor([rollout.stop == "end" for rollout in rollouts]),
        "checksums": torch.tensor(
            [[checksum([row[n] for n in names]) for names in (TEXT, of_signal)] for row in rows]
        ),
    }
    name = hashlib.sha256(repr([(key, number) for _, key, number in entries]).encode()).hexdigest()[
        :16
    ]
    path = out / "shards" / f"{name}.safetensors"
    save_whole(tensors, path)
    return ShardRecord(
        file=str(path.relative_to(out)),
        num_rollouts=len(entries),
        num_tokens=len(tensors["completion_ids"]),
        num_bytes=path.stat().st_size,
        sha256=file_digest(path),
        index=tensors_digest(tensors, INDEX),
        kl=sum(kls) / len(kls) if kls else None,
    )


def _signals_of(
    rollouts: Sequence[Rollout],
    groups: Sequence[Sequence[int]],
    teacher: LanguageModel,
    setup: Setup,
    settings: Settings,
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """The stored columns of each rollout, by its place, and the KL of each token to what is
    stored."""
    signals: list[dict[str, Tensor]] = [{} for _ in rollouts]
    kls: list[float] = []
    for places in groups:
        batch = make_batch([rollouts[place] for place in places], setup.student.device)
        columns, kl_N = _score(batch, teacher, setup, settings)
        kls += [] if kl_N is None else kl_N.tolist()
        lengths = [len(rollout.completion_ids) for rollout in batch.rollouts]
        split = {name: column.cpu().split(lengths) for name, column in columns.items()}
        for i, place in enumerate(places):
            signals[place] = {name: parts[i] for name, parts in split.items()}
    return signals, kls


@torch.no_grad()
def _score(
    batch: Batch, teacher: LanguageModel, setup: Setup, settings: Settings
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What is stored of each token of a batch [N, ...], and KL(teacher || stored) [N] where
    something is rounded."""
    hidden_NE = teacher.signal_at(batch)
    head = teacher.head
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
