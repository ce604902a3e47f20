"""Where two distributions differ: among the teacher's likeliest tokens, or in the rest.

It takes whole rows of the vocabulary in the order of their probability, so it is no statistic of
the loss's passes and costs a product of both heads of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.kl.definition import merge_end_class
from potstill.kl.head import Head

# Copies of whole rows that are alive at once: logits, probabilities, their order and sums.
COPIES = 8


@torch.no_grad()
def head_share(
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head],
    mass: float,
    *,
    budget: int,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    end_ids: Sequence[int] = (),
) -> Tensor:
    """The share [N] of sum |p - q| that lies on the fewest tokens with at least `mass` of the
    teacher's p, of equals the first; 1/2 where p = q.

    `student` and `teacher` are hidden states [N, D] and [N, E] with their heads, `budget` is in
    bytes. End ids count as one token.
    """
    hidden_ND, head = student
    hidden_NE, teacher_head = teacher
    row_bytes = COPIES * hidden_ND.element_size() * (vocab_size or head.weight_VD.shape[0])
    num_rows = max(1, budget // row_bytes)
    shares = []
    for rows_ND, rows_NE in zip(hidden_ND.split(num_rows), hidden_NE.split(num_rows), strict=True):
        q_NV, p_NV = (
            merge_end_class(logits_NV / temperature, end_ids).softmax(-1)
            for logits_NV in (head(rows_ND, vocab_size), teacher_head(rows_NE, vocab_size))
        )
        sorted_NV, order_NV = p_NV.sort(descending=True, stable=True)
        is_head_NV = sorted_NV.cumsum(-1) - sorted_NV < mass
        gap_NV = (p_NV - q_NV).abs().gather(-1, order_NV)
        whole_N = gap_NV.sum(-1)
        share_N = (gap_NV * is_head_NV).sum(-1) / whole_N
        shares.append(torch.where(whole_N > 0, share_N, 0.5))
    return torch.cat([hidden_ND.new_empty(0), *shares])
