"""The head's product for a few rows, as decoding asks for it, on a CPU."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

# From one row on a product of matrices, up to these rows the faster way around; and a vocabulary
# whose head is larger than caches (docs/performance.md).
FEW_ROWS = range(2, 9)
MANY_TOKENS = 2**14


@contextlib.contextmanager
def thin_head(model) -> Iterator[None]:
    """Let a model's head put its own weight on the left while it projects few rows.

    The library that multiplies on a CPU is then two to five times faster. The logits are the same
    but for rounding. A head that is more than a plain layer, or not on a CPU, stays as it is.
    """
    head = model.get_output_embeddings()
    is_plain = type(head) is nn.Linear and "forward" not in vars(head)
    if not is_plain or head.weight.device.type != "cpu" or len(head.weight) < MANY_TOKENS:
        yield
        return

    def project(input: Tensor) -> Tensor:
        rows_RD = input.flatten(0, -2)
        if len(rows_RD) not in FEW_ROWS:
            return nn.functional.linear(input, head.weight, head.bias)
        logits_RV = (head.weight @ rows_RD.T).T.contiguous()
        if head.bias is not None:
            logits_RV += head.bias
        return logits_RV.unflatten(0, input.shape[:-1])

    head.forward = project
    try:
        yield
    finally:
        del head.forward
