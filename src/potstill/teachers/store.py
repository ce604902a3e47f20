"""The teacher cache: completions and the teacher's signal on disk, read in training without the
teacher's body.

What is stored is the last hidden state of each token (E numbers) and not its logits (V numbers).
The head is stored once, and the loss applies it as it would to a live teacher's states. So one
cache is exact for every KL, every mixture and every student of the vocabulary.

    manifest.json           who wrote it and how, the shards with their checksums, and its own
    index.safetensors       where the rollouts of all shards are, as each shard says too
    head.safetensors        the teacher's head (payload hidden)
    tokenizer/              the teacher's tokenizer
    shards/*.safetensors    rollouts one after the other, E or K numbers a token

Shapes: R rollouts of a shard, N their completion tokens, E teacher hidden, K kept tokens.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from potstill.config import Recipe, TeacherSpec
from potstill.files import file_digest
from potstill.kl.fused import fused_statistics
from potstill.kl.head import Head
from potstill.kl.topk import TopK
from potstill.models.language_model import LanguageModel
from potstill.teachers.manifest import (
    CacheError,
    Manifest,
    TeacherIdentity,
    identify,
    identify_folder,
    read_manifest,
    sampling_settings,
)
from potstill.teachers.shards import (
    SIGNALS,
    TEXTS,
    CachePlace,
    ShardIndex,
    checksum,
    decode_rows,
    key_of,
    open_shard,
    places_by_key,
    read_indices,
)
from potstill.types import Example, Prompt, Rollout, Stop

# Shards that are mapped at a time; what is mapped and touched counts as this process's memory.
MAX_OPEN_SHARDS = 16
# This many log-sum-exps of the first rollout that is read of a shard are computed again.
NUM_CHECKED = 8
# Relative error of a log-sum-exp: float32 sums over a vocabulary differ by less, and another head
# would by more.
HEAD_TOLERANCE = 1e-4


class Cache:
    """A cache opened for reading. Shards are mapped into memory; rows are read when they are asked
    for.

    Opening checks the manifest, the presence, size and index of every shard; reading checks each
    rollout's bytes, and once a shard some log-sum-exps. Raises CacheError that names the file.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest | None = None,
        indices: Sequence[ShardIndex] | None = None,
    ):
        self.folder = folder
        self.manifest = manifest or read_manifest(folder)
        if indices is None:
            indices = read_indices(folder, self.manifest.shards)
        self.indices = indices
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._checked: set[int] = set()
        # A note on what `check_recipe` could not compare, and the steps of training from the
        # student that wrote to the recipe's first, where they are known.
        self.note: str | None = None
        self.steps_before: int | None = None

    def path(self, shard: int) -> Path:
        return self.folder / self.manifest.shards[shard].file

    def head(self, device: torch.device | str = "cpu") -> Head:
        """The teacher's head, with its checksum compared."""
        path = self.folder / "head.safetensors"
        if not path.is_file() or file_digest(path) != self.manifest.head_sha256:
            raise CacheError(
                f"{str(path)!r} is missing or was changed after it was written; restore it or "
                "build again"
            )
        tensors = load_file(path, device=str(device))
        scale, softcap = self.manifest.head_scale, self.manifest.head_softcap
        return Head(tensors["weight"], bias_V=tensors.get("bias"), scale=scale, softcap=softcap)

    def check_recipe(self, recipe: Recipe, teacher: LanguageModel | None = None) -> None:
        """Refuse a recipe whose teacher (`teacher`, where it is loaded), sampling or window is not
        the cache's."""
        settings, objective = self.manifest.settings, recipe.objective
        ours: dict[str, Any] = {"writer": objective.prefix}
        if settings.writer != "dataset":
            ours["sampling"] = sampling_settings(recipe)
        for name, value in ours.items():
            self.refuse_other(name, getattr(settings, name), value)
        if recipe.window.tokens > settings.window:
            raise CacheError(
                f"cache {str(self.folder)!r} was built with window.tokens = {settings.window} "
                f"and the recipe has {recipe.window.tokens}; lower it or build another cache"
            )
        if settings.payload == "topk" and (objective.signal, objective.temperature) != (
            "topk",
            settings.temperature,
        ):
            raise CacheError(
                f"cache {str(self.folder)!r} holds the {settings.top_k} likeliest tokens at "
                f"temperature {settings.temperature:g}, and the recipe has objective.signal = "
                f'{objective.signal!r} at {objective.temperature:g}; use signal = "topk" at that '
                "temperature or build a cache of hidden states"
            )
        if (
            settings.payload == "topk"
            and settings.top_k is not None
            and objective.top_k > settings.top_k
        ):
            raise CacheError(
                f"cache {str(self.folder)!r} holds the {settings.top_k} likeliest tokens and "
                f"objective.top_k is {objective.top_k}; lower it or build another cache"
            )
        self.note = self.check_teacher(recipe.teacher, teacher)
        if self.manifest.student is not None:
            self.steps_before = self.manifest.student.steps_before(recipe)

    def check_teacher(self, spec: TeacherSpec, teacher: LanguageModel | None = None) -> str | None:
        """Refuse another teacher, naming both; returns a line when only the name or no weights
        could be compared."""
        mine = self.manifest.teacher
        theirs = identify(teacher) if teacher is not None else identify_folder(spec)
        if theirs is None:
            self.refuse_other("teacher.model", mine.name, spec.model)
            self.refuse_other("teacher.dtype", mine.dtype, spec.dtype)
            return (
                f"the teacher {mine.name!r} is not on this machine: only its name was "
                "compared with the cache's"
            )
        for field in dataclasses.fields(TeacherIdentity):
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            # Files of other bytes can hold the same weights, and a name is none of a model's
            # properties.
            known = a is not None and b is not None
            if (
                field.name == "name"
                or (field.name == "files" and theirs.parameters is not None)
                or not known
            ):
                continue
            if a != b:
                raise CacheError(
                    f"cache {str(self.folder)!r} is of the teacher {mine.name!r} with "
                    f"{field.name} {a}, and the recipe's teacher {theirs.name!r} has {b}; name "
                    "that teacher or build another cache"
                )
        if theirs.parameters is None and (theirs.files is None or mine.files is None):
            return (
                f"the weights of the teacher {theirs.name!r} could not be compared with the "
                "cache's: they are not here"
            )
        return None

    def describe(self) -> list[str]:
        """Lines on the cache for a run that reads it."""
        manifest = self.manifest
        kl = (
            ""
            if manifest.mean_kl is None
            else f", {manifest.mean_kl:.2g} nats from what it computed"
        )
        lines = [
            f"teacher from cache {self.folder}: {manifest.teacher.name}, "
            f"{manifest.total('num_rollouts'):,} completions of {manifest.total('num_tokens'):,} "
            f"tokens, {manifest.settings.describe()}{kl}"
        ]
        if manifest.student is not None:
            age = "" if self.steps_before is None else f", {self.steps_before:,} steps before"
            lines.append(
                f"its prefixes are a student's: {manifest.student.describe()}, written on "
                f"{manifest.date}{age}"
            )
        return [*lines, f"warning: {self.note}"] if self.note else lines

    def check_fit(
        self, end_ids: Sequence[int], vocab_size: int | None, end_class: Sequence[int]
    ) -> None:
        """Refuse a student whose end set, or shared vocabulary where that matters, is another than
        at the build."""
        settings = self.manifest.settings
        self.refuse_other("the end set", sorted(settings.end_ids), sorted(end_ids))
        if settings.payload == "topk":
            self.refuse_other(
                "the number of shared vocabulary rows", settings.vocab_size, vocab_size
            )
            self.refuse_other("the end class", settings.end_class, tuple(end_class))
        if (
            settings.vocab_size is not None
            and vocab_size is not None
            and vocab_size < settings.vocab_size
        ):
            raise CacheError(
                f"cache {str(self.folder)!r} has tokens drawn from {settings.vocab_size} "
                f"vocabulary rows, and this student shares {vocab_size} of them; build a cache "
                "with this student"
            )

    def refuse_other(self, name: str, mine: Any, theirs: Any) -> None:
        """Raise CacheError when the two differ."""
        if mine != theirs:
            raise CacheError(
                f"cache {str(self.folder)!r} was built with {name} = {mine!r} and the recipe has "
                f"{theirs!r}; change the recipe or build another cache"
            )

    def entries(self) -> dict[tuple[bytes, int], CachePlace]:
        """Where the completion of each key and number is."""
        return {
            (key.tobytes(), number): (shard, row)
            for shard, index in enumerate(self.indices)
            for row, (key, number) in enumerate(
                zip(index.keys, index.completion_indices.tolist(), strict=True)
            )
        }

    def places(self) -> dict[bytes, list[CachePlace]]:
        """Where the completions of each key are, in the order of their numbers."""
        return places_by_key(self.indices)

    def attach(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Each prompt once for each of its cached completions, with where it is. Raises CacheError
        if one has none."""
        if not prompts:
            return []
        places, writer = self.places(), self.manifest.settings.writer
        keys = [key_of(prompt, writer) for prompt in prompts]
        missing = [
            prompt.example.id
            for prompt, key in zip(prompts, keys, strict=True)
            if key not in places
        ]
        if missing:
            raise CacheError(
                f"{len(missing)} of {len(prompts)} prompts are not in cache {str(self.folder)!r} "
                f"(the first is {missing[0]!r}); `potstill cache build` with this recipe"
                f"{' and --writer student' if writer == 'student' else ''} adds them"
            )
        return [
            dataclasses.replace(prompt, cached=place)
            for prompt, key in zip(prompts, keys, strict=True)
            for place in places[key]
        ]

    def rollout(self, prompt: Prompt, window: int) -> Rollout:
        """The cached completion of a prompt, cut to the window; with what a student that wrote it
        gave each token."""
        assert prompt.cached is not None, "attach gives each prompt its place"
        (shard, row), writer = prompt.cached, self.manifest.settings.writer
        _, ids, *drawn = self._checked_rows(prompt.cached, TEXTS[writer], 0)
        stop: Stop = "end" if self.indices[shard].ended[row] and len(ids) <= window else "length"
        written = tuple(ids[:window].tolist())
        return Rollout(
            prompt=prompt,
            completion_ids=written,
            trained=(True,) * len(written),
            writers=(writer,) * len(written),
            stop=stop,
            engine_log_probs=tuple(drawn[0][:window].tolist()) if drawn else None,
        )

    def stored_rollout(self, place: CachePlace) -> Rollout:
        """A whole rollout with what the teacher read, from the shard alone."""
        columns = self._checked_rows(place, TEXTS[self.manifest.settings.writer], 0)
        prompt_ids, ids = (tensor.tolist() for tensor in columns[:2])
        prompt = Prompt(
            example=Example(id=f"{place}", prompt=""), token_ids=tuple(prompt_ids), cached=place
        )
        return Rollout(
            prompt=prompt,
            completion_ids=tuple(ids),
            trained=(True,) * len(ids),
            writers=("teacher",) * len(ids),
            stop="end",
        )

    def rows_of(self, rollouts: Sequence[Rollout], head: Head) -> Tensor:
        """Hidden states [N, E] at the loss tokens of some rollouts, in the teacher's type."""
        parts = []
        for rollout in rollouts:
            assert rollout.prompt.cached is not None, "attach gives each prompt its place"
            hidden_LE, scale_L, log_sum_exp_L = self._checked_rows(
                rollout.prompt.cached, SIGNALS["hidden"], 1
            )[:3]
            rows_LE = decode_rows(
                hidden_LE.to(head.weight_VD.device), scale_L, head.weight_VD.dtype
            )
            if (shard := rollout.prompt.cached[0]) not in self._checked:
                self._check_head(shard, rows_LE[:NUM_CHECKED], log_sum_exp_L[:NUM_CHECKED], head)
                self._checked.add(shard)
            parts.append(rows_LE[: len(rollout.trained)][torch.tensor(rollout.trained)])
        return torch.cat(parts)

    def top_k_of(self, rollouts: Sequence[Rollout], device: torch.device | str = "cpu") -> TopK:
        """The k likeliest tokens at the loss tokens of some rollouts."""
        columns: list[list[Tensor]] = [[] for _ in SIGNALS["topk"]]
        for rollout in rollouts:
            assert rollout.prompt.cached is not None, "attach gives each prompt its place"
            tensors = self._checked_rows(rollout.prompt.cached, SIGNALS["topk"], 1)
            for column, tensor in zip(columns, tensors, strict=True):
                column.append(tensor[: len(rollout.trained)][torch.tensor(rollout.trained)])
        ids, log_probs, ends, tail, entropies = (torch.cat(column).to(device) for column in columns)
        # Stored with no columns where there is no such class.
        return TopK(
            token_ids_NK=ids.long(),
            log_probs_NK=log_probs,
            end_log_prob_N=_squeezed(ends),
            tail_log_prob_N=_squeezed(tail),
            entropy_N=entropies,
        )

    def check_shard(self, shard: int, head: Head | None, num_rows: int) -> float:
        """Compare a shard's file with its checksum, and `num_rows` log-sum-exps; returns their
        largest error."""
        if file_digest(self.path(shard)) != self.manifest.shards[shard].sha256:
            raise CacheError(
                f"shard {str(self.path(shard))!r} is damaged: its SHA-256 is not the manifest's"
            )
        if head is None:
            return 0.0
        num_tokens = self.manifest.shards[shard].num_tokens
        chosen = torch.linspace(0, num_tokens - 1, min(num_rows, num_tokens)).long().unique()
        file = self._file(shard)
        hidden, scale, expected = (
            file.get_tensor(name)[chosen] for name in ("hidden", "scale", "log_sum_exp")
        )
        rows = decode_rows(hidden.to(head.weight_VD.device), scale, head.weight_VD.dtype)
        return self._check_head(shard, rows, expected, head)

    def _check_head(self, shard: int, rows_LE: Tensor, log_sum_exp_L: Tensor, head: Head) -> float:
        """Compute some log-sum-exps again; returns the largest relative error. Raises CacheError
        for another head."""
        found_L = fused_statistics(rows_LE, head).student_log_sum_exp_N
        expected_L = log_sum_exp_L.to(found_L.device)
        error = ((found_L - expected_L).abs() / expected_L.abs().clamp(min=1)).max().item()
        if not error <= HEAD_TOLERANCE:
            raise CacheError(
                f"shard {str(self.path(shard))!r} does not belong to the head of the teacher "
                f"{self.manifest.teacher.name!r}: log-sum-exps differ by {error:.2g} (allowed "
                f"{HEAD_TOLERANCE:g}, relative); build the cache again"
            )
        return error

    def _checked_rows(self, place: CachePlace, names: Sequence[str], which: int) -> list[Tensor]:
        """The named tensors of one rollout; `which` of its checksums they must match."""
        shard, row = place
        index = self.indices[shard]
        file = self._file(shard)
        tensors = []
        for name in names:
            starts = index.prompt_starts if name == "prompt_ids" else index.completion_starts
            tensors.append(file.get_slice(name)[int(starts[row]) : int(starts[row + 1])])
        if checksum(tensors) != index.checksums[row, which]:
            raise CacheError(
                f"shard {str(self.path(shard))!r} is damaged: rollout {row} does not have its "
                f"checksum; `potstill cache verify {self.folder}` lists all damaged shards"
            )
        return tensors

    def _file(self, shard: int):
        if shard not in self._open:
            self._open[shard] = open_shard(self.path(shard))
        self._open.move_to_end(shard)
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[shard]


def _squeezed(column: Tensor) -> Tensor | None:
    return column[:, 0] if column.shape[1] else None
