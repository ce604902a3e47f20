"""Passes of packed batches beside those of padded ones, on ragged lengths.

Forward and backward of a random model of Qwen3's shape, without its head. CPU time of one process,
the two in turns.
"""

import statistics
import time

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3Model

from potstill.models.batch import Batch
from potstill.models.lean.packing import rows_apart
from potstill.rollouts.batching import batch_places, make_batch
from potstill.types import Example, Prompt, Rollout

PROMPT = Prompt(example=Example(id="", prompt=""), token_ids=tuple(range(1, 65)))


def rollout_of(length: int) -> Rollout:
    return Rollout(
        prompt=PROMPT,
        completion_ids=tuple(range(3, 3 + length)),
        trained=(True,) * length,
        writers=("student",) * length,
        stop="end",
    )


def lengths_of(kind: str, num: int) -> list[int]:
    """Lengths of completions: as many of each, or many short and a few long ones."""
    stream = np.random.default_rng(0)
    drawn = stream.uniform(32, 1024, num) if kind == "uniform" else stream.exponential(150, num)
    return [int(min(max(length, 8), 1024)) for length in drawn]


def seconds_of(model: Qwen3Model, batches: list[Batch]) -> float:
    began = time.process_time()
    with rows_apart(model):
        for batch in batches:
            positions = {} if batch.positions_BT is None else {"position_ids": batch.positions_BT}
            passed = model(input_ids=batch.input_ids_BT, use_cache=False, **positions)
            passed.last_hidden_state[batch.loss_mask_BT].square().sum().backward()
    return time.process_time() - began


def main(dim: int = 256, layers: int = 4, num: int = 32, rounds: int = 3) -> None:
    """Measure and print a table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=dim // 64,
        num_key_value_heads=dim // 128,
        head_dim=64,
        intermediate_size=3 * dim,
    )
    model = Qwen3Model(config)
    table = Table("lengths", "tokens a batch", "padded inputs", "inputs", "packed over padded")
    for kind in ("uniform", "exponential"):
        rollouts = [rollout_of(length) for length in lengths_of(kind, num)]
        for tokens in (4096, 16384):
            both = [
                [
                    make_batch([rollouts[i] for i in places], is_packed=is_packed)
                    for places in batch_places(rollouts, tokens, is_packed=is_packed)
                ]
                for is_packed in (False, True)
            ]
            times = [[seconds_of(model, batches) for batches in both] for _ in range(rounds)]
            ratio = statistics.median(packed / padded for padded, packed in times)
            sizes = [f"{sum(each.input_ids_BT.numel() for each in batches):,}" for batches in both]
            table.add_row(kind, f"{tokens:,}", *sizes, f"{ratio:.3f}")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
