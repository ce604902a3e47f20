"""CPU time of the likeliest tokens: `top_k_of` over `fused_statistics`, and truncation by `top_p`
beside a stable sort.

Both take turns within one process; each keeps its shortest time of all rounds.
"""

import time
from collections.abc import Callable, Mapping

import torch
import tyro

from potstill.kl.fused import fused_statistics
from potstill.kl.head import Head
from potstill.kl.topk import top_k_of
from potstill.models.drawing import truncate


def shortest(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def stable_sort(logits_RV: torch.Tensor) -> torch.Tensor:
    return logits_RV.sort(dim=-1, descending=True, stable=True).values


@torch.no_grad()
def main(vocab_size: int = 151_936, rounds: int = 3, threads: int = 1) -> None:
    """Measure and print one line a case."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for dim, num_rows in ((384, 512), (1024, 256)):
        for dtype in (torch.float32, torch.bfloat16):
            hidden = torch.randn(num_rows, dim).to(dtype)
            head = Head((torch.randn(vocab_size, dim) * 2 / dim**0.5).to(dtype))
            runs = {"statistics": lambda h=hidden, w=head: fused_statistics(h, w)}
            runs |= {f"top {k}": lambda h=hidden, w=head, k=k: top_k_of(h, w, k) for k in (5, 64)}
            best = shortest(runs, rounds)
            ratios = [
                f"{name} {seconds / best['statistics']:.2f}" for name, seconds in best.items()
            ]
            print(f"d={dim} N={num_rows} {dtype}: {', '.join(ratios)}", flush=True)
    for spread in (4.0, 2.0, 1.0):
        logits = spread * torch.randn(16, vocab_size)
        nucleus = truncate(logits, 0, 0.95).isfinite().sum(-1).double().mean().item()
        runs = {
            "top_p": lambda z=logits: truncate(z, 0, 0.95),
            "a stable sort": lambda z=logits: stable_sort(z),
        }
        times = [
            f"{name} {1000 * seconds:.1f} ms" for name, seconds in shortest(runs, rounds).items()
        ]
        print(
            f"logits of deviation {spread:g}, nuclei of {nucleus:,.0f}: {', '.join(times)}",
            flush=True,
        )


if __name__ == "__main__":
    tyro.cli(main)
