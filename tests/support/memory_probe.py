"""Prints the megabytes that a streaming loss and its gradient need beyond inputs and gradients, for
N rows."""

import sys
from pathlib import Path

import torch

from potstill.kl.fused import fused_loss
from potstill.kl.head import Head
from potstill.kl.terms import LossTerms


def high_water_mark() -> float:
    """Megabytes, since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def run(num_rows: int, vocab_size: int, dims: tuple[int, int]) -> float:
    hidden = torch.randn(num_rows, dims[0], requires_grad=True)
    weight = torch.randn(vocab_size, dims[0], requires_grad=True)
    teacher_hidden, teacher_weight = (
        torch.randn(num_rows, dims[1]),
        torch.randn(vocab_size, dims[1]),
    )
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_mark()
    terms = LossTerms(forward=0.3, reverse=0.7)
    fused_loss(hidden, Head(weight), teacher_hidden, Head(teacher_weight), terms, budget=0)[
        0
    ].backward()
    gradients = 4 * (hidden.numel() + weight.numel()) / 1e6
    return high_water_mark() - before - gradients


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Once before, for what is loaded at the first use.
    run(4, 100, (8, 8))
    print(run(int(sys.argv[1]), 16_000, (16, 24)))
