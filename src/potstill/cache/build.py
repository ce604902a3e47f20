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
from potstill.cache.writer import load_writer
from potstill.config import CacheOptions, Lora, Recipe, RecipeError, Validation, check_recipe
from potstill.console.progress import CacheDisplay
from potstill.engines.make import engine_spec, make_engine, refuse_missing_program
from potstill.engines.native import NativeEngine
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
    StudentIdentity,
    TeacherIdentity,
    identify,
    identify_folder,
    read_manifest,
    sampling_settings,
)
from potstill.teachers.protocol import Teacher
from potstill.teachers.remote.base import RemoteTeacher
from potstill.teachers.shards import INDEX_OF_ALL, ShardIndex, index_together, key_of, read_index
from potstill.teachers.store import Cache
from potstill.training.setup import Setup, prepare
from potstill.types import Example

# The file with the indices of all shards is written after so many new ones.
INDEX_EVERY = 256


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
    """Write completions and the signal of a recipe's teacher on them to the folder `out`, or what
    is missing of them there.

    `options` say who writes the completions. A cache that is there is added to: more prompts, more
    completions of each. Objects take the place of names as in `train`. Raises CacheError for a
    folder with anything else in it, for a cache of another teacher or writer or of other settings,
    and for a full disk; what was finished stays.
    """
    from filelock import FileLock, Timeout

    check_recipe(recipe)
    refuse_missing_program(engine_spec(recipe))
    options, out = options or CacheOptions(), Path(out)
    recipe = _as_written(recipe, options)
    _check_folder(out)
    world = distributed.start()
    _refuse_ranks(recipe, world)
    identity = None
    if recipe.objective.prefix == "student":
        student, identity = load_writer(recipe, world, student, tokenizer)
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
    assert setup.teacher is not None, "the recipe asks for a teacher's signal"
    wanted = _manifest(recipe, setup, setup.teacher, options, identity)
    try:
        with contextlib.ExitStack() as stack:
            if world.is_main:
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(out / ".lock", timeout=0))
                _begin(out, wanted, setup.teacher)
            distributed.wait_for_all(world)
            cache = Cache(out)
            refuse_other_cache(cache, wanted)
            engine = _engine(recipe, setup, out, world)
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
    """The recipe of what is stored: a teacher's signal on its own completions, a student's, or the
    data's."""
    if recipe.teacher.model == "self":
        raise RecipeError(
            'teacher.model is "self", which changes from run to run; name the model to cache'
        )
    if recipe.teacher.url is not None and recipe.teacher.protocol == "logprobs":
        raise RecipeError(
            'teacher.protocol is "logprobs", and a cache is made of hidden states; use "states"'
        )
    if recipe.teachers:
        raise RecipeError(
            f"teachers names {len(recipe.teachers)} beside the first one, and a cache holds one "
            "teacher; build it from a recipe with that teacher alone"
        )
    if recipe.objective.kl == "none":
        raise RecipeError('objective.kl is "none", which has no teacher to cache; choose a KL')
    if min(options.completions, options.rollouts_per_shard) < 1:
        raise RecipeError(
            f"--completions is {options.completions} and --rollouts-per-shard "
            f"{options.rollouts_per_shard}; both must be at least 1"
        )
    by_default = "dataset" if recipe.objective.prefix == "dataset" else "teacher"
    writer, spec = options.writer or by_default, recipe.student
    if options.model is not None:
        if writer != "student":
            raise RecipeError(
                f"--model is {options.model!r} and the writer is the {writer}; it names a student "
                "that writes: set --writer student, or leave it out"
            )
        fields = {"model": options.model, "init": "pretrained", "lora": Lora()}
        spec = spec.model_copy(update=fields)
    if writer == "dataset" and (options.payload == "completions" or options.completions > 1):
        raise RecipeError(
            'the writer is "dataset", whose completions are there already, one a prompt; '
            "use --payload hidden or topk and --completions 1"
        )
    signal = "topk" if options.payload == "topk" else "full"
    objective = recipe.objective.model_copy(update={"prefix": writer, "signal": signal})
    teacher = recipe.teacher.model_copy(update={"cache": None})
    # A cache has all prompts, whichever a run then holds out.
    validation = Validation(num_prompts=0)
    update = {"objective": objective, "teacher": teacher, "student": spec}
    return recipe.model_copy(update=update | {"validation": validation})


def _refuse_ranks(recipe: Recipe, world: World) -> None:
    """Raise RecipeError for a teacher that all ranks must pass through together, and for an engine
    that they must ask together: a build gives each its own shards."""
    if recipe.engine.url is not None and world.size > 1:
        raise RecipeError(
            f"engine.url is {recipe.engine.url!r} and there are {world.size} ranks, which make "
            "shards of a cache by themselves; remove it, so that each rank starts a server, or "
            "build on one rank"
        )
    if recipe.teacher.placement == "sharded" and world.size > 1:
        raise RecipeError(
            f'teacher.placement is "sharded" and there are {world.size} ranks, which make shards '
            'of a cache by themselves; use "replicated", or build on one rank'
        )


def _engine(recipe: Recipe, setup: Setup, out: Path, world: World) -> Engine:
    """The engine of whoever writes."""
    writer: Any = recipe.objective.prefix
    if writer == "dataset":
        return NativeEngine(None)
    model = setup.student if writer == "student" else setup.teacher
    assert model is not None, "the recipe asks for a teacher's signal"
    if model.decoder is None:
        raise RecipeError(
            f"the teacher {model.name!r} does not write where it is; use --writer student or "
            'dataset, or teacher.placement = "replicated"'
        )
    place: dict[str, Any] = {"folder": out / ".engine", "max_tokens": setup.longest}
    return make_engine(recipe, model.decoder, writer, world=world, **place)


def _identity(teacher: Teacher) -> TeacherIdentity:
    """The identity of a teacher here, or of one elsewhere: its server's fingerprint where it tells
    one, and none of files, of which only the head's need be here."""
    if isinstance(teacher, LanguageModel):
        return identify(teacher)
    assert isinstance(teacher, RemoteTeacher), "other teachers are refused"
    known = identify_folder(teacher.spec)
    assert known is not None, "its configuration was read here"
    return dataclasses.replace(known, parameters=teacher.weights_digest(), files=None)


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
    recipe: Recipe,
    setup: Setup,
    teacher: Teacher,
    options: CacheOptions,
    student: StudentIdentity | None,
) -> Manifest:
    """The cache's manifest before any shard is made."""
    is_hidden, is_topk = options.payload == "hidden", options.payload == "topk"
    writer: Any = recipe.objective.prefix
    writes = writer != "dataset"
    settings = Settings(
        payload=options.payload,
        dtype=options.dtype if is_hidden else None,
        writer=writer,
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
    assert head is not None, "only a cache has none"
    return Manifest(
        teacher=_identity(teacher),
        student=student,
        teacher_end_ids=teacher.end_ids,
        teacher_vocab_size=teacher.vocab_size,
        hidden_size=head.weight_VD.shape[1],
        head_scale=head.scale,
        head_softcap=head.softcap,
        head_sha256=None,
        settings=settings,
        date=setup.date,
    )


def _begin(out: Path, wanted: Manifest, teacher: Teacher) -> None:
    """Write what does not change, and remove what a killed build left that no manifest lists."""
    (out / "shards").mkdir(exist_ok=True)
    if not (out / "manifest.json").exists():
        teacher.tokenizer.save_pretrained(out / "tokenizer")
        sha256 = None
        if wanted.settings.payload == "hidden":
            head = teacher.head
            assert head is not None, "only a cache has none"
            tensors = {"weight": head.weight_VD.detach(), "bias": head.bias_V}
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
    mine, theirs = cache.manifest.student, wanted.student
    if mine is not None and theirs is not None and mine.parameters != theirs.parameters:
        cache.refuse_other("the student", mine.describe(), theirs.describe())


def _fill(
    cache: Cache,
    recipe: Recipe,
    setup: Setup,
    teacher: Teacher,
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
    indices = list(cache.indices)
    if world.is_main and indices and not portions:
        indices = _index(out, manifest, indices, is_last=True)
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
            indices = _index(out, manifest, indices, is_last=first + world.size >= len(portions))
        display.update(**sizes_of(new))
    return manifest


def _index(
    out: Path, manifest: Manifest, indices: list[ShardIndex], *, is_last: bool
) -> list[ShardIndex]:
    """Write the one file with the indices of all shards, now and then and at the end; the indices
    that it has. A kill before leaves them to the shards themselves."""
    new = manifest.shards[len(indices) :]
    if not is_last and len(new) < INDEX_EVERY:
        return indices
    indices = indices + [read_index(out, record) for record in new]
    save_whole(index_together(manifest.shards, indices), out / INDEX_OF_ALL)
    return indices


def sizes_of(records: Sequence[ShardRecord]) -> dict[str, int]:
    """Everything that a display is told of finished shards."""
    return {
        "num_rollouts": sum(record.num_rollouts for record in records),
        "num_tokens": sum(record.num_tokens for record in records),
        "num_bytes": sum(record.num_bytes for record in records),
    }
