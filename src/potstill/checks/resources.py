"""Checks of memory and disk: what a run will need beside what is loaded, against what is free.

The arithmetic is that of `potstill.planning`, with activations by rule: a run says this at its
start, where counting them would take time.
"""

import shutil
from pathlib import Path

import torch.distributed as dist

from potstill.checks.finding import Finding, Subject
from potstill.models.language_model import LanguageModel
from potstill.planning.devices import free_memory
from potstill.planning.disk import disk_of
from potstill.planning.memory import Outlines, memory_of
from potstill.planning.sizes import model_sizes, outline_of
from potstill.planning.units import shown_bytes
from potstill.planning.work import with_field, work_of

# A need above this share of what is free is a warning, as the estimate may be that wrong.
NEARLY_ALL = 0.8


def memory(subject: Subject) -> Finding:
    """Whether gradients, optimiser and one batch fit beside the weights that are loaded."""
    parts = memory_needed(subject)
    free = free_memory(subject.device)
    sure = parts["gradients"] + parts["optimiser"] + parts["copy"]
    at_work = max(parts["decoding"], parts["activations"] + parts["logits"])
    need = sure + at_work
    measured = {f"{name}_bytes": size for name, size in parts.items()} | {"free_bytes": free}
    if free is None:
        says = f"{shown_bytes(need)} are needed beside the weights; how much is free is not known"
        return Finding(check="memory", level="skipped", says=says, measured=measured)
    stays = "gradients, AdamW and a copy that writes" if parts["copy"] else "gradients and AdamW"
    says = (
        f"{shown_bytes(need)} are needed beside the weights ({stays} "
        f"{shown_bytes(sure)}, a batch about {shown_bytes(at_work)}), and "
        f"{shown_bytes(free)} are free"
    )
    if need <= NEARLY_ALL * free:
        return Finding(check="memory", level="ok", says=says, measured=measured)
    fix = "choose a smaller student, or a machine with more memory"
    if sure <= NEARLY_ALL * free:
        batch = "sampling.batch_size" if parts["decoding"] == at_work else "train.tokens_per_batch"
        fix = f"lower {batch}, which changes results by rounding alone"
    level = "error" if sure > free else "warning"
    return Finding(check="memory", level=level, says=says, fix=fix, measured=measured)


def memory_needed(subject: Subject) -> dict[str, int]:
    """Bytes by part, beside the weights of both models, which are loaded."""
    recipe = with_field(subject.recipe, "train.compute_dtype", subject.loss.compute_dtype)
    recipe = recipe.model_copy(update={"teachers": ()})
    longest = max(len(prompt.token_ids) for prompt in subject.prompts)
    num_devices = dist.get_world_size() if dist.is_initialized() else 1
    teacher = subject.teacher if isinstance(subject.teacher, LanguageModel) else None
    memory = memory_of(
        recipe,
        Outlines(
            student=outline_of(subject.student),
            teacher=None if teacher is None else outline_of(teacher),
        ),
        work_of(recipe, longest, recipe.window.tokens, num_devices),
        "none" if teacher is None else "live",
        num_devices=num_devices,
        on_cpu=subject.device.type == "cpu",
        by_rule=True,
    )
    at_loss = memory.phases["loss"]
    activations = at_loss["activations"]
    rest = sum(at_loss.values()) - activations - at_loss["gradients"]
    return {
        "gradients": memory.phases["update"]["gradients"],
        "optimiser": memory.kept["moments"],
        "activations": activations,
        "logits": memory.kept.get("loss tiles", 0) + rest,
        "decoding": sum(memory.phases["rollouts"].values()),
        "copy": memory.kept.get("decoding copy", 0),
    }


def disk(subject: Subject) -> Finding:
    """Whether checkpoints and the finished student fit into the run folder's disk."""
    recipe = subject.recipe
    space = disk_of(recipe, model_sizes(subject.student))
    need, checkpoint, weights = space.most, space.checkpoint, space.student
    free = shutil.disk_usage(_existing(recipe.out)).free
    says = (
        f"{shown_bytes(need)} are needed in {str(recipe.out)!r} ({space.num_checkpoints} "
        f"checkpoints of {shown_bytes(checkpoint)}, the student {shown_bytes(weights)}), and "
        f"{shown_bytes(free)} are free"
    )
    measured = {"need_bytes": need, "checkpoint_bytes": checkpoint, "free_bytes": free}
    if need <= free:
        return Finding(check="disk", level="ok", says=says, measured=measured)
    fix = "free some space, or choose another --out"
    return Finding(check="disk", level="error", says=says, fix=fix, measured=measured)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    there = (path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return next(there)
