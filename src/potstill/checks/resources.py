"""Checks of memory and disk: what a run will need beside what is loaded, against what is free.

Weights, gradients, the optimiser's moments and checkpoints follow from the number of weights.
Activations are estimated, as 34 bytes for each token, layer and hidden unit in a type of two bytes
(Korthikanti et al., arXiv 2205.05198, without the attention scores, which are never whole).
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from potstill.checks.finding import Finding, Subject
from potstill.kl.fused import MIB
from potstill.models.adapters import has_adapter

GIB = 2**30
MOMENTS = 2
ACTIVATION_BYTES = 34
# A need above this share of what is free is a warning, as the estimate may be that wrong.
NEARLY_ALL = 0.8
# Where a container says how much memory it may use, and uses.
LIMIT, USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def memory(subject: Subject) -> Finding:
    """Whether gradients, optimiser and one batch fit beside the weights that are loaded."""
    parts = memory_needed(subject)
    free = free_memory(subject.device)
    sure = parts["gradients"] + parts["optimiser"]
    at_work = max(parts["decoding"], parts["activations"] + parts["logits"])
    need = sure + at_work
    measured = {f"{name}_bytes": size for name, size in parts.items()} | {"free_bytes": free}
    if free is None:
        says = f"{_size(need)} are needed beside the weights; how much is free is not known"
        return Finding(check="memory", level="skipped", says=says, measured=measured)
    says = (
        f"{_size(need)} are needed beside the weights (gradients and AdamW {_size(sure)}, a batch "
        f"about {_size(at_work)}), and {_size(free)} are free"
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
    recipe, student = subject.recipe, subject.student
    gradients = _bytes(_learning(student.model))
    config = student.model.config.get_text_config()
    width = int(getattr(config, "hidden_size", 0) or student.head.weight_VD.shape[1])
    depth = int(getattr(config, "num_hidden_layers", 0) or 1)
    is_half = "bfloat16" in (subject.loss.compute_dtype, recipe.student.dtype)
    longest = max(len(prompt.token_ids) for prompt in subject.prompts) + recipe.window.tokens
    num_tokens = max(recipe.train.tokens_per_batch, longest)
    logits = recipe.train.loss_memory * MIB
    if recipe.train.loss_backend == "plain":
        # Logits, probabilities and their gradients, in float32.
        logits = 4 * 4 * num_tokens * student.vocab_size
    return {
        "gradients": gradients,
        "optimiser": MOMENTS * gradients,
        "activations": num_tokens * width * depth * ACTIVATION_BYTES * (1 if is_half else 2),
        "logits": logits,
        "decoding": _decoding_bytes(subject, width, depth, longest),
    }


def _learning(model: Any) -> list[torch.Tensor]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def _bytes(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _decoding_bytes(subject: Subject, width: int, depth: int, longest: int) -> int:
    """Keys and values of the rows that the student decodes together."""
    recipe, student = subject.recipe, subject.student
    if recipe.objective.prefix == "dataset":
        return 0
    config = student.model.config.get_text_config()
    num_heads = int(getattr(config, "num_attention_heads", 0) or 1)
    num_kv = int(getattr(config, "num_key_value_heads", 0) or num_heads)
    head_width = int(getattr(config, "head_dim", 0) or width // num_heads)
    rows = min(recipe.sampling.batch_size, recipe.rollouts_per_step)
    item = next(student.model.parameters()).element_size()
    return 2 * rows * longest * depth * num_kv * head_width * item


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; of the machine within its container's limit. None where
    the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        return min(available * 1024, int(LIMIT.read_text()) - int(USED.read_text()))
    # There is no container, or it has no limit ("max").
    except (OSError, ValueError):
        return available * 1024


def disk(subject: Subject) -> Finding:
    """Whether checkpoints and the finished student fit into the run folder's disk."""
    recipe = subject.recipe
    model = subject.student.model
    whole, learns = _bytes(model.parameters()), _bytes(_learning(model))
    # A checkpoint of a student with an adapter has the adapter alone.
    weights = learns if has_adapter(model) else whole
    saved = learns if recipe.student.lora.save == "adapter" else whole
    follows = recipe.teacher.model == "self" and recipe.teacher.refresh_steps
    checkpoint = (1 + bool(follows)) * weights + MOMENTS * learns
    # A new checkpoint is whole before the old one goes.
    need = 2 * checkpoint + saved
    free = shutil.disk_usage(_existing(recipe.out)).free
    says = (
        f"{_size(need)} are needed in {str(recipe.out)!r} (two checkpoints of "
        f"{_size(checkpoint)}, the student {_size(saved)}), and {_size(free)} are free"
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


def _size(num_bytes: float) -> str:
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.1f} GiB"
    return f"{num_bytes / MIB:.0f} MiB" if num_bytes >= MIB else f"{num_bytes / 1024:.0f} KiB"
