"""From rollouts and token statistics to the numbers of a step. Sums first, so that ranks and
batches add up."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import get_args

import torch

from potstill.kl.terms import TokenStats
from potstill.models.batch import Batch
from potstill.rollouts.text import num_tokens_to_answer, zlib_ratio
from potstill.runs.schema import (
    EntropyBeforeAnswer,
    Rewards,
    Spans,
    StepMeans,
    StepMetrics,
    TimedPart,
    Timing,
    TokenMean,
    TokenMeans,
    WriterMeans,
    value_in,
)
from potstill.types import Rollout, Writer

# Statistics that have one value a loss token.
TOKEN_STATISTICS: tuple[TokenMean, ...] = get_args(TokenMean)
BEFORE_ANSWER: tuple[EntropyBeforeAnswer, ...] = get_args(EntropyBeforeAnswer)
# Tokens between two notices of how far the writing of rollouts is.
NOTICED_TOKENS = 64


class Stopwatch:
    """Seconds spent in named parts of a step. `doing` is told what the step is at."""

    def __init__(self, device: torch.device, doing: Callable[[str], None] = lambda what: None):
        self.device = device
        self.doing = doing
        self.seconds: dict[TimedPart, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: TimedPart) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.seconds[part] += self._now() - start

    def token_counter(self, most: int) -> Callable[[int, int], None]:
        """A function that is told each token of rollouts, of which there can be so many."""
        num = 0

        def count(place: int, token_id: int) -> None:
            nonlocal num
            num += 1
            if num % NOTICED_TOKENS == 0:
                self.doing(f"rollouts, {num:,} of at most {most:,} tokens")

        return count

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
    ratios = [zlib_ratio(text) for text in texts]
    for suffix, writer in (("", None), *((f"/{writer}", writer) for writer in split_by)):
        chosen = [
            (rollout, ratio)
            for rollout, ratio in zip(rollouts, ratios, strict=True)
            if writer is None or rollout.writers[-1] == writer
        ]
        sums[f"num_rollouts{suffix}"] = float(len(chosen))
        sums[f"length{suffix}"] = float(sum(len(rollout.completion_ids) for rollout, _ in chosen))
        sums[f"truncation{suffix}"] = float(sum(rollout.stop == "length" for rollout, _ in chosen))
        sums[f"zlib_ratio{suffix}"] = float(sum(ratio for _, ratio in chosen))
    return sums


def step_means(sums: Mapping[str, float], split_by: Sequence[Writer] = ()) -> StepMeans:
    """Means per loss token (nats) and per rollout from a step's sums, and those of each writer in
    `split_by`."""
    row: StepMeans = {
        "loss": sums["loss"],
        **_token_means(sums),
        "length": sums["length"] / sums["num_rollouts"],
        "truncation": sums["truncation"] / sums["num_rollouts"],
        "zlib_ratio": sums["zlib_ratio"] / sums["num_rollouts"],
        "num_loss_tokens": int(sums["num_loss_tokens"]),
    }
    if split_by:
        row["student_share"] = sums["num_loss_tokens/student"] / sums["num_loss_tokens"]
        row["by_writer"] = {writer: _writer_means(sums, f"/{writer}") for writer in split_by}
    return row


def reward_means(sums: Mapping[str, float]) -> Rewards:
    """The scores of a step's responses, what was clipped, and the KL to the start; of each what the
    run has."""
    rewards: Rewards = {}
    if "reward" in sums:
        num = sums["num_rollouts"]
        mean = sums["reward"] / num
        rewards["reward"] = mean
        rewards["reward_std"] = max(sums["reward_squared"] / num - mean**2, 0.0) ** 0.5
        rewards["groups_with_signal"] = sums["groups_with_signal"] / num
    if "num_clipped" in sums:
        rewards["clipped"] = sums["num_clipped"] / sums["num_loss_tokens"]
    if "start_kl" in sums:
        rewards["start_kl"] = sums["start_kl"] / sums["num_loss_tokens"]
    return rewards


def span_means(sums: Mapping[str, float]) -> Spans:
    """The spans of a step, where its loss is of them."""
    if "num_spans" not in sums:
        return {}
    num, num_in, num_out = (sums[name] for name in ("num_spans", "num_loss_tokens", "num_left_out"))
    return {
        "span_log_ratio": sums["span_log_ratio"] / num,
        "span_tokens": num_in / num,
        "left_out": num_out / (num_in + num_out),
    }


def _writer_means(sums: Mapping[str, float], suffix: str) -> WriterMeans:
    return {
        "num_loss_tokens": int(sums[f"num_loss_tokens{suffix}"]),
        **_token_means(sums, suffix),
        "length": _ratio(sums, f"length{suffix}", f"num_rollouts{suffix}"),
        "truncation": _ratio(sums, f"truncation{suffix}", f"num_rollouts{suffix}"),
        "zlib_ratio": _ratio(sums, f"zlib_ratio{suffix}", f"num_rollouts{suffix}"),
    }


def _token_means(sums: Mapping[str, float], suffix: str = "") -> TokenMeans:
    """Means of the statistics that were summed."""
    means: TokenMeans = {}
    for name in TOKEN_STATISTICS:
        if name + suffix in sums:
            means[name] = _ratio(sums, name + suffix, f"num_loss_tokens{suffix}")
    for name in BEFORE_ANSWER:
        if name + suffix in sums:
            means[name] = _ratio(sums, name + suffix, f"num_before_answer{suffix}")
    return means


def _ratio(sums: Mapping[str, float], name: str, count: str) -> float | None:
    """One sum over another; None where there is nothing to count."""
    return sums[name] / sums[count] if sums[count] else None


def timing(seconds: float, parts: Mapping[TimedPart, float]) -> Timing:
    """Seconds of a step, whole and by part, as a row of the run log has them."""
    row: Timing = {"seconds": round(seconds, 4)}
    for part, value in parts.items():
        row[part] = round(value, 4)
    return row


def describe(metrics: StepMetrics) -> str:
    """A step's numbers in a line: loss, KLs or rewards, entropies, length and window."""
    parts = [f"loss {metrics['loss']:.4f}"]
    entropy = f"entropy {value_in(metrics, 'student_entropy'):.3f}"
    if "forward_kl" in metrics:
        parts.append(
            f"KL fwd {metrics['forward_kl']:.4f} rev {value_in(metrics, 'reverse_kl'):.4f}"
        )
    if "teacher_entropy" in metrics:
        entropy += f" (teacher {metrics['teacher_entropy']:.3f})"
    if "left_out" in metrics:
        parts.append(f"left out {metrics['left_out']:.0%}")
    if "reward" in metrics:
        signal = value_in(metrics, "groups_with_signal")
        parts.append(f"reward {metrics['reward']:.3f} (groups with signal {signal:.0%})")
    length = f"length {metrics['length']:.0f}/{metrics['window']}"
    return "  ".join([*parts, entropy, length])
