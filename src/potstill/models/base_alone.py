"""The base of a student with an adapter as a model of its own, which shares all weights: a frozen
teacher or start that takes no memory."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from potstill.models.adapters import adapter_off, base_weights, has_adapter, is_of_adapter
from potstill.models.flops import ModelFlops
from potstill.models.language_model import LanguageModel
from potstill.models.weights import weights_fingerprint


class BaseAlone(LanguageModel):
    """A student whose adapter, and dropout, are off while this computes.

    It is never put into another mode and its weights are never frozen, as they are the student's.
    """

    def forward(self, input_ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        with adapter_off(self.model):
            return super().forward(input_ids_BT, positions_BT)

    @property
    def decoder(self) -> Any:
        return _Writer(self.model)

    @property
    def flops(self) -> ModelFlops:
        of_adapter = sum(
            2 * weight.numel()
            for name, weight in self.backbone.named_parameters()
            if is_of_adapter(name)
        )
        flops = super().flops
        return dataclasses.replace(flops, per_token=flops.per_token - of_adapter)

    def weights_digest(self) -> str:
        return self.digest or weights_fingerprint(base_weights(self.model))


class _Writer:
    """The base as it is called to write: with token ids and a cache."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config

    def __call__(self, **inputs: Any) -> Any:
        with adapter_off(self.model):
            return self.model(**inputs)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()


def as_it_is(student: LanguageModel, name: str, num_ranks: int) -> LanguageModel:
    """A model that stays what the student is before its first step: its base where it has a fresh
    adapter, else a copy.

    Where ranks share the student, every rank has a copy: they would have to compute together.
    """
    if has_adapter(student.model) and num_ranks == 1:
        alone = BaseAlone(student.model, student.tokenizer, name)
        alone.digest = student.digest
        return alone
    copied = student.around(copy.deepcopy(student.model), name)
    return copied.eval().requires_grad_(False)
