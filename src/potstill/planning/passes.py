"""Memory of a model's forward and backward pass, counted without any of it.

The model's own code runs on tensors that have shapes and no numbers, and every tensor that is made
and let go is counted. So the count follows the architecture, the type of computation and the
library's version, and takes neither memory nor the weights.
"""

import contextlib
import copy
import functools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from potstill.models.adapters import attach
from potstill.models.lean.activations import layers_run_again
from potstill.planning.sizes import Outline, Sizes

# Activations of a token, layer and hidden unit in two bytes, attention scores never whole
# (Korthikanti et al., arXiv 2205.05198): for architectures whose code asks for numbers on its way.
ACTIVATION_BYTES = 34
# The name under which transformers gets an attention that asks for no mask.
MASKLESS = "potstill_maskless"


@dataclass(frozen=True, kw_only=True)
class PassBytes:
    """Bytes beside the weights: at most while a teacher passes forward (`forward`), kept of a
    student's forward pass (`saved`), and at most while it goes backward (`backward`), gradients of
    weights left out. `is_counted` is false for an estimate by rule."""

    forward: int
    saved: int
    backward: int
    is_counted: bool


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on: of those that are there `now`,
    and at most (`peak`). What the `known` ones hold is left out, and so are views of them."""

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes or key in self._known:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@functools.lru_cache(maxsize=64)
def pass_bytes(
    model: Outline, shape: tuple[int, int], dtype: str, compute_dtype: str, again: bool = False
) -> PassBytes:
    """The memory of passes over `shape` = (rows, tokens of each); `again` where layers run again
    in the backward pass."""
    try:
        return _counted(model, shape, dtype, compute_dtype, again)
    # An architecture's own code that reads numbers, such as which experts are chosen.
    except Exception:
        return passes_by_rule(model, shape, dtype, compute_dtype, again)


def passes_by_rule(
    model: Outline, shape: tuple[int, int], dtype: str, compute_dtype: str, again: bool = False
) -> PassBytes:
    """The same by the rule of `ACTIVATION_BYTES`."""
    is_half, num_tokens = "bfloat16" in (dtype, compute_dtype), shape[0] * shape[1]
    saved = activation_bytes(model.sizes, num_tokens, is_half=is_half)
    a_layer = saved // model.sizes.num_layers
    if again:
        # The input of each layer; the one that runs again has all its activations.
        saved = num_tokens * model.sizes.width * model.sizes.num_layers * (2 if is_half else 4)
        return PassBytes(
            forward=a_layer, saved=saved, backward=saved + 2 * a_layer, is_counted=False
        )
    return PassBytes(forward=a_layer, saved=saved, backward=saved + a_layer, is_counted=False)


def activation_bytes(sizes: Sizes, num_tokens: int, *, is_half: bool) -> int:
    """The activations of a forward pass over so many tokens by rule, half as many in two bytes."""
    return num_tokens * sizes.width * sizes.num_layers * ACTIVATION_BYTES * (1 if is_half else 2)


def _counted(
    model: Outline, shape: tuple[int, int], dtype: str, compute_dtype: str, again: bool
) -> PassBytes:
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    transformers.AttentionInterface.register(MASKLESS, sdpa_attention_forward)
    with torch.device("meta"):
        # A copy, because transformers notes the type in it.
        made = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config), dtype=getattr(torch, dtype), attn_implementation=MASKLESS
        )
        if model.lora.rank is not None:
            attach(made, model.lora, 0)
    with FakeTensorMode():
        _fill(made)
        body = made.base_model
        weights = [*body.parameters()]
        for weight in weights:
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_drop_gradient)
        with torch.no_grad(), LiveBytes(weights) as scoring:
            _pass(body, shape, compute_dtype)
        checkpointed = layers_run_again(made) if again else contextlib.nullcontext()
        with checkpointed, LiveBytes(weights) as learning:
            hidden_BTD = _pass(body, shape, compute_dtype, learns=True)
            saved = learning.now
            learning.peak = learning.now
            hidden_BTD.backward(torch.empty_like(hidden_BTD))
    return PassBytes(forward=scoring.peak, saved=saved, backward=learning.peak, is_counted=True)


def _fill(model: torch.nn.Module) -> None:
    """Give a model without weights tensors that have a place on a device as well."""
    filled: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if old not in filled:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    is_weight = tensors is module._parameters
                    filled[old] = torch.nn.Parameter(new, old.requires_grad) if is_weight else new
                tensors[name] = filled[old]  # pyright: ignore[reportArgumentType]


def _pass(body, shape: tuple[int, int], compute_dtype: str, learns: bool = False) -> torch.Tensor:
    """Hidden states [B, T, D] of a forward pass, as `student_rows` takes it."""
    embedding, hook = body.get_input_embeddings(), None
    if learns and embedding.weight.requires_grad:
        embedding.weight.requires_grad_(False)
        hook = embedding.register_forward_hook(_with_gradient)
    is_half = learns and compute_dtype == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        ids_BT = torch.zeros(shape, dtype=torch.long)
        hidden_BTD = body(input_ids=ids_BT, use_cache=False).last_hidden_state
    if hook is not None:
        hook.remove()
    return hidden_BTD


def _with_gradient(module, arguments, output: torch.Tensor) -> torch.Tensor:
    """An embedding's rows as a student's are, whose own gradient is counted elsewhere."""
    return output.detach().requires_grad_()


def _drop_gradient(weight: torch.Tensor) -> None:
    weight.grad = None
