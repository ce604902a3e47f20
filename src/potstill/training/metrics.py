"""From rollouts and token statistics to the numbers of a step. Sums first, so that ranks and
batches add up."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from potstill.kl.terms import TokenStats
from potstill.models.batch import Batch
from potstill.rollouts.text import num_tokens_to_answer, zlib_ratio
from potstill.types import Rollout, Writer

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


def before_answer(
    batch: Batch, texts: Sequence[str], tokenizer, answer_end: Callable[[str], int | None]
) -> torch.Tensor:
    """For each loss token [N] of a batch, whether it comes up to the first final answer; `texts`
    are the responses."""
    flags = []
    for rollout, text in zip(batch.rollouts, texts, strict=True):
        num = num_tokens_to_answer(rollout.completion_ids, text, tokenizer, answer_end)
        flags += [i < num for i, is_trained in enumerate(rollout.trained) if is_trained]
    return torch.tensor(flags, device=batch.loss_mask_BT.device)


def token_sums(
    stats: TokenStats,
    before_answer_N: torch.Tensor,
    rollouts: Sequence[Rollout],
    split_by: Sequence[Writer] = (),
) -> dict[str, float]:
    """Sums over a batch's loss tokens, of all, of those up to the first final answer, and of each
    writer's."""
    device = before_answer_N.device
    sums = {
        "num_loss_tokens": float(len(before_answer_N)),
        "num_before_answer": float(before_answer_N.sum()),
    }
    per_token = {name: getattr(stats, f"{name}_N") for name in TOKEN_STATISTICS}
    per_token = {
        name: values_N.double() for name, values_N in per_token.items() if values_N is not None
    }
    sums |= {name: float(values_N.sum()) for name, values_N in per_token.items()}
    entropies = {
        name: values_N for name, values_N in per_token.items() if name.endswith("_entropy")
    }
    sums |= {
        f"{name}_before_answer": float(v_N[before_answer_N].sum())
        for name, v_N in entropies.items()
    }
    writers = [
        w
        for r in rollouts
        for w, is_trained in zip(r.writers, r.trained, strict=True)
        if is_trained
    ]
    for writer in split_by:
        is_theirs_N = torch.tensor([w == writer for w in writers], dtype=torch.bool, device=device)
        sums[f"num_loss_tokens/{writer}"] = float(is_theirs_N.sum())
        before_N = is_theirs_N & before_answer_N
        sums[f"num_before_answer/{writer}"] = float(before_N.sum())
        sums |= {
            f"{name}_before_answer/{writer}": float(v_N[before_N].sum())
            for name, v_N in entropies.items()
        }
        sums |= {
            f"{name}/{writer}": float(values_N[is_theirs_N].sum())
            for name, values_N in per_token.items()
        }
    return sums


def rollout_sums(
    rollouts: Sequence[Rollout], texts: Sequence[str], split_by: Sequence[Writer] = ()
) -> dict[str, float]:
    """Sums over rollouts: how many, how long, how many cut by the window, how repetitive; and of
    each last writer's."""
    sums: dict[str, float] = {}
    for suffix, writer in (("", None), *((f"/{writer}", writer) for writer in split_by)):
        chosen = [
            (r, text)
            for r, text in zip(rollouts, texts, strict=True)
            if writer is None or r.writers[-1] == writer
        ]
        sums[f"num_rollouts{suffix}"] = float(len(chosen))
        sums[f"length{suffix}"] = float(sum(len(rollout.completion_ids) for rollout, _ in chosen))
        sums[f"truncation{suffix}"] = float(sum(rollout.stop == "length" for rollout, _ in chosen))
        sums[f"zlib_ratio{suffix}"] = float(sum(zlib_ratio(text) for _, text in chosen))
    return sums


def step_means(sums: dict[str, float], split_by: Sequence[Writer] = ()) -> dict[str, Any]:
    """Means per loss token (nats) and per rollout from the summed numbers of a step.

    `by_writer` holds the same for the tokens that each writer wrote, and for the rollouts that it
    wrote last in; None where it wrote none. `student_share` is the share of the loss tokens that
    the student wrote.
    """

    def means(suffix: str) -> dict[str, float | None]:
        kinds = [
            ("num_loss_tokens", TOKEN_STATISTICS),
            (
                "num_before_answer",
                ("student_entropy_before_answer", "teacher_entropy_before_answer"),
            ),
            ("num_rollouts", ("length", "truncation", "zlib_ratio")),
        ]
        return {
            name: sums[name + suffix] / sums[count + suffix] if sums[count + suffix] else None
            for count, names in kinds
            for name in names
            if name + suffix in sums
        }

    row: dict[str, Any] = {"loss": sums["loss"], **means("")}
    row["num_loss_tokens"] = int(sums["num_loss_tokens"])
    if split_by:
        row["student_share"] = sums["num_loss_tokens/student"] / sums["num_loss_tokens"]
        row["by_writer"] = {
            w: {"num_loss_tokens": int(sums[f"num_loss_tokens/{w}"]), **means(f"/{w}")}
            for w in split_by
        }
    return row
