"""A teacher beside the student's device: on another one, or in the machine's memory, from where its
layers are brought in for a pass."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from potstill.config import TeacherModel
from potstill.kl.head import Head
from potstill.models.batch import Batch
from potstill.models.distributed import World
from potstill.models.language_model import LanguageModel
from potstill.types import ModelError


class PlacedTeacher(LanguageModel):
    """A frozen model that computes on `place`; its states and its head are on the student's
    device."""

    def __init__(self, teacher: LanguageModel, place: torch.device, home: torch.device):
        super().__init__(teacher.model, teacher.tokenizer, teacher.name)
        self.place, self.home = place, home
        self.is_probed, self.digest = True, teacher.digest
        head = teacher.head
        bias_V = None if head.bias_V is None else head.bias_V.to(home)
        self.own_head = dataclasses.replace(head, weight_VD=head.weight_VD.to(home), bias_V=bias_V)

    def forward(self, input_ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        positions_BT = None if positions_BT is None else positions_BT.to(self.place)
        return super().forward(input_ids_BT.to(self.place), positions_BT)

    def signal_at(self, batch: Batch) -> Tensor:
        states_BTE = self(*batch.teacher_inputs)
        return states_BTE[batch.teacher_mask_BT.to(self.place)].to(self.home)

    @property
    def head(self) -> Head:
        return self.own_head

    @property
    def device(self) -> torch.device:
        return self.home


class OffloadedTeacher(PlacedTeacher):
    """A frozen model whose weights are in the machine's memory; those of a layer are on the
    student's device while it computes. It cannot write: every token would bring all of them."""

    def __init__(self, teacher: LanguageModel, home: torch.device):
        super().__init__(teacher, home, home)
        self.digest = teacher.weights_digest()
        _accelerate().cpu_offload(self.model, home)

    @property
    def decoder(self) -> None:
        return None


def loading_device(spec: TeacherModel, world: World) -> torch.device:
    """The device that the weights of a teacher are loaded to. Raises ModelError where there is none
    such."""
    if spec.placement == "offloaded":
        if world.device.type == "cpu":
            raise ModelError(
                'teacher.placement is "offloaded", and there is no GPU that its layers could be '
                "brought to: here its weights are in the machine's memory anyway; leave it out"
            )
        _accelerate()
        return torch.device("cpu")
    if spec.device is None:
        return world.device
    place, num_gpus = torch.device(spec.device), torch.cuda.device_count()
    if place.type == "cuda" and place.index >= num_gpus:
        raise ModelError(
            f"teacher.device is {spec.device!r}, and this machine has {num_gpus} GPUs; name one of "
            'them, from "cuda:0" on, or "cpu"'
        )
    if place.type == "cuda" and world.size > 1:
        raise ModelError(
            f"teacher.device is {spec.device!r}, which all {world.size} ranks would share; leave "
            'it out, or use teacher.placement = "sharded"'
        )
    return place


def placed(teacher: LanguageModel, spec: TeacherModel, world: World) -> LanguageModel:
    """A frozen teacher that `loading_device` has had loaded, as the recipe asks for it."""
    if spec.placement == "offloaded":
        return OffloadedTeacher(teacher, world.device)
    if spec.device is None or torch.device(spec.device) == world.device:
        return teacher
    return PlacedTeacher(teacher, torch.device(spec.device), world.device)


def _accelerate() -> Any:
    """The library that brings weights in. Raises ModelError where it is not installed."""
    try:
        import accelerate
    except ImportError:
        raise ModelError(
            'teacher.placement = "offloaded" takes accelerate, which is not installed; run `pip '
            "install 'potstill[offload]'`"
        ) from None
    return accelerate
