"""A teacher-prefix step from the cache and with a live teacher, side by side in one run.

Both train the same student from the same weights on the same number of prompts, step by step in
turns: the live one lets the teacher write and score, the cached one reads what `potstill cache
build` wrote. Seconds are wall time of the whole step (rollout, teacher, student, update).
Completions differ in their draws and not in their distribution, so what is compared is the time of
all steps over their loss tokens.

The pairs are the shipped one and, where its folders are (`python scripts/make_smollm2.py`),
SmolLM2-135M-Instruct with half of its own layers as the student.
"""

import datetime
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table

from potstill.cache.build import build_cache
from potstill.config import CacheOptions, Recipe, load_recipe
from potstill.engines.native import NativeEngine
from potstill.engines.protocol import Engine
from potstill.models import distributed
from potstill.models.language_model import find_folder
from potstill.rollouts.prefixes import Writing, write_rollouts
from potstill.training.gradients import accumulate_gradients
from potstill.training.metrics import Stopwatch
from potstill.training.setup import Setup, prepare
from potstill.types import Writer

ROOT = Path(__file__).parent.parent


class Case(NamedTuple):
    name: str
    recipe: str
    overrides: dict
    num_steps: int


CASES = (
    Case("embedded pair", "demo", {"data.num_prompts": 512}, 12),
    Case("SmolLM2-135M", "smollm2", {"data.num_prompts": 32, "evaluation": {}}, 5),
)


def main(
    threads: int = 1,
    dtype: Annotated[str, tyro.conf.arg(help="type of the stored hidden states")] = "bfloat16",
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measure, print a table, and write its rows to a JSON file."""
    torch.set_num_threads(threads)
    rows = []
    for case in CASES:
        recipe = load_recipe(
            case.recipe,
            {"objective.prefix": "teacher", "objective.kl": "forward", **case.overrides},
        )
        if find_folder(recipe.teacher.model) is None:
            print(
                f"{case.name}: left out, as {recipe.teacher.model} is not there (python "
                "scripts/make_smollm2.py)"
            )
            continue
        rows.append(measure(case, recipe, dtype))
    print_table(rows, threads)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


def measure(case: Case, recipe: Recipe, dtype: str) -> dict:
    """One row of the table."""
    folder = Path(tempfile.mkdtemp(prefix="potstill-cache-"))
    try:
        started = time.perf_counter()
        manifest = build_cache(recipe, folder, CacheOptions(dtype=dtype), quiet=True)  # pyright: ignore[reportArgumentType]
        build_seconds = time.perf_counter() - started
        spec = recipe.teacher.model_copy(update={"cache": str(folder)})
        world = distributed.start()
        setups = [
            prepare(each, world) for each in (recipe.model_copy(update={"teacher": spec}), recipe)
        ]
        optimizers = [torch.optim.AdamW(setup.student.parameters(), 1e-6) for setup in setups]
        seconds, num_tokens = [0.0, 0.0], [0, 0]
        # The first step of each is not counted: it opens files and warms caches.
        for step in range(case.num_steps + 1):
            for i, (setup, optimizer) in enumerate(zip(setups, optimizers, strict=True)):
                took, tokens = one_step(recipe, setup, optimizer, step)
                if step:
                    seconds[i] += took
                    num_tokens[i] += tokens
        cached, live = (
            1000 * each / tokens for each, tokens in zip(seconds, num_tokens, strict=True)
        )
        return {
            "pair": case.name,
            "dtype": dtype,
            "live_ms_per_token": live,
            "cached_ms_per_token": cached,
            "ratio": live / cached,
            "live_ms_per_step": 1000 * seconds[1] / case.num_steps,
            "cached_ms_per_step": 1000 * seconds[0] / case.num_steps,
            "build_s": build_seconds,
            "bytes_per_token": manifest.total("num_bytes") / manifest.total("num_tokens"),
            "logits_bytes_per_token": 2 * manifest.teacher_vocab_size,
            "kl": manifest.mean_kl,
        }
    finally:
        shutil.rmtree(folder)


def one_step(
    recipe: Recipe, setup: Setup, optimizer: torch.optim.Optimizer, step: int
) -> tuple[float, int]:
    """Seconds and loss tokens of one step."""
    num = recipe.train.prompts_per_step
    prompts = [setup.prompts[(step * num + i) % len(setup.prompts)] for i in range(num)]
    engines: dict[Writer, Engine] = {}
    if setup.teacher is not None and setup.teacher.decoder is not None:
        engines["teacher"] = NativeEngine(setup.teacher.decoder)
    writing = Writing(
        objective=recipe.objective,
        engines=engines,
        window=recipe.window.tokens,
        end_ids=setup.ends.stop_ids,
        sampling=recipe.sampling,
        rollouts_per_step=num,
        vocab_size=setup.loss.vocab_size,
        cache=setup.cache,
    )
    world = distributed.start()
    started = time.perf_counter()
    rollouts = write_rollouts(writing, prompts, [(0, step, i) for i in range(num)])
    accumulate_gradients(
        setup,
        setup.loss,
        rollouts,
        settings=recipe.train,
        step=step,
        world=world,
        clock=Stopwatch(world.device),
    )
    torch.nn.utils.clip_grad_norm_(setup.student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started, sum(len(rollout.completion_ids) for rollout in rollouts)


def print_table(rows: list[dict], threads: int) -> None:
    table = Table(title="Teacher-prefix steps: milliseconds a loss token (a step)")
    for name in ("pair", "live teacher", "from the cache", "ratio", "bytes a token"):
        table.add_column(name, justify="left" if name == "pair" else "right")
    for row in rows:
        table.add_row(
            row["pair"],
            f"{row['live_ms_per_token']:.3f} ({row['live_ms_per_step']:,.0f})",
            f"{row['cached_ms_per_token']:.3f} ({row['cached_ms_per_step']:,.0f})",
            f"{row['ratio']:.2f}",
            f"{row['bytes_per_token']:,.0f} (logits {row['logits_bytes_per_token']:,})",
        )
    console = Console()
    console.print(table)
    facts = [
        f"{datetime.date.today()}: Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, "
        f"{threads} thread{'s' * (threads > 1)}",
        *(
            f"{row['pair']}: built in {row['build_s']:.0f} s, {row['dtype']}"
            + ("" if row["kl"] is None else f", KL(teacher || stored) {row['kl']:.2g} nats a token")
            for row in rows
        ),
    ]
    console.print("\n".join(facts), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    tyro.cli(main)
