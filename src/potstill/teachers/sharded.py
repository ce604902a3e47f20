"""A teacher whose weights are spread over the ranks: each holds its share and gathers a layer when
a pass comes to it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from potstill.config import TeacherSpec
from potstill.models import distributed
from potstill.models.batch import Batch
from potstill.models.distributed import World
from potstill.models.language_model import LanguageModel
from potstill.models.probe import ready
from potstill.teachers.protocol import Teacher
from potstill.teachers.skeleton import skeleton_of


class ShardedTeacher(LanguageModel):
    """A frozen model in shards (FSDP2). It gives its signal and cannot write: decoding would gather
    every layer for every token.

    Its passes are taken by all ranks together, though not all ranks need as many; a rank that needs
    no more goes on with passes of one token in `wait_for_passes`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, world: World):
        super().__init__(model, tokenizer, name)
        self.world = world

    def signal_at(self, batch: Batch) -> Tensor:
        self._num_that_pass(True)
        return super().signal_at(batch)

    def wait_for_passes(self) -> None:
        """Pass along with the other ranks until none needs a pass. Every rank must call this."""
        while self._num_that_pass(False):
            self(torch.zeros(1, 1, dtype=torch.long, device=self.world.device))

    def _num_that_pass(self, passes: bool) -> float:
        return distributed.sum_over_ranks([float(passes)], self.world)[0]

    @property
    def decoder(self) -> None:
        return None


def load_sharded(spec: TeacherSpec, world: World) -> ShardedTeacher:
    """The teacher of a recipe in shards. Rank 0 reads and checks the whole model, in the machine's
    memory; the others get their shares from it. Raises ModelError."""
    told = {"dtype": spec.dtype, "trust_remote_code": spec.trust_remote_code}
    whole = ready(spec.model, **told, attention=spec.attention) if world.is_main else None
    digest = distributed.gather(None if whole is None else whole.weights_digest(), world)[0]
    skeleton = skeleton_of(spec)
    teacher = ShardedTeacher(skeleton.model, skeleton.tokenizer, spec.model, world)
    teacher.digest, teacher.is_probed = digest, True
    distributed.shard_layers(teacher)
    teacher.to_empty(device=world.device)
    set_model_state_dict(
        teacher,
        {} if whole is None else whole.state_dict(),
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False),
    )
    distributed.copy_buffers(whole, teacher)
    return teacher


def wait_for_passes(teacher: Teacher | None) -> None:
    """Let a sharded teacher finish the passes of every rank; nothing for any other. Every rank must
    call this where ranks may have taken different numbers of passes."""
    if isinstance(teacher, ShardedTeacher):
        teacher.wait_for_passes()
