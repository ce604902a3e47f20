"""Checkpoints: safetensors and JSON, visible only when whole.

A checkpoint is a folder `checkpoint/step-000120` with the weights, the optimiser's state, the number of finished steps,
what the next step needs to know of the steps before it, and the rollouts that it uses again, if it does. Randomness
needs no state: the data order, the sampling and PyTorch's own generator are all seeded from the recipe's seed and the
step.
"""

import json
import shutil
from collections.abc import Sequence
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

from potstill.distributed import World, gather, wait_for_all
from potstill.models import LanguageModel
from potstill.runlog import RunError, flush
from potstill.types import Prompt, Rollout


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None."""
    found = sorted((folder / "checkpoint").glob("step-*"))
    return found[-1] if found else None


def save(
    folder: Path,
    step: int,
    student: LanguageModel,
    optimizer: torch.optim.Optimizer,
    world: World,
    state: dict[str, Any],
    rollouts: Sequence[Rollout] = (),
    teacher: LanguageModel | None = None,
) -> None:
    """Write the checkpoint after `step` finished steps, then remove older ones. Every rank must call this.

    `state` is plain data for the next step; `rollouts` are this rank's, if they are to be used again; a `teacher` is
    saved where its weights change.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(student, optimizer, options=options)
    written = gather([_without_prompt(rollout) for rollout in rollouts], world)
    if world.is_main:
        target = folder / "checkpoint" / f"step-{step:06d}"
        unfinished = target.with_name(f"unfinished-{target.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        moments: Any = optimizer_state["state"]
        tensors = {f"{name}.{key}": value for name, values in moments.items() for key, value in values.items()}
        save_file(_untied(model_state, student), unfinished / "model.safetensors")
        save_file(tensors, unfinished / "optimizer.safetensors")
        if teacher is not None:
            save_file(_untied(teacher.state_dict(), teacher), unfinished / "teacher.safetensors")
        (unfinished / "state.json").write_text(
            json.dumps(
                {"step": step, "state": state, "param_groups": optimizer_state["param_groups"], "rollouts": written}
            )
        )
        for path in unfinished.iterdir():
            flush(path)
        unfinished.rename(target)
        flush(target.parent)
        for old in target.parent.iterdir():
            if old != target:
                shutil.rmtree(old)
    wait_for_all(world)


def load(
    checkpoint: Path, student: LanguageModel, optimizer: torch.optim.Optimizer, teacher: LanguageModel | None = None
) -> tuple[int, dict[str, Any]]:
    """Restore weights and optimiser; returns the finished steps and the stored state. Every rank must call this."""
    if teacher is not None:
        teacher.load_state_dict(load_file(checkpoint / "teacher.safetensors"), strict=False)
    saved = json.loads((checkpoint / "state.json").read_text())
    moments: dict[str, Any] = {}
    for name, value in load_file(checkpoint / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition(".")
        moments.setdefault(parameter, {})[key] = value
    set_state_dict(
        student,
        optimizer,
        model_state_dict={**load_file(checkpoint / "model.safetensors")},
        optim_state_dict={"state": moments, "param_groups": saved["param_groups"]},
        # Not strict: a tied head is stored once, under the name of the embedding.
        options=StateDictOptions(full_state_dict=True, strict=False),
    )
    return saved["step"], saved["state"]


def load_rollouts(checkpoint: Path, prompts: Sequence[Prompt], world: World) -> list[Rollout]:
    """This rank's stored rollouts, which answer `prompts`. Raises RunError for those of another number of ranks."""
    stored = json.loads((checkpoint / "state.json").read_text())["rollouts"]
    if len(stored) != world.size:
        raise RunError(
            f"checkpoint {str(checkpoint)!r} holds rollouts of {len(stored)} ranks that are to be used again, and now "
            f"there are {world.size}; resume with as many"
        )
    return [
        Rollout(prompt, tuple(completion_ids), tuple(trained), tuple(writers), stop)
        for prompt, (completion_ids, trained, writers, stop) in zip(prompts, stored[world.rank], strict=True)
    ]


def _without_prompt(rollout: Rollout) -> list[Any]:
    return [rollout.completion_ids, rollout.trained, rollout.writers, rollout.stop]


def weights(student: LanguageModel) -> dict[str, torch.Tensor]:
    """The student's whole weights on the CPU, by their names in the Hugging Face model. Every rank must call this."""
    state = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name.removeprefix("model."): value for name, value in _untied(state, student).items()}


def _untied(state: dict[str, Any], student: LanguageModel) -> dict[str, torch.Tensor]:
    """The state without second names of one tensor, as safetensors stores each tensor once."""
    names = {name for name, _ in student.named_parameters()} | {name for name, _ in student.named_buffers()}
    return {name: value.contiguous() for name, value in state.items() if name in names}
