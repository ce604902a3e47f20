"""Checkpoints: safetensors and JSON, visible only when whole, and read only when they are what was
written.

A checkpoint is a folder `checkpoint/step-000120` with the weights, the optimiser's state, and
`state.json`: the number of finished steps, what the next step needs to know of the steps before it,
the rollouts that it uses again, if it does, the size of the logs, and the SHA-256 of each file.
Randomness needs no state: the data order, the sampling and PyTorch's own generator are all seeded
from the recipe's seed and the step.
"""

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from potstill.config import Lora
from potstill.files import file_digest, flush, json_line, seal, unseal
from potstill.models.adapters import has_adapter, is_of_adapter, merged_weights
from potstill.models.distributed import World, gather, wait_for_all
from potstill.models.language_model import LanguageModel, save_model
from potstill.models.lean.shards import file_names, read_shards, write_shards
from potstill.runs.run_folder import RunError, read_json, seal_logs
from potstill.types import Credit, Prompt, Rollout

STATE = "state.json"
# In the folder of the best student, its row of the log.
VALIDATION = "validation.json"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that was read: finished steps, plain data of the loop, the round's rollouts by
    their numbers if they are used again, and the logs' sizes."""

    path: Path
    step: int
    state: dict[str, Any]
    rollouts: dict[int, Any]
    logs: dict[str, dict[str, Any]]


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None."""
    found = [path for path, match in _ours(folder / "checkpoint") if not match[1]]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The finished steps of a whole checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def _ours(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    """The folders of checkpoints, whole and unfinished; anything else there is somebody else's."""
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = [(path, re.fullmatch(r"(unfinished-)?step-(\d{6,})", path.name)) for path in paths]
    return [(path, match) for path, match in matches if match is not None and path.is_dir()]


def tidy(folder: Path, step: int, num_kept: int | None = None) -> None:
    """Remove checkpoints but the last ones up to that of `step`, and those that a kill left
    unfinished."""
    found = _ours(folder / "checkpoint")
    steps = sorted(step_of(path) for path, match in found if not match[1] and step_of(path) <= step)
    first = min(steps[-(num_kept or 1) :], default=step)
    for path, match in found:
        if (match[1] or step_of(path) < first) and not path.is_symlink():
            shutil.rmtree(path)


def stage_best(
    folder: Path,
    step: int,
    student: LanguageModel,
    weights: dict[str, torch.Tensor],
    end_ids: Sequence[int],
    row: dict[str, Any],
) -> None:
    """Write the best student so far as a model folder, with its validation, until a checkpoint
    knows of it."""
    staged = folder / "checkpoint" / _staged(step)
    staged.parent.mkdir(exist_ok=True)
    save_model(student, weights, end_ids, staged)
    (staged / VALIDATION).write_text(json_line(row))
    for path in (*staged.iterdir(), staged):
        flush(path)


def settle_best(folder: Path, step: int | None) -> None:
    """Make the best student that the newest checkpoint knows of `best/`, and remove those that no
    checkpoint knows."""
    for path in (folder / "checkpoint").glob("*best-*"):
        if step is not None and path.name == _staged(step):
            best = folder / "best"
            shutil.rmtree(best, ignore_errors=True)
            path.rename(best)
            flush(folder)
        elif (
            re.fullmatch(r"best-\d{6,}|\.best-\d{6,}\.unfinished", path.name)
            and not path.is_symlink()
        ):
            shutil.rmtree(path)


def _staged(step: int) -> str:
    return f"best-{step:06d}"


def save(
    folder: Path,
    step: int,
    student: LanguageModel,
    optimizer: torch.optim.Optimizer,
    world: World,
    state: dict[str, Any],
    rollouts: Mapping[int, Rollout] | None = None,
    teacher: LanguageModel | None = None,
    num_kept: int | None = None,
    in_shards: bool = False,
) -> None:
    """Write the checkpoint after `step` finished steps, then remove older ones.

    The last `num_kept` stay, 1 by default. Every rank must call this.

    `state` is plain data for the next step; `rollouts` are this rank's by their numbers in the
    round, if they are to be used again; a `teacher` is saved where its weights change. `in_shards`
    each of several ranks writes its share, and none holds all.
    """
    in_shards = in_shards and world.size > 1
    # Where they are whole, rank 0 alone has them.
    states: Any = get_state_dict(student, optimizer, options=_options(student, not in_shards))
    weights, moments = _untied(states[0], student), states[1].get("state", {})
    mine = {number: _without_prompt(rollout) for number, rollout in (rollouts or {}).items()}
    written = {number: row for each in gather(mine, world) for number, row in each.items()}
    target = folder / "checkpoint" / f"step-{step:06d}"
    unfinished = target.with_name(f"unfinished-{target.name}")
    if world.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    files: dict[str, str] = {}
    if in_shards:
        wait_for_all(world)
        for digests in gather(write_shards(weights, moments, unfinished, world.rank), world):
            files |= digests
    if world.is_main:
        if not in_shards:
            _write_whole(weights, moments, unfinished)
        if teacher is not None:
            save_file(_untied(teacher.state_dict(), teacher), unfinished / "teacher.safetensors")
        others = [path for path in unfinished.glob("*.safetensors") if path.name not in files]
        files |= {path.name: file_digest(path) for path in others}
        data = {
            "step": step,
            "state": state,
            "param_groups": [_plain(group) for group in states[1]["param_groups"]],
            "rollouts": [written[number] for number in sorted(written)],
            "logs": seal_logs(folder),
            "files": files,
        }
        (unfinished / STATE).write_text(seal(data))
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
        unfinished.rename(target)
        flush(target.parent)
        tidy(folder, step, num_kept)
    wait_for_all(world)


def _write_whole(weights: dict[str, torch.Tensor], moments: Any, folder: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, values in moments.items():
        for key, value in values.items():
            tensors |= _parts(f"{name}.{key}", value)
    save_file(weights, folder / "model.safetensors")
    save_file(tensors, folder / "optimizer.safetensors")


def load(
    checkpoint: Path,
    student: LanguageModel,
    optimizer: torch.optim.Optimizer,
    teacher: LanguageModel | None = None,
) -> Saved:
    """Restore weights and optimiser. Every rank must call this.

    Raises RunError, before anything is changed, for a file that is not what was written.
    """
    of_teacher = [] if teacher is None else ["teacher.safetensors"]
    shards = file_names(checkpoint)
    own = shards or ["model.safetensors", "optimizer.safetensors"]
    data = _read_state(checkpoint, [*own, *of_teacher])
    options = _options(student, strict=False, is_whole=not shards)
    if shards:
        begun: Any = get_state_dict(student, optimizer, options=options)
        weights, moments = _in_shards(checkpoint, _untied(begun[0], student), begun[1]["state"])
    else:
        weights = _weights_in(checkpoint / "model.safetensors", student)
        moments = _moments(load_file(checkpoint / "optimizer.safetensors"), student)
    if teacher is not None:
        kept = _weights_in(checkpoint / "teacher.safetensors", teacher)
        teacher.load_state_dict(kept, strict=False)
    for group, mine in zip(data["param_groups"], optimizer.param_groups, strict=True):
        if isinstance(mine["lr"], torch.Tensor):
            group["lr"] = torch.tensor(group["lr"])
    set_state_dict(
        student,
        optimizer,
        model_state_dict={**weights},
        optim_state_dict={"state": moments, "param_groups": data["param_groups"]},
        # Not strict: a tied head is stored once. The other names were compared above.
        options=options,
    )
    return Saved(
        path=checkpoint,
        step=data["step"],
        state=data["state"],
        rollouts=dict(enumerate(data["rollouts"])),
        logs=data["logs"],
    )


def load_weights(checkpoint: Path, student: LanguageModel) -> None:
    """Restore the weights alone, for another use than to go on. Raises RunError."""
    _read_state(checkpoint, [path.name for path in checkpoint.glob("*.safetensors")])
    if file_names(checkpoint):
        weights, _ = _in_shards(checkpoint, _untied(student.state_dict(), student), {})
    else:
        weights = _weights_in(checkpoint / "model.safetensors", student)
    student.load_state_dict(weights, strict=False)


def _in_shards(checkpoint: Path, weights: Mapping[str, torch.Tensor], moments: Any) -> Any:
    """The values of such weights and moments. Raises RunError where they are another model's."""
    found = read_shards(weights, moments, checkpoint)
    if found is None:
        raise _damaged(checkpoint / "shards", "has the weights of another model")
    return found


def _weights_in(path: Path, model: LanguageModel) -> dict[str, torch.Tensor]:
    """The weights in a file. Raises RunError for those of another model."""
    tensors = load_file(path)
    if tensors.keys() != _saved_names(model.state_dict(), model):
        raise _damaged(path, "has the weights of another model")
    return tensors


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of an optimiser's group, without tensors."""
    items = group.items()
    return {name: x.item() if isinstance(x, torch.Tensor) else x for name, x in items}


def _parts(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """A moment by its name; where torchao has packed it, its parts."""
    if not hasattr(value, "__tensor_flatten__"):
        return {name: value}
    names, (is_signed, _) = value.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
    # Parts are shared between moments, and safetensors stores each tensor once.
    parts = {f"{name}/{part}": getattr(value, part).clone() for part in names}
    return parts | {f"{name}/signed": torch.tensor(is_signed)}


def _moments(tensors: dict[str, torch.Tensor], student: LanguageModel) -> dict[str, Any]:
    """The optimiser's state by parameter; the inverse of `_parts`."""
    moments: dict[str, Any] = {}
    packed: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        whole, _, part = name.partition("/")
        parameter, _, key = whole.rpartition(".")
        if part:
            packed.setdefault(whole, {})[part] = value
        else:
            moments.setdefault(parameter, {})[key] = value
    if packed:
        from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

        weights = dict(student.named_parameters())
        for whole, parts in packed.items():
            parameter, _, key = whole.rpartition(".")
            inner = (parts["codes"], parts["scale"], parts["qmap"], bool(parts["signed"]))
            moments[parameter][key] = OptimState8bit(*inner, weights[parameter].dtype)
    return moments


def _read_state(checkpoint: Path, files: Sequence[str]) -> dict[str, Any]:
    """The state that `save` wrote, once it and all files are found to be as they were written.
    Raises RunError."""
    path = checkpoint / STATE
    if not path.is_file():
        raise _damaged(path, "is missing")
    try:
        data = unseal(read_json(path))
    except RunError:
        data = None
    if data is None:
        raise _damaged(path, "was changed after it was written")
    if data["files"].keys() != set(files):
        raise _damaged(path, f"lists {sorted(data['files'])} and not {sorted(files)}")
    for name, sha256 in data["files"].items():
        if not (checkpoint / name).is_file():
            raise _damaged(checkpoint / name, "is missing")
        if file_digest(checkpoint / name) != sha256:
            raise _damaged(
                checkpoint / name,
                "was changed after it was written: its SHA-256 is not that of state.json",
            )
    return data


def what_is_saved(folder: Path) -> str:
    """A line on a run whose work was stopped, for its user."""
    last = latest(folder)
    if last is None:
        return "stopped; nothing was saved yet: the same command begins again"
    return f"stopped; step {step_of(last)} was saved last, and the same command goes on from there"


def _damaged(path: Path, what: str) -> RunError:
    return RunError(
        f"checkpoint file {str(path)!r} {what}; restore it, or remove the folder "
        f"{str(path.parent.parent)!r} to begin again"
    )


def load_rollouts(saved: Saved, prompts: Sequence[Prompt], numbers: Sequence[int]) -> list[Rollout]:
    """The stored rollouts of these numbers, which answer `prompts`."""
    return [
        _with_prompt(prompt, saved.rollouts[number])
        for prompt, number in zip(prompts, numbers, strict=True)
    ]


def _without_prompt(rollout: Rollout) -> list[Any]:
    credit = None if rollout.credit is None else dataclasses.asdict(rollout.credit)
    written = [rollout.completion_ids, rollout.trained, rollout.writers, rollout.stop]
    return [*written, rollout.engine_log_probs, rollout.log_probs, credit]


def _with_prompt(prompt: Prompt, data: list[Any]) -> Rollout:
    """The inverse of `_without_prompt`."""
    completion_ids, trained, writers, stop, told, log_probs, credit = data
    return Rollout(
        prompt=prompt,
        completion_ids=tuple(completion_ids),
        trained=tuple(trained),
        writers=tuple(writers),
        stop=stop,
        log_probs=None if log_probs is None else tuple(log_probs),
        credit=None if credit is None else Credit(**credit),
        engine_log_probs=None if told is None else tuple(told),
    )


def weights(student: LanguageModel, decoder: Any, lora: Lora) -> dict[str, torch.Tensor]:
    """The student's whole weights on the CPU, by their names in the Hugging Face model; its
    adapter's alone where that is to be saved. Every rank must call this.

    `decoder`, from which an adapter is merged, has the weights of now; other ranks have none.
    """
    if has_adapter(student.model) and lora.save == "merged":
        return {} if decoder is None else merged_weights(decoder)
    state = get_model_state_dict(student, options=_options(student))
    return {name.removeprefix("model."): value for name, value in _untied(state, student).items()}


def _untied(state: dict[str, Any], student: LanguageModel) -> dict[str, torch.Tensor]:
    """The state without second names of one tensor, as safetensors stores each tensor once."""
    names = _saved_names(state, student)
    return {name: value.contiguous() for name, value in state.items() if name in names}


def _saved_names(state: dict[str, Any], student: LanguageModel) -> set[str]:
    """The first names of the weights and buffers; where there is an adapter, of its weights."""
    names = {name for name, _ in [*student.named_parameters(), *student.named_buffers()]}
    if has_adapter(student.model):
        names = set(filter(is_of_adapter, names))
    return state.keys() & names


def _options(student: LanguageModel, is_whole: bool = True, strict: bool = True):
    """Tensors on the CPU, whole or this rank's share; with an adapter, those that learn."""
    return StateDictOptions(
        full_state_dict=is_whole,
        cpu_offload=True,
        ignore_frozen_params=has_adapter(student.model),
        strict=strict,
    )
