"""A teacher behind a URL beside the same teacher in the process: bytes a token, the error of the
KL, and seconds of a step.

The server is `potstill serve` in a process of its own. Steps are those of `potstill train` on
student prefixes, in turns: a few steps of a run with the teacher here, a few with it there.
Rollouts are the same, so the ratio of the medians is that of the throughputs. The KLs are means
over the loss tokens of the first step; errors are differences of these means.
"""

import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table

import potstill
from potstill.config import Recipe
from potstill.models.language_model import load_config, load_tokenizer
from potstill.wire import Unavailable, request

PORT = 8917
TOP = 64


class Pair(NamedTuple):
    """A student and a teacher by their names, and the settings of a step."""

    name: str
    student: str
    teacher: str
    prompts: int
    window: int


def make_pair(folder: Path) -> Pair:
    """Random models of a larger kind, with the shipped tokenizer."""
    sizes = {"student": (256, 4), "teacher": (768, 12)}
    tokenizer = load_tokenizer("potstill:teacher")
    for name, (width, depth) in sizes.items():
        config = transformers.Qwen3Config(
            vocab_size=8192,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            head_dim=64,
            eos_token_id=tokenizer.eos_token_id,
            max_position_embeddings=2048,
        )
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return Pair("random, 768 x 12", str(folder / "student"), str(folder / "teacher"), 8, 64)


def recipe_of(pair: Pair, out: Path, steps: int, **teacher: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "out": str(out),
            "student": {"model": pair.student},
            "teacher": {"model": pair.teacher, **teacher},
            "data": {"source": "multiplication", "num_prompts": 512},
            "objective": {"prefix": "student", "kl": "mixed"},
            "window": {"tokens": pair.window},
            "validation": {"num_prompts": 0},
            "train": {
                "steps": steps,
                "prompts_per_step": pair.prompts,
                "tokens_per_batch": pair.prompts * pair.window // 4,
                "lr": 1e-6,
                "checkpoint_every": steps,
            },
        }
    )


def served(teacher: str, url: str) -> subprocess.Popen:
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "potstill", "serve", teacher, "--port", port]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        try:
            request(url, "/health", seconds=2)
            return process
        except Unavailable:
            if process.poll() is not None:
                raise SystemExit("the server ended before it served") from None
            time.sleep(0.2)


def measure(pair: Pair, folder: Path, turns: int, steps: int) -> dict[str, Any]:
    """Seconds of a step, here and there, and both KLs of the first step by the type on the wire."""
    url = f"http://127.0.0.1:{PORT}"
    process = served(pair.teacher, url)
    kinds: dict[str, dict[str, str]] = {"here": {}, "float32": {"url": url}}
    kinds["bfloat16"] = {"url": url, "wire_dtype": "bfloat16"}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    first: dict[str, dict[str, Any]] = {}
    try:
        for turn in range(turns):
            for name, teacher in kinds.items():
                out = folder / f"{name}-{turn}"
                rows: list[Any] = []
                recipe = recipe_of(pair, out, steps, **teacher)
                potstill.train(recipe, on_step=rows.append, quiet=True)
                # The first step loads what is used for the first time.
                seconds[name] += [row["seconds"] for row in rows[1:]]
                first.setdefault(name, rows[0])
    finally:
        process.kill()
        process.wait()
    found: dict[str, Any] = {"seconds": {k: statistics.median(v) for k, v in seconds.items()}}
    for kl in ("forward_kl", "reverse_kl"):
        found[kl] = {name: row[kl] for name, row in first.items()}
    return found


def main(
    quick: Annotated[bool, tyro.conf.arg(help="The shipped pair alone, few steps.")] = False,
    out: Annotated[Path | None, tyro.conf.arg(help="JSON file for the numbers.")] = None,
) -> None:
    """Print a table a pair."""
    console = Console()
    console.print(
        f"{datetime.date.today()}, {platform.machine()}, torch {version('torch')}, "
        f"{torch.get_num_threads()} threads"
    )
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pairs = [Pair("shipped", "potstill:base", "potstill:teacher", 48, 64)]
        pairs += [] if quick else [make_pair(folder)]
        for number, pair in enumerate(pairs):
            config = load_config(pair.teacher)
            width, vocab = config.hidden_size, config.vocab_size
            found = measure(pair, folder / str(number), 1 if quick else 3, 4 if quick else 8)
            results[pair.name] = found
            table = Table(title=f"{pair.name}: V = {vocab:,}, E = {width}", title_justify="left")
            for column in ("teacher", "bytes a token", "KL forward", "KL reverse", "s a step"):
                table.add_column(column, justify="left" if column == "teacher" else "right")
            table.add_column("throughput", justify="right")
            sizes = {"here": 0, "float32": 4 * width, "bfloat16": 2 * width}
            for name, size in sizes.items():
                errors = [
                    f"{found[kl][name] - found[kl]['here']:+.1e}"
                    for kl in ("forward_kl", "reverse_kl")
                ]
                ratio = found["seconds"]["here"] / found["seconds"][name]
                cells = (f"{size:,}", *errors, f"{found['seconds'][name]:.3f}", f"{ratio:.2f}")
                table.add_row(name, *cells)
            console.print(table)
            console.print(f"whole logits: {4 * vocab:,} bytes a token; top {TOP}: {8 * TOP:,}")
    if out is not None:
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
