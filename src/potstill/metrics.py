"""From rollouts and token statistics to the numbers of a step. Sums first, so that ranks and batches add up."""

import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from potstill.types import Batch, Rollout, TokenStats

# (statistic, name in the run log) of those that have one value a loss token.
TOKEN_STATISTICS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy")


class Stopwatch:
    """Seconds spent in named parts of a step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.seconds[part] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def zlib_ratio(text: str) -> float:
    """How many times smaller zlib makes the text: about 1 for short prose, above 10 for a loop."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 1.0


def num_tokens_to_answer(
    completion_ids: Sequence[int], text: str, tokenizer, answer_end: Callable[[str], int | None]
) -> int:
    """How many tokens there are up to the end of the first final answer; all of them when there is none.

    What follows the answer, a loop above all, would otherwise dominate the entropy and the length.
    """
    end = answer_end(text)
    if end is None or end >= len(text):
        return len(completion_ids)
    low, high = 1, len(completion_ids)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(completion_ids[:middle], skip_special_tokens=True)) >= end:
            high = middle
        else:
            low = middle + 1
    return low


def token_sums(stats: TokenStats, before_answer_N: torch.Tensor) -> dict[str, float]:
    """Sums over a batch's loss tokens, of all and of those up to the first final answer."""
    sums = {"num_loss_tokens": float(len(before_answer_N)), "num_before_answer": float(before_answer_N.sum())}
    for name in TOKEN_STATISTICS:
        values_N = getattr(stats, f"{name}_N")
        if values_N is not None:
            sums[name] = float(values_N.double().sum())
    sums["student_entropy_before_answer"] = float(stats.student_entropy_N.double()[before_answer_N].sum())
    return sums


def rollout_sums(rollouts: Sequence[Rollout], texts: Sequence[str]) -> dict[str, float]:
    """Sums over rollouts: how many, how long, how many cut by the window, how repetitive."""
    return {
        "num_rollouts": float(len(rollouts)),
        "length": float(sum(len(rollout.completion_ids) for rollout in rollouts)),
        "truncation": float(sum(rollout.stop == "length" for rollout in rollouts)),
        "zlib_ratio": float(sum(zlib_ratio(text) for text in texts)),
    }


def step_means(sums: dict[str, float]) -> dict[str, float]:
    """Means per loss token (nats) and per rollout from the summed numbers of a step."""
    means = {name: sums[name] / sums["num_loss_tokens"] for name in TOKEN_STATISTICS if name in sums}
    means["student_entropy_before_answer"] = sums["student_entropy_before_answer"] / max(sums["num_before_answer"], 1)
    means |= {name: sums[name] / sums["num_rollouts"] for name in ("length", "truncation", "zlib_ratio")}
    return {"loss": sums["loss"], **means, "num_loss_tokens": int(sums["num_loss_tokens"])}


def logged_samples(
    batch: Batch, loss_N: torch.Tensor, stats: TokenStats, tokenizer, chosen: Sequence[Rollout]
) -> list[dict[str, Any]]:
    """The chosen rollouts of a batch, with the loss and the student's entropy of each loss token."""
    samples, first = [], 0
    for rollout in batch.rollouts:
        rows = slice(first, first := first + sum(rollout.trained))
        if not any(rollout is one for one in chosen):
            continue
        samples.append(
            {
                "prompt_id": rollout.prompt.example.id,
                "prompt": rollout.prompt.example.prompt,
                "tokens": [tokenizer.decode([i]) for i in rollout.completion_ids],
                "source": rollout.source,
                "stop": rollout.stop,
                "trained": list(rollout.trained),
                "loss": [round(x, 5) for x in loss_N[rows].tolist()],
                "student_entropy": [round(x, 5) for x in stats.student_entropy_N[rows].tolist()],
            }
        )
    return samples
