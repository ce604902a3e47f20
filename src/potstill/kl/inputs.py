"""Checked inputs of a fused divergence: both models' hidden states and heads, the class of end
tokens, the labels.

Everything is checked here, before any tile is computed.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from potstill.kl.head import Head
from potstill.kl.terms import VocabShard


class Side:
    """One model's rows and head, cut to the shared vocabulary, without gradients."""

    def __init__(
        self, hidden: Tensor, head: Head, vocab_size: int, temperature: float, dtype: torch.dtype
    ):
        self.hidden = hidden.detach()
        self.weight = head.weight_VD.detach()[:vocab_size]
        self.dtype = dtype
        # Products of 16-bit numbers with 32-bit sums lose nothing and, in hardware, are several
        # times faster.
        is_16bit = hidden.dtype == self.weight.dtype != dtype
        self.is_cuda_16bit = is_16bit and hidden.is_cuda
        self.is_cpu_16bit = (
            is_16bit and hidden.dtype == torch.bfloat16 and not hidden.is_cuda and _has_amx()
        )
        self.gain = head.scale / temperature
        self.softcap = None if head.softcap is None else head.softcap / temperature
        self.alpha = self.gain if self.softcap is None else self.gain / self.softcap
        bias = None if head.bias_V is None else head.bias_V.detach()[:vocab_size]
        self.bias = None if bias is None else bias.to(dtype) * self.alpha

    def rows(self, block: slice) -> Tensor:
        return self.hidden[block] if self.is_cuda_16bit else self.hidden[block].to(self.dtype)

    def weights(self, columns: slice | Tensor) -> Tensor:
        weight = self.weight[columns]
        return weight if self.is_cuda_16bit else weight.to(self.dtype)

    def logits(
        self, rows: Tensor, weight: Tensor, columns: slice | Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Tempered logits of some rows and columns."""
        out = rows.new_empty(len(rows), len(weight), dtype=self.dtype) if out is None else out
        self.multiply(rows, weight.T, out, self.alpha)
        if self.bias is not None:
            out.add_(self.bias[columns])
        return out if self.softcap is None else out.tanh_().mul_(self.softcap)

    def picked(self, block: slice, ids: Tensor) -> Tensor:
        """Tempered logits [rows] of one id a row."""
        # Several times as fast as an index on a CPU, and the same numbers.
        weight = self.weight.index_select(0, ids)
        logits = (self.hidden[block].to(self.dtype) * weight.to(self.dtype)).sum(-1) * self.alpha
        if self.bias is not None:
            logits = logits + self.bias[ids]
        return logits if self.softcap is None else logits.tanh() * self.softcap

    def pieces(self, g: Tensor) -> list[Tensor]:
        """Gradients as numbers that 16-bit products do not round: one tensor, or two that add up to
        it to 2^-17."""
        if not (self.is_cuda_16bit or self.is_cpu_16bit):
            return [g]
        high = g.to(self.weight.dtype)
        low = g - high
        return [high, low.to(high.dtype)] if self.is_cuda_16bit else [high.to(g.dtype), low]

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, alpha: float, add: bool = False) -> None:
        """out = alpha a b, or out += alpha a b, with sums in the type of `out`."""
        if self.is_cuda_16bit:
            product = torch.mm(a, b, out_dtype=out.dtype)
            out.add_(product, alpha=alpha) if add else torch.mul(product, alpha, out=out)
        else:
            with _bfloat16_products() if self.is_cpu_16bit else contextlib.nullcontext():
                torch.addmm(out, a, b, beta=float(add), alpha=alpha, out=out)


def _has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


@contextlib.contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let float32 matrices that hold bfloat16 numbers be multiplied as such: the same products,
    float32 sums."""
    setting = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


class Problem:
    """Validated inputs of one fused-KL call: both models, labels, end class, and this rank's rows
    of the vocabulary."""

    def __init__(
        self,
        hidden_ND: Tensor,
        head: Head,
        teacher_hidden_NE: Tensor | None,
        teacher_head: Head | None,
        labels_N: Tensor | None,
        vocab_size: int | None,
        temperature: float,
        end_ids: tuple[int, ...],
        mixture_weight: float | None,
        shard: VocabShard | None,
    ):
        sizes = _sizes(hidden_ND, head, teacher_hidden_NE, teacher_head)
        self.vocab_size = _shared_size(sizes, vocab_size)
        check_settings(temperature, mixture_weight, has_teacher=teacher_head is not None)
        self.num_rows, self.shard, self.mixture_weight = len(hidden_ND), shard, mixture_weight
        self.device, self.dtype = (
            hidden_ND.device,
            torch.promote_types(hidden_ND.dtype, torch.float32),
        )
        limit = None if shard else self.vocab_size
        if labels_N is not None:
            _check_labels(labels_N, self.num_rows, limit)
        _check_end_ids(end_ids, limit)

        # From here on ids are those of this rank's rows; the ids of other ranks are negative or too
        # large.
        start = shard.start if shard else 0
        self.merges_ends = len(end_ids) > 1
        ends = (
            torch.tensor(end_ids if self.merges_ends else (), dtype=torch.long, device=self.device)
            - start
        )
        self.labels = None if labels_N is None else labels_N - start
        self.label_is_end = (
            None if self.labels is None or not self.merges_ends else torch.isin(self.labels, ends)
        )
        self.member_list = [
            i - start for i in end_ids if self.merges_ends and 0 <= i - start < self.vocab_size
        ]
        self.members = torch.tensor(self.member_list, dtype=torch.long, device=self.device)
        self.student = Side(hidden_ND, head, self.vocab_size, temperature, self.dtype)
        self.teacher = None
        if teacher_hidden_NE is not None and teacher_head is not None:
            self.teacher = Side(
                teacher_hidden_NE, teacher_head, self.vocab_size, temperature, self.dtype
            )

    @property
    def sides(self) -> list[Side]:
        return [self.student] if self.teacher is None else [self.student, self.teacher]


def _sizes(
    hidden_ND: Tensor, head: Head, teacher_hidden_NE: Tensor | None, teacher_head: Head | None
) -> tuple[int, ...]:
    """The rows of each head, once both sides are found to fit together."""
    _check_side("student", hidden_ND, head)
    if (teacher_hidden_NE is None) != (teacher_head is None):
        raise ValueError("give both the teacher's hidden states and its head, or neither")
    if teacher_hidden_NE is None or teacher_head is None:
        return (len(head.weight_VD),)
    _check_side("teacher", teacher_hidden_NE, teacher_head)
    if len(teacher_hidden_NE) != len(hidden_ND):
        raise ValueError(
            f"there are {len(hidden_ND)} student rows and {len(teacher_hidden_NE)} teacher rows; "
            "row i of both must be about the same token"
        )
    return len(head.weight_VD), len(teacher_head.weight_VD)


def _shared_size(sizes: tuple[int, ...], vocab_size: int | None) -> int:
    """The rows that take part: as many as are asked for, or all where both heads have as many."""
    if vocab_size is None and len(set(sizes)) > 1:
        raise ValueError(
            f"heads of {sizes[0]} and {sizes[1]} rows; give vocab_size, the number of rows they "
            "share"
        )
    shared = min(sizes) if vocab_size is None else vocab_size
    if not 1 <= shared <= min(sizes):
        raise ValueError(f"vocab_size is {vocab_size}; the heads have {list(sizes)} rows")
    return shared


def check_settings(temperature: float, mixture_weight: float | None, has_teacher: bool) -> None:
    """Raise ValueError for a temperature or a mixture of the models that there cannot be."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if mixture_weight is None:
        return
    if not 0 < mixture_weight < 1:
        raise ValueError(
            f"mixture_weight is {mixture_weight}; it must be strictly between 0 and 1: the "
            "mixture is one of the models there"
        )
    if not has_teacher:
        raise ValueError("a divergence from the mixture needs a teacher's hidden states and head")


def _check_labels(labels_N: Tensor, num_rows: int, limit: int | None) -> None:
    if labels_N.shape != (num_rows,) or labels_N.dtype != torch.long:
        raise ValueError(
            f"labels are {labels_N.dtype} {list(labels_N.shape)}; give int64 [{num_rows}], one "
            "id a row"
        )
    if num_rows:
        _check_ids("a label", int(labels_N.amin()), int(labels_N.amax()), limit)


def _check_end_ids(end_ids: tuple[int, ...], limit: int | None) -> None:
    if len(set(end_ids)) != len(end_ids):
        raise ValueError(f"end_ids {list(end_ids)} name an id twice")
    if end_ids:
        _check_ids("an end id", min(end_ids), max(end_ids), limit)


def _check_side(who: str, hidden: Tensor, head: Head) -> None:
    if hidden.dim() != 2 or head.weight_VD.dim() != 2 or hidden.shape[1] != head.weight_VD.shape[1]:
        raise ValueError(
            f"{who}: hidden states are {list(hidden.shape)} and the head "
            f"{list(head.weight_VD.shape)}; they must be [N, D] and [V, D]"
        )
    if hidden.device != head.weight_VD.device:
        raise ValueError(
            f"{who}: hidden states are on {hidden.device} and the head on {head.weight_VD.device}"
        )


def _check_ids(what: str, smallest: int, largest: int, limit: int | None) -> None:
    if smallest < 0 or (limit is not None and largest >= limit):
        wrong = smallest if smallest < 0 else largest
        allowed = (
            "0 or more"
            if limit is None
            else f"between 0 and {limit - 1}, a row that both heads have"
        )
        raise ValueError(f"{what} is {wrong}; it must be {allowed}")
