"""Manifest of a teacher cache: who wrote it and how, its shards, and the teacher's identity."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from potstill.config import Recipe, TeacherModel, load_recipe
from potstill.files import file_digest, json_digest, seal, unseal
from potstill.models.language_model import (
    LanguageModel,
    find_folder,
    is_run,
    load_config,
    load_tokenizer,
)
from potstill.models.lean.quantized import type_to_load
from potstill.runs.run_folder import last_row

FORMAT = 2

# The only files of a cache that are ever removed.
SHARD_FILE = r"^shards/[0-9a-f]{16}\.safetensors$"

Count = Annotated[int, Field(ge=1)]
# Settings that each payload needs.
NEEDED = {
    "hidden": ("dtype",),
    "topk": ("top_k", "temperature", "vocab_size", "end_class"),
    "completions": (),
}

Payload = Literal["hidden", "topk", "completions"]


class CacheError(ValueError):
    """A cache that cannot be used as asked, or is damaged; the message names the file and says what
    to do."""


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """Hashes of what a teacher's signal depends on.

    `parameters` is that of the loaded weights, `files` that of the model folder's safetensors,
    which can be taken without loading them; None where there is no folder or it has no weights.
    """

    name: str
    dtype: str
    parameters: str | None
    files: str | None
    config: str
    tokenizer: str
    chat_template: str


@dataclass(frozen=True, kw_only=True)
class StudentIdentity:
    """The student that wrote a cache: its name, a hash of its weights, and the run (the identity of
    its recipe) that it was in after `step` steps; None where it is no run's."""

    name: str
    parameters: str
    run: str | None
    step: int | None

    def describe(self) -> str:
        """The student in words."""
        when = "" if self.step is None else f" after step {self.step:,}"
        return f"{self.name}{when}, weights {self.parameters}"

    def steps_before(self, recipe: Recipe) -> int | None:
        """How many steps of training lie between it and the first step of a run; None where it is
        not known to be of the run, nor of the run that made the run's student."""
        if self.run is None or self.step is None:
            return None
        if self.run == recipe.identity():
            return -self.step
        folder = Path(recipe.student.model)
        if not is_run(folder) or load_recipe(folder / "recipe.toml").identity() != self.run:
            return None
        return last_row(folder)["step"] - self.step


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a cache is written. `top_k`, `temperature` and `end_class` are those of payload topk.

    `vocab_size` is how many rows the teacher's tokens were drawn from, or its likeliest chosen
    from.
    """

    payload: Payload
    dtype: Literal["float32", "bfloat16", "int8"] | None
    writer: Literal["teacher", "student", "dataset"]
    window: Count
    end_ids: tuple[int, ...]
    sampling: dict[str, int | float] | None
    seed: int | None
    top_k: int | None
    temperature: float | None
    vocab_size: int | None
    end_class: tuple[int, ...] | None
    rollouts_per_shard: Count

    def describe(self) -> str:
        """The payload in words."""
        return {
            "hidden": f"hidden states in {self.dtype}",
            "topk": f"the {self.top_k} likeliest tokens",
            "completions": "completions alone",
        }[self.payload]


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A shard in the manifest. `kl` is the mean KL(teacher || what is stored) a token, in nats."""

    file: Annotated[str, Field(pattern=SHARD_FILE)]
    num_rollouts: Count
    num_tokens: Count
    num_bytes: Count
    sha256: str
    index: str
    kl: float | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a cache but its numbers. `date` is when its build began, which chat
    templates were told; `student` is who wrote the completions, where a student did."""

    teacher: TeacherIdentity
    teacher_end_ids: tuple[int, ...]
    teacher_vocab_size: Count
    hidden_size: Count
    head_scale: FiniteFloat
    head_softcap: FiniteFloat | None
    head_sha256: str | None
    settings: Settings
    date: str
    student: StudentIdentity | None = None
    shards: tuple[ShardRecord, ...] = ()
    format: int = FORMAT

    def total(self, field: str) -> int:
        """The sum of one field over all shards."""
        return sum(getattr(shard, field) for shard in self.shards)

    @property
    def mean_kl(self) -> float | None:
        """The mean of `kl` over all tokens, in nats; None where what is stored is what the teacher
        computed."""
        known = [(shard.kl, shard.num_tokens) for shard in self.shards if shard.kl is not None]
        return sum(kl * n for kl, n in known) / sum(n for _, n in known) if known else None

    def to_json(self) -> str:
        return seal(dataclasses.asdict(self), indent=1)


def read_manifest(folder: Path) -> Manifest:
    """Raises CacheError when there is none, or it is not what a build wrote, or leads out of the
    folder."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise CacheError(
            f"{str(folder)!r} holds no teacher cache (no manifest.json); make one with potstill "
            "cache build"
        )
    try:
        sealed = json.loads(path.read_bytes())
        known = sealed["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CacheError(
            f"{str(path)!r} is no manifest of a teacher cache; restore it or build the cache again"
        ) from None
    if known != FORMAT:
        raise CacheError(
            f"{str(path)!r} has format {known!r}, and {FORMAT} is known; build the cache again"
        )
    data = unseal(sealed)
    if data is None:
        raise CacheError(
            f"{str(path)!r} was changed after it was written; restore it or build the cache again"
        )
    try:
        manifest = TypeAdapter(Manifest).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise CacheError(
            f"{str(path)!r}: {name} is {first['input']!r}, which no build writes "
            f"({first['msg']}); restore it or build the cache again"
        ) from None
    settings, files = manifest.settings, [record.file for record in manifest.shards]
    unset = [name for name in NEEDED[settings.payload] if getattr(settings, name) is None]
    unset += ["student"] if settings.writer == "student" and manifest.student is None else []
    if unset or len(set(files)) < len(files):
        what = f"a {settings.payload} cache without {unset[0]}" if unset else "one shard twice"
        raise CacheError(
            f"{str(path)!r} has {what}, which no build writes; restore it or build the cache again"
        )
    # A link would let what is read, made again or removed here lie anywhere.
    for linked in (folder / "shards", *(folder / record.file for record in manifest.shards)):
        if linked.is_symlink():
            raise CacheError(f"{str(linked)!r} is a link; put what it points to in its place")
    return manifest


def identify(model: LanguageModel) -> TeacherIdentity:
    """The identity of a loaded teacher."""
    folder, dtype = find_folder(model.name), str(model.head.weight_VD.dtype).removeprefix("torch.")
    tokenizer, chat_template = tokenizer_digests(model.tokenizer)
    return TeacherIdentity(
        name=model.name,
        dtype=dtype,
        parameters=model.weights_digest(),
        files=_files_digest(folder),
        config=_config_digest(model.model.config),
        tokenizer=tokenizer,
        chat_template=chat_template,
    )


def identify_folder(spec: TeacherModel) -> TeacherIdentity | None:
    """The identity of a teacher that is on this machine, without loading its weights; None when it
    is not."""
    folder = find_folder(spec.model)
    if folder is None:
        return None
    config = load_config(spec.model, spec.trust_remote_code)
    tokenizer, chat_template = tokenizer_digests(load_tokenizer(spec.model, spec.trust_remote_code))
    return TeacherIdentity(
        name=spec.model,
        dtype=str(type_to_load(config, spec.dtype)).removeprefix("torch."),
        parameters=None,
        files=_files_digest(folder),
        config=_config_digest(config),
        tokenizer=tokenizer,
        chat_template=chat_template,
    )


def _files_digest(folder: Path | None) -> str | None:
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}/{file_digest(path)}/".encode())
    return digest.hexdigest()[:16] if files else None


def _config_digest(config) -> str:
    # How the model was loaded and by what is no part of what it is.
    volatile = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
    return json_digest(
        {key: value for key, value in config.to_diff_dict().items() if key not in volatile}
    )


def tokenizer_digests(tokenizer) -> tuple[str, str]:
    """Digests of the vocabulary and of the chat template."""
    words = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.all_special_ids}
    return json_digest(words), json_digest(tokenizer.chat_template or "")


def arrays_digest(arrays: Mapping[str, np.ndarray], names: Sequence[str]) -> str:
    """A hash of the values of the named arrays."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()[:16]


def sampling_settings(recipe: Recipe) -> dict[str, float]:
    """The sampling fields that decide which completions are likely."""
    sampling = recipe.sampling
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
