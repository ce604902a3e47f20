"""Sizes of a model, read off its modules; they need no weights."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from potstill.config import Lora
from potstill.console.printable import error_text
from potstill.models.adapters import attach, has_adapter, is_of_adapter
from potstill.models.flops import ModelFlops, active_share, expert_weights
from potstill.models.language_model import LanguageModel, load_config
from potstill.models.lean.activations import layers_of
from potstill.models.lean.quantized import bits_a_weight
from potstill.types import ModelError

BYTES = {"float32": 4, "bfloat16": 2}
# Sizes take no tokenizer, and so no file beside the configuration.
_NO_TOKENIZER = SimpleNamespace(eos_token_id=None, chat_template=None)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of weights, and widths, of a model.

    `num_trained` may change, `num_adapter` are those of an adapter (LoRA), which are in float32.
    `largest_layer` is one of those that FSDP2 shards each by itself, and `outside_layers` the
    weights that it shards as one beside them. `cached_numbers` are the keys and values that
    decoding keeps of a token. `rows_tied` are the head's weights where they are the embedding's as
    well, else 0. Of a quantised model, `num_packed` weights take `packed_bits` each, beside scales
    that are not counted. `expert_weights` are those of all experts, of which a token passes through
    a share.
    """

    num_weights: int
    num_trained: int
    num_adapter: int
    trains_head: bool
    largest_layer: int
    outside_layers: int
    num_layers: int
    width: int
    vocab_size: int
    rows_tied: int
    cached_numbers: int
    expert_weights: int
    expert_share: float
    flops: ModelFlops
    num_packed: int = 0
    packed_bits: int = 0

    @property
    def head_weights(self) -> int:
        return self.vocab_size * self.width

    def weight_bytes(self, dtype: str) -> int:
        """The bytes of all weights, the model's own in this type."""
        whole = self.num_weights - self.num_adapter - self.num_packed
        packed = self.num_packed * self.packed_bits // 8
        return whole * BYTES[dtype] + packed + self.num_adapter * BYTES["float32"]

    def trained_bytes(self, dtype: str) -> int:
        """The bytes of those that may change, and so of their gradients."""
        if self.num_adapter:
            return self.num_adapter * BYTES["float32"]
        return self.num_trained * BYTES[dtype]

    def read_by(self, num_tokens: int) -> float:
        """The backbone's weights that products of so many tokens read: of experts, those that any
        of the tokens is expected to choose."""
        chosen = 1 - (1 - self.expert_share) ** num_tokens
        of_all = self.flops.per_token / 2 - self.expert_share * self.expert_weights
        return of_all + chosen * self.expert_weights


@dataclass(frozen=True, eq=False, kw_only=True)
class Outline:
    """A model that is planned with: its name, its configuration and its sizes."""

    name: str
    config: Any
    sizes: Sizes
    lora: Lora


def outline_of(model: LanguageModel, lora: Lora | None = None) -> Outline:
    """The outline of a model, loaded or without weights; it holds none. `lora` says which adapter
    it has, if any."""
    return Outline(
        name=model.name,
        config=model.model.config,
        sizes=model_sizes(model),
        lora=lora or Lora(),
    )


def planned_student(name: str, lora: Lora, trust_remote_code: bool = False) -> Outline:
    """The outline of a student by its name, with the adapter of a recipe. Raises ModelError."""
    model = without_weights(name, trust_remote_code)
    if lora.rank is not None:
        with torch.device("meta"):
            attach(model.model, lora, 0)
    return outline_of(model, lora)


def without_weights(
    name: str, trust_remote_code: bool = False, tokenizer=_NO_TOKENIZER
) -> LanguageModel:
    """A model without its weights, from its configuration. Raises ModelError."""
    config = load_config(name, trust_remote_code)
    return from_config(config, name, tokenizer)


def from_config(config, name: str, tokenizer=_NO_TOKENIZER) -> LanguageModel:
    """A model without its weights. Raises ModelError for a configuration of something else."""
    import transformers

    try:
        with torch.device("meta"):
            # Without its type the configuration would lose that of the checkpoint.
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    # Any error can come from an architecture's own code.
    except Exception as error:
        raise ModelError(
            f"model {name!r} is no causal language model: {error_text(error)}"
        ) from None
    return LanguageModel(model, tokenizer, name)


def model_sizes(model: LanguageModel) -> Sizes:
    """The sizes of a model, loaded or in outline."""
    config = model.model.config.get_text_config()
    head = model.head.weight_VD
    embedding = model.model.get_input_embeddings()
    layers = [
        sum(weight.numel() for weight in layer.parameters()) for layer in layers_of(model.backbone)
    ]
    depth = int(getattr(config, "num_hidden_layers", 0) or len(layers) or 1)
    named = [*model.model.named_parameters()]
    learning = [weight for _, weight in named if weight.requires_grad]
    adapter = [weight for name, weight in named if is_of_adapter(name)]
    bits = bits_a_weight(model.model.config)
    return Sizes(
        num_packed=_num_in_products(model.backbone) if bits else 0,
        packed_bits=bits or 0,
        num_adapter=sum(w.numel() for w in adapter) if has_adapter(model.model) else 0,
        trains_head=head.requires_grad,
        num_weights=model.num_weights,
        num_trained=sum(w.numel() for w in learning),
        largest_layer=max(layers, default=model.num_weights),
        outside_layers=model.num_weights - sum(layers),
        num_layers=depth,
        width=head.shape[1],
        vocab_size=head.shape[0],
        rows_tied=head.numel() if embedding is not None and embedding.weight is head else 0,
        cached_numbers=2 * depth * _key_width(config, head.shape[1]),
        expert_weights=expert_weights(model.backbone),
        expert_share=active_share(config),
        flops=model.flops,
    )


def _num_in_products(backbone: nn.Module) -> int:
    """The weights of a backbone's linear layers, which quantising packs."""
    linear = [
        module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and not is_of_adapter(name)
    ]
    return sum(layer.in_features * layer.out_features for layer in linear)


def _key_width(config, width: int) -> int:
    """The width of a token's keys in a layer, which is that of its values."""
    num_heads = int(getattr(config, "num_attention_heads", 0) or 1)
    num_kv = int(getattr(config, "num_key_value_heads", 0) or num_heads)
    return num_kv * int(getattr(config, "head_dim", 0) or width // num_heads)
