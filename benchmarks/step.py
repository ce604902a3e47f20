"""A whole training step at a vocabulary of real size, beside that of TRL's DistillationTrainer.

Random models of Qwen3's shape and one prompt after the other from the same table of them. Each run
is a process of its own; the methods take turns, and which goes first changes from turn to turn. A
step's time is the CPU time of its process, of a run's steps without the first, which allocates and
logs, and without the last, which logs and saves. Peak memory is the high-water mark of the process,
with its interpreter, libraries and both models. TRL decodes with the key-value cache (gradient
checkpointing is off, as its default turns the cache off) and in float32, as potstill does.

On a GPU (`gpu.py`) models are in bfloat16, time is that of the clock and memory the allocator's.
"""

import concurrent.futures
import contextlib
import datetime
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from potstill.config import Recipe


@dataclass(frozen=True, kw_only=True)
class Size:
    """The shape of a model: width, layers, heads of queries and of keys, and what is between."""

    width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    between: int


SMALL = Size(width=256, layers=4, heads=4, key_heads=2, head_width=64, between=768)
LARGE = Size(width=384, layers=6, heads=6, key_heads=3, head_width=64, between=1152)
LR = 1e-6
METHODS = ("TRL", "potstill", "least memory", "from a cache", "reward + KL")
PARTS = ("rollout", "teacher", "student", "optimiser", "logging", "rest")


def clock() -> float:
    """CPU seconds of this process, or where there is a GPU seconds of the clock once it is done."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    """The most memory that this process has had, or on a GPU its allocator."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def make_models(
    folder: Path, vocab_size: int, student: Size = SMALL, teacher: Size = LARGE
) -> None:
    """The folders of a student and of a teacher with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from potstill.models.character_tokenizer import build_tokenizer

    has_gpu = torch.cuda.is_available()
    for name, size in (("student", student), ("teacher", teacher)):
        config = Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.key_heads,
            head_dim=size.head_width,
            intermediate_size=size.between,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        torch.manual_seed(size.layers)
        with torch.device("cuda" if has_gpu else "cpu"):
            model: Any = Qwen3ForCausalLM(config)
        model.to(torch.bfloat16 if has_gpu else torch.float32).save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)


def make_recipe(folder: Path, name: str, window: int, num_rollouts: int, steps: int) -> Recipe:
    """The recipe of one of our methods, or of the cache that one of them reads."""
    data: dict[str, Any] = {
        "out": str(folder / f"run-{os.getpid()}"),
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher")},
        "data": {"source": "multiplication", "num_prompts": num_rollouts * steps},
        "window": {"tokens": window},
        "objective": {"prefix": "student", "kl": "reverse"},
        "train": {"steps": steps, "prompts_per_step": num_rollouts, "warmup_steps": 0, "lr": LR},
    }
    data["train"]["checkpoint_every"] = steps
    if torch.cuda.is_available():
        data["teacher"]["dtype"] = "bfloat16"
        data["train"]["tokens_per_batch"] = 16_384
    if name == "least memory":
        data["train"] |= {"loss_memory": 0, "activation_checkpointing": True}
    if name == "from a cache":
        data["objective"]["prefix"] = "teacher"
        data["teacher"]["cache"] = str(folder / "cache")
    if name == "reward + KL":
        # Groups of one, so that the rollouts are those without a reward.
        data["reward"] = {"weight": 1.0, "group_size": 1, "advantage": "score"}
    return Recipe.model_validate(data)


def make_cache(folder: Path, window: int, num_rollouts: int, steps: int) -> None:
    """What the teacher writes, and its hidden states there."""
    from potstill.cache.build import build_cache

    recipe = make_recipe(folder, "from a cache", window, num_rollouts, steps)
    live = recipe.teacher.model_copy(update={"cache": None})
    build_cache(recipe.model_copy(update={"teacher": live}), folder / "cache", quiet=True)


def of_potstill(folder: Path, name: str, window: int, num_rollouts: int, steps: int) -> dict:
    """CPU seconds of each step, and of the parts of each."""
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    import potstill
    from potstill.training.metrics import Stopwatch

    # The run's own parts, by the same clock.
    Stopwatch._now = lambda self: clock()
    marks, ends, parts = [], [clock()], []
    register_optimizer_step_pre_hook(lambda *given: marks.append(clock()))
    register_optimizer_step_post_hook(lambda *given: marks.append(clock()))

    def note(row) -> None:
        ends.append(clock())
        began, ended = marks[-2:]
        found = {
            "rollout": row["rollout_seconds"],
            "teacher": row["teacher_seconds"],
            "student": row["student_seconds"] - (ended - began),
            "optimiser": ended - began,
            "logging": row.get("samples_seconds", 0.0),
        }
        found["rest"] = ends[-1] - ends[-2] - sum(found.values())
        parts.append(found)

    recipe = make_recipe(folder, name, window, num_rollouts, steps)
    potstill.train(recipe, quiet=True, on_step=note)
    return {"steps": _differences(ends), "parts": parts}


def of_trl(folder: Path, window: int, num_rollouts: int, steps: int) -> dict:
    """Seconds of each step of TRL's trainer on the same prompts."""
    import logging
    import warnings

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    from potstill.models import distributed
    from potstill.training.setup import prepare

    for name in ("trl", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    recipe = make_recipe(folder, "potstill", window, num_rollouts, steps)
    asked = [prompt.example.prompt for prompt in prepare(recipe, distributed.start()).prompts]
    ends = [clock()]
    has_gpu = torch.cuda.is_available()

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            ends.append(clock())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = DistillationConfig(
            output_dir=str(folder / f"trl-{os.getpid()}"),
            max_steps=steps,
            per_device_train_batch_size=num_rollouts,
            gradient_accumulation_steps=1,
            max_completion_length=window,
            learning_rate=LR,
            beta=1.0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            bf16=has_gpu,
            gradient_checkpointing=False,
            use_cpu=not has_gpu,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        load = AutoModelForCausalLM.from_pretrained
        trainer = DistillationTrainer(
            model=load(folder / "student", dtype=torch.float32),
            teacher_model=load(
                folder / "teacher", dtype=torch.bfloat16 if has_gpu else torch.float32
            ),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": asked}),
            processing_class=AutoTokenizer.from_pretrained(folder / "student"),
            callbacks=[Steps()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        lengths = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    return {"steps": _differences(ends), "length": [r["completions/mean_length"] for r in lengths]}


def _differences(times: list[float]) -> list[float]:
    return [end - start for start, end in itertools.pairwise(times)]


def measure(name: str, *given: Any) -> dict:
    """Runs in a process of its own: one run of one method, its times and its peak memory."""
    from potstill.models.language_model import without_progress_bars

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(None), without_progress_bars():
        found = of_trl(*given) if name == "TRL" else of_potstill(given[0], name, *given[1:])
    return found | {"gigabytes": peak_bytes() / 1e9}


def in_its_own_process(function, *given: Any) -> Any:
    """What a function gives in a process that has done nothing before and does nothing after."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        return pool.submit(function, *given).result()


def main(
    vocab_size: int = 151_936,
    window: int = 384,
    num_rollouts: int = 2,
    steps: int = 5,
    turns: int = 3,
    methods: tuple[str, ...] = METHODS,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measure, print tables, and write the figures to a JSON file."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found: dict[str, list[dict]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="potstill-step-") as scratch:
        folder, given = Path(scratch), (window, num_rollouts, steps)
        make_models(folder, vocab_size)
        if "from a cache" in methods:
            in_its_own_process(make_cache, folder, *given)
        for turn in range(turns):
            for name in methods[:: 1 if turn % 2 == 0 else -1]:
                found[name].append(in_its_own_process(measure, name, folder, *given))
    print_tables(found)
    print(
        f"{datetime.date.today()}: Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
        + f", {platform.machine()}, one thread; vocabulary {vocab_size:,}, {num_rollouts} rollouts "
        f"of {window} tokens, {steps - 2} steps of each of {turns} runs"
    )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=2) + "\n")


def print_tables(found: dict[str, list[dict]]) -> None:
    """Medians of the steps between the first and the last, their ratios, and the parts of ours."""
    plain = {name: [s for run in runs for s in run["steps"][1:-1]] for name, runs in found.items()}
    middle = {name: statistics.median(values) for name, values in plain.items()}
    console = Console()
    table = Table("method", "CPU s a step", "from", "to", "over TRL", "with logging", "peak GB")
    for name, runs in found.items():
        logged = statistics.median(run["steps"][-1] for run in runs)
        over = f"{middle[name] / middle['TRL']:.3f}" if "TRL" in middle else "-"
        numbers = [f"{each:.2f}" for each in (middle[name], min(plain[name]), max(plain[name]))]
        peak = f"{max(run['gigabytes'] for run in runs):.2f}"
        table.add_row(name, *numbers, over, f"{logged:.2f}", peak)
    console.print(table)
    if {"potstill", "reward + KL"} <= set(middle):
        console.print(f"reward + KL over KL: {middle['reward + KL'] / middle['potstill']:.3f}")
    parts = Table("CPU s of a step", *PARTS, "logging of the last", title="potstill's parts")
    for name, runs in found.items():
        if name == "TRL":
            continue
        steps = [each for run in runs for each in run["parts"][1:-1]]
        logged = statistics.median(run["parts"][-1]["logging"] for run in runs)
        cells = [statistics.median(step[part] for step in steps) for part in PARTS] + [logged]
        parts.add_row(name, *(f"{cell:.2f}" for cell in cells))
    console.print(parts)


if __name__ == "__main__":
    tyro.cli(main)
