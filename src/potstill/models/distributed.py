"""One process or many: the few places where they differ.

`torchrun` starts the ranks; each draws its share of a step's prompts. The student is sharded with
FSDP2, the teacher is whole on every rank. With one process nothing here does anything.
"""

import copy
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from potstill.models.language_model import LanguageModel
from potstill.models.lean.activations import layers_of

# How long a rank waits for another in a step before it says so and ends; a checkpoint is written in
# less.
TIMEOUT = timedelta(minutes=10)
# How long for rank 0 after the last step, which evaluates alone.
PATIENCE = timedelta(days=30)
_patient: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start() -> World:
    """Join the process group that torchrun describes, or be alone. NCCL with GPUs, gloo without."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    has_cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if has_cuda
        else torch.device("cpu")
    )
    if has_cuda:
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        backend, device_id = ("nccl", device) if has_cuda else ("gloo", None)
        dist.init_process_group(backend, device_id=device_id, timeout=TIMEOUT)
        global _patient
        # Its type allows for a rank outside of the group, which a group of all ranks has not.
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)  # pyright: ignore[reportAssignmentType]
    return World(rank, size, device)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(
    model: LanguageModel, world: World, *, in_bfloat16: bool = False, is_empty: bool = False
) -> nn.Module:
    """Shard the student over all ranks; returns the model that decodes on this rank.

    Decoding with sharded weights would gather every layer for every token, so each rank decodes
    with a whole copy in the student's own type or in bfloat16, and refreshes it once a step
    (`refresh`). An empty copy is for ranks that decode nothing: its weights have shapes and no
    values (`with_weights` and `fill` give it some). Alone, the student decodes itself, unless its
    weights are in another type.
    """
    if world.size == 1 and not in_bfloat16:
        return model.model
    decoder = _copy(model.model, in_bfloat16, is_empty)
    if world.size == 1:
        return decoder
    from torch.distributed.fsdp import FSDPModule

    shard_layers(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by a count over all ranks already, so gradients are summed and not
            # averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return decoder


def _copy(model: nn.Module, in_bfloat16: bool, is_empty: bool) -> nn.Module:
    """A copy of a model, whose weights may be in bfloat16, or empty; buffers stay what they are."""
    known = {}
    for weight in model.parameters() if in_bfloat16 or is_empty else ():
        own = weight.detach().to("meta") if is_empty else weight.detach()
        own = own.bfloat16() if in_bfloat16 else own
        known[id(weight)] = nn.Parameter(own, weight.requires_grad)
    return copy.deepcopy(model, known)


def shard_layers(model: LanguageModel) -> None:
    """Spread a model's weights over all ranks with FSDP2, one group a layer and one for the
    rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in layers_of(model.model):
        fully_shard(layer)
    fully_shard(model)


def reshard(model: LanguageModel) -> None:
    """Let go of what a pass without gradients has gathered outside of a sharded model's layers;
    nothing for a model that is whole."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()


def copy_buffers(source: nn.Module | None, target: nn.Module) -> None:
    """Give every rank's `target` the buffers of rank 0's `source`, those that no state has
    included."""
    found = {} if source is None else dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if found:
            buffer.copy_(found[name])
        dist.broadcast(buffer, 0)


@torch.no_grad()
def refresh(copied: nn.Module, model: LanguageModel, kept: float = 0.0) -> None:
    """Bring a whole copy of the student, if it is one, up to its weights; of its own it keeps a
    share. Every rank must call this."""
    if copied is model.model:
        return
    for mine, sharded in zip(copied.parameters(), model.model.parameters(), strict=True):
        if sharded.requires_grad and not mine.is_meta:
            # In the copy's type before the ranks exchange it.
            mine.lerp_(whole(sharded.to(mine.dtype)), 1 - kept)


@torch.no_grad()
def fill(
    copied: nn.Module, model: LanguageModel, *, is_here: bool, names: Container[str] | None = None
) -> list[nn.Parameter]:
    """Give an empty copy the student's weights where `is_here`: those of some names, or all; the
    weights that it has now. Every rank must call this."""
    found = []
    own = model.model.named_parameters()
    for mine, (name, sharded) in zip(copied.parameters(), own, strict=True):
        if mine.is_meta and (names is None or name in names):
            weight = whole(sharded.detach().to(mine.dtype))
            if is_here:
                # In place, so that tied weights stay tied.
                torch.utils.swap_tensors(mine, nn.Parameter(weight, mine.requires_grad))
                found.append(mine)
    return found


def is_empty(copied: nn.Module) -> bool:
    """Whether a copy has shapes and no values."""
    return next(copied.parameters()).is_meta


@contextmanager
def with_weights(
    copied: nn.Module, model: LanguageModel, names: Container[str], *, is_here: bool
) -> Iterator[None]:
    """Within, an empty copy has some of the student's weights. Every rank must call this."""
    found = fill(copied, model, is_here=is_here, names=names)
    try:
        yield
    finally:
        for weight in found:
            empty = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
            torch.utils.swap_tensors(weight, empty)


def names_by_layer(model: Any) -> list[list[str]]:
    """The names of a model's weights and buffers: those of each layer, and the others."""
    layers = set(layers_of(model))
    firsts = [f"{name}." for name, module in model.named_modules() if module in layers]
    names = [*model.state_dict()]
    parts = [[name for name in names if name.startswith(first)] for first in firsts]
    return [*parts, [name for name in names if not name.startswith(tuple(firsts))]]


def is_first_here() -> bool:
    """Whether this rank is the first one of its machine, as torchrun numbers them."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """Element-wise sums over all ranks, in float64."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(value: int, world: World) -> int:
    if world.size == 1:
        return value
    largest = torch.tensor(value, device=world.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def gather(value: Any, world: World) -> list[Any]:
    """One plain value of each rank, in the order of ranks."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's full value; a plain tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore


def wait_for_all(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def wait_for_rank_0(world: World) -> None:
    """Wait for what only rank 0 does, which can take hours."""
    if world.size > 1:
        dist.barrier(_patient)
