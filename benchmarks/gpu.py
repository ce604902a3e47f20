"""Divergence, rollouts and a whole step on a GPU, beside what people would use instead.

Times are medians of CUDA events; peak memory is the allocator's, without the inputs. Gradient
errors are relative to float64 on a few rows. Every part ends within minutes and prints a table.
With no GPU nothing is run.
"""

import functools
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import step as whole
import torch
import tyro
from divergence import FORWARD, MIXED, Inputs, Shape, liger, make_inputs, naive, ours, step, trl
from rich.console import Console
from rich.table import Table
from rollouts import Load, measure, vllm_python

from potstill.engines.protocol import EngineError

SHAPES = (
    Shape("bfloat16", 8192, 151_936, 1024, 2560),
    Shape("bfloat16", 8192, 151_936, 4096, 4096),
)
GIB = 2**30
CHECKED_ROWS, ROUNDS = 64, 10
BLOCKS, WARPS = (1024, 2048, 4096, 8192), (4, 8, 16)
# More elements a thread spill registers.
MOST_ELEMENTS, THREADS_A_WARP = 128, 32

Loss = Callable[[Inputs], torch.Tensor]
METHODS: dict[str, Loss] = {
    "potstill, forward": ours(FORWARD, 0, "triton"),
    "potstill, mixed": ours(MIXED, 0, "triton"),
    "potstill, eager": ours(FORWARD, 0, "eager"),
    "potstill, compiled": ours(FORWARD, 0, "compiled"),
    "whole logits": naive,
    "whole logits, compiled": torch.compile(naive),
    "Liger, compiled": functools.partial(liger, compiled=True),
    "TRL": trl,
}


def on_gpu(inputs: Inputs) -> Inputs:
    trained = (True, True, False, False)
    return Inputs(
        *(
            tensor.detach().cuda().requires_grad_(needs)
            for tensor, needs in zip(inputs, trained, strict=True)
        )
    )


def milliseconds(run: Callable[[], None], rounds: int = ROUNDS) -> float:
    """The median of some rounds, after two that are not counted."""
    found = []
    for number in range(rounds + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if number > 1:
            found.append(begin.elapsed_time(end))
    return statistics.median(found)


def gradient_error(loss: Loss, inputs: Inputs) -> float:
    """The largest error of the gradient of a few rows' hidden states, over the largest entry."""
    few = Inputs(
        inputs.hidden.detach()[:CHECKED_ROWS].requires_grad_(),
        inputs.weight.detach().requires_grad_(),
        inputs.teacher_hidden[:CHECKED_ROWS],
        inputs.teacher_weight,
    )
    exact = Inputs(*(tensor.detach().double() for tensor in few))
    exact.hidden.requires_grad_()
    step(naive, exact)
    step(loss, few)
    assert few.hidden.grad is not None and exact.hidden.grad is not None
    error = (few.hidden.grad.double() - exact.hidden.grad).abs().max()
    return float(error / exact.hidden.grad.abs().max())


def divergence(shape: Shape) -> list[dict[str, Any]]:
    inputs, rows = on_gpu(make_inputs(shape)), []
    for name, loss in METHODS.items():
        row: dict[str, Any] = {"method": name}
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            row["ms"] = milliseconds(lambda loss=loss: step(loss, inputs))
            row["GiB"] = (torch.cuda.max_memory_allocated() - before) / GIB
            is_forward = name != "potstill, mixed"
            row["error"] = gradient_error(loss, inputs) if is_forward else None
        # A method that the device's memory does not hold is a result too.
        except torch.cuda.OutOfMemoryError:
            row["trouble"] = "out of memory"
        except ImportError as error:
            row["trouble"] = str(error)
        inputs.hidden.grad = inputs.weight.grad = None
        torch.cuda.empty_cache()
        rows.append(row)
    return rows


def tiles() -> list[dict[str, Any]]:
    """The mixed loss by elements of a block and warps of a program."""
    from potstill.kl import triton_tiles

    inputs, rows = on_gpu(make_inputs(SHAPES[0])), []
    kept = triton_tiles.BLOCK
    for block in BLOCKS:
        for warps in WARPS:
            if block / (warps * THREADS_A_WARP) > MOST_ELEMENTS:
                continue
            triton_tiles.BLOCK, triton_tiles.NUM_WARPS = block, warps
            triton_tiles.triton_backend.cache_clear()
            ms = milliseconds(lambda: step(METHODS["potstill, mixed"], inputs))
            rows.append({"method": f"block {block}, {warps} warps", "ms": ms})
    triton_tiles.BLOCK = kept
    return rows


def rollouts() -> list[dict[str, Any]]:
    """A random student of Qwen3-0.6B's shape, in bfloat16; vLLM where its environment is here."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    load, args = (
        Load(prompts=64, prompt_tokens=128, tokens=256),
        ("--gpu-memory-utilization", "0.4"),
    )
    try:
        return measure(model, load, vllm_python(), 1, args)
    except EngineError as error:
        # The other two are numbers without it.
        return [*measure(model, load, "", 1), {"method": "vLLM", "trouble": str(error)}]


# Qwen3's shapes.
QWEN_06B = whole.Size(width=1024, layers=28, heads=16, key_heads=8, head_width=128, between=3072)
TEACHERS = {
    "4B": whole.Size(width=2560, layers=36, heads=32, key_heads=8, head_width=128, between=9728),
    "8B": whole.Size(width=4096, layers=36, heads=32, key_heads=8, head_width=128, between=12288),
}


def whole_step(
    student: whole.Size,
    teacher: whole.Size,
    *,
    vocab_size: int = 151_936,
    window: int = 256,
    num_rollouts: int = 16,
) -> list[dict[str, Any]]:
    """Steps on policy with random weights, ours beside TRL's, each in a process of its own."""
    rows, steps = [], 4
    with tempfile.TemporaryDirectory(prefix="potstill-step-") as scratch:
        folder = Path(scratch)
        whole.in_its_own_process(whole.make_models, folder, vocab_size, student, teacher)
        for name in ("potstill", "TRL"):
            found = whole.in_its_own_process(
                whole.measure, name, folder, window, num_rollouts, steps
            )
            seconds = statistics.median(found["steps"][1:-1])
            rows.append({"method": name, "s": seconds, "peak GB": found["gigabytes"]})
    return rows


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        cells = [row.get(name) for name in columns]
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console.print(table)


def main(
    out: Annotated[Path, tyro.conf.arg(help="JSON file for the numbers.")] = Path("gpu.json"),
) -> None:
    """Print a table a part, and write all numbers with the device's name."""
    console = Console()
    if not torch.cuda.is_available():
        console.print("no GPU is here: 0 run")
        return
    found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    console.print(found["device"])
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        f"divergence, {shape}": lambda shape=shape: divergence(shape) for shape in SHAPES
    }
    parts |= {"Triton's tiles": tiles, "rollouts": rollouts}
    for name, teacher in TEACHERS.items():
        title = f"a step of 0.6B from {name}, 16 rollouts of 256 tokens"
        parts[title] = functools.partial(whole_step, QWEN_06B, teacher)
    for title, part in parts.items():
        found[title] = part()
        show(console, title, found[title])
        out.write_text(json.dumps(found, indent=1))
    console.print(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
