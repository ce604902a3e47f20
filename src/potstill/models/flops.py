"""Floating-point operations of a step, from the architectures: what equal compute means.

A multiplication and its addition count as two. Counted are the matrix products and attention of
transformers on real tokens, padding left out; attention is causal. Of a mixture of experts those
are counted that a token passes through.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from potstill.kl.head import Head
from potstill.runs.schema import Flops
from potstill.types import Rollout, Writer

# Names in configurations for how many experts a layer has.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """`per_token` of the backbone's weights, `per_pair` of a query and a key over all layers,
    `head` for one token.

    Of these, `frozen_per_token` and `frozen_head` are those of weights that do not learn, which
    have no gradient of their own. `per_pair` is None where the architecture does not say; attention
    is then left out of the count.
    """

    per_token: int
    per_pair: int | None
    head: int
    frozen_per_token: int = 0
    frozen_head: int = 0

    def backbone(self, num_tokens: int) -> int:
        """One forward pass over a sequence, or decoding it token by token with a cache."""
        return self.per_token * num_tokens + (self.per_pair or 0) * (
            num_tokens * (num_tokens + 1) // 2
        )


def head_flops(head: Head | None) -> ModelFlops:
    """The operations of a teacher that is a head alone, or not even that."""
    return ModelFlops(
        per_token=0, per_pair=0, head=0 if head is None else 2 * head.weight_VD.numel()
    )


def model_flops(backbone: Any, head: Head, config) -> ModelFlops:
    """The operations of a model, counted from the weights that tokens are multiplied with.

    The head's rows are those it has, padding included.
    """
    products, share = _products_of(backbone), active_share(config)
    active = [(round(num * share) if is_expert else num, w) for num, is_expert, w in products]
    of_head = 2 * head.weight_VD.numel()
    return ModelFlops(
        per_token=2 * sum(num for num, _ in active),
        per_pair=_attention_flops(config),
        head=of_head,
        frozen_per_token=2 * sum(num for num, weight in active if not weight.requires_grad),
        frozen_head=0 if head.weight_VD.requires_grad else of_head,
    )


def expert_weights(backbone: Any) -> int:
    """How many weights all experts of a mixture have."""
    return sum(num for num, is_expert, _ in _products_of(backbone) if is_expert)


def _products_of(backbone: Any) -> list[tuple[int, bool, nn.Parameter]]:
    """The weights that tokens are multiplied with: how many, whether an expert's, and which."""
    found = []
    for name, module in backbone.named_modules():
        kind, is_expert = type(module).__name__, "experts" in name.split(".")
        # GPT-2 keeps its linear layers in a class of its own, and routers are one each.
        is_linear = isinstance(module, nn.Linear) or kind == "Conv1D" or kind.endswith("Router")
        # All experts of a layer may be one tensor.
        num_axes = 2 if is_linear else 3 if is_expert else None
        own = [weight for weight in module.parameters(recurse=False) if weight.dim() == num_axes]
        for weight in own:
            # Quantised weights may be packed.
            is_plain = not isinstance(module, nn.Linear)
            num = weight.numel() if is_plain else module.in_features * module.out_features
            found.append((num, is_expert, weight))
    return found


def active_share(config) -> float:
    """The share of a mixture's experts that a token passes through; 1 without a mixture."""
    chosen = getattr(config, "num_experts_per_tok", None)
    total = next((num for name in EXPERTS if (num := getattr(config, name, None))), None)
    return chosen / total if chosen and total else 1.0


def _attention_flops(config) -> int | None:
    """Operations for a query and a key over all layers; None where the configuration describes no
    attention."""
    try:
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return int(4 * config.num_attention_heads * head_dim * config.num_hidden_layers)
    # It may have other names for them, or other sizes in each layer, of which configurations say so
    # in several ways.
    except Exception:
        return None


def rollout_flops(
    rollouts: Iterable[Rollout], models: Mapping[Writer, ModelFlops], by_token: bool
) -> int:
    """The operations that writing took: each writer reads up to its last token, and gives logits
    for its own tokens.

    With `by_token` both models read everything and give logits for each token. What a data set
    wrote is free.
    """
    total = 0
    for rollout in rollouts:
        for writer, flops in models.items():
            if by_token:
                last = num_own = len(rollout.writers)
            else:
                own = [i for i, who in enumerate(rollout.writers) if who == writer]
                last, num_own = (own[-1] + 1, len(own)) if own else (0, 0)
            if num_own:
                total += (
                    flops.backbone(len(rollout.prompt.ids_of(writer)) + last - 1)
                    + num_own * flops.head
                )
    return total


def training_flops(
    rollouts: Sequence[Rollout],
    student: ModelFlops,
    teacher: ModelFlops | None,
    looks_ahead: bool = False,
    others: Sequence[ModelFlops] = (),
) -> Flops:
    """One forward and backward pass, which counts as two forward ones, or as one for weights that
    do not learn. `teacher` is None where none scores.

    With `looks_ahead` both models' forward passes and heads are computed once more, for what later
    tokens cost. `others` are further models that the student's prompts are read by, such as the
    student as it was at first; the divergence from each takes a pass of the heads of its own.

    `head` is that of both models. A cached teacher has no body, so what it scores costs its head
    alone, or nothing.
    """
    parts: Flops = {
        "rollout": 0,
        "probe": 0,
        "teacher": 0,
        "student_forward": 0,
        "student_backward": 0,
        "head": 0,
    }
    for rollout in rollouts:
        num_written = len(rollout.completion_ids) - 1
        num_loss_tokens = sum(rollout.trained)
        num_read = len(rollout.prompt.ids_of("student")) + num_written
        forward = student.backbone(num_read)
        parts["student_forward"] += forward
        parts["student_backward"] += 2 * forward - num_read * student.frozen_per_token
        parts["head"] += num_loss_tokens * (3 * student.head - student.frozen_head)
        if teacher is not None:
            completion_ids, trained = rollout.read_by("teacher")
            parts["teacher"] += teacher.backbone(
                len(rollout.prompt.ids_of("teacher")) + len(completion_ids) - 1
            )
            parts["head"] += sum(trained) * teacher.head
        if looks_ahead and teacher is not None:
            parts["student_forward"] += forward
            parts["teacher"] += teacher.backbone(
                len(rollout.prompt.ids_of("teacher")) + num_written
            )
            parts["head"] += num_loss_tokens * (student.head + teacher.head)
        for other in others:
            parts["teacher"] += other.backbone(num_read)
            parts["head"] += num_loss_tokens * (other.head + 3 * student.head)
    return parts
