"""Making and checking a teacher cache.

The work is cut into shards of a fixed number of rollouts. Each is made from its own prompts and
seeds alone, and named by them. So a build that was killed goes on with the shards that are missing
and ends with the same files, and several ranks end with the files of one. A shard gets its name
when it is whole on disk, and the manifest lists it after that.
"""

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.cache.make_shard import make_shard, save_whole
from potstill.config import CacheOptions, Recipe, RecipeError, Validation, check_recipe
from potstill.console.progress import CacheDisplay
from potstill.engines.make import make_engine, refuse_missing_program
from potstill.engines.protocol import Engine
from potstill.files import file_digest, write_atomically
from potstill.models import distributed
from potstill.models.distributed import World
from potstill.models.language_model import LanguageModel
from potstill.teachers.manifest import (
    SHARD_FILE,
    CacheError,
    Manifest,
    Settings,
    ShardRecord,
    identify,
    read_manifest,
    sampling_settings,
)
from potstill.teachers.shards import key_of
from potstill.teachers.store import Cache
from potstill.training.setup import Setup, prepare
from potstill.types import Example


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

    check_recipe(recipe)
    refuse_missing_program(recipe)
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
            place: dict[str, Any] = {"folder": out / ".engine", "max_tokens": setup.longest}
            engine = make_engine(recipe, setup.teacher.model, "teacher", world=world, **place)
            stack.callback(engine.close)
            display = stack.enter_context(CacheDisplay(quiet or not world.is_main))
            return _fill(cache, recipe, setup, setup.teacher, engine, options, world, display)
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
    if recipe.objective.kl == "none":
        raise RecipeError('objective.kl is "none", which has no teacher to cache; choose a KL')
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
    # A cache has all prompts, whichever a run then holds out.
    validation = Validation(num_prompts=0)
    return recipe.model_copy(
        update={"objective": objective, "teacher": teacher, "validation": validation}
    )


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
    """The cache's manifest before any shard is made."""
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
    engine: Engine,
    options: CacheOptions,
    world: World,
    display: CacheDisplay,
) -> Manifest:
    """Make the missing shards, one a rank at a time; after each round the manifest lists them."""
    manifest, out = cache.manifest, cache.folder
    # A text has one entry, however often the data has it.
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
            else make_shard(mine, recipe, setup, teacher, engine, manifest.settings, out)
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
