"""What `potstill plan` predicts beside what real steps take: memory, operations and seconds.

Each figure is of a process of its own, which runs a whole `train` of two or three steps. Weights
are random but for the embedded pair, so that "SmolLM2" is its architecture alone: 135 M parameters
as the teacher and half of its layers as the student.

Memory is the process's high-water mark while models are loaded and trained, minus what was
resident before, when a small run of the shipped pair had loaded all code. The C library may keep
what is freed: `freed` is with MALLOC_MMAP_THRESHOLD_ at 64 KiB, with which it gives that back, as
the plan reckons; `default` is without.

Operations are those of the second step, counted by PyTorch's FlopCounterMode on the tensors
themselves with attention written out. It counts all pairs of a query and a key; those that
causality leaves out are taken off by hand, as a run's log does not count them.

Seconds are those of a run's log, but of the processor: medians of three steps after the first,
beside those that are planned for "this-machine", which is measured in the same process just before.
"""

import ctypes
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro

from potstill.config import Recipe
from potstill.models.character_tokenizer import build_tokenizer
from potstill.models.language_model import LanguageModel, load_model
from potstill.models.probe import probe
from potstill.planning.devices import DEVICES, DeviceSpec, measured_here
from potstill.planning.memory import Outlines
from potstill.planning.plan import Circumstances, Needs, needs_of
from potstill.planning.sizes import outline_of
from potstill.runs import run_folder
from potstill.training.loop import train

Kind = Literal["freed", "default", "operations", "seconds"]
# Tokens of each prompt of the task that the steps are taken on.
PROMPT_TOKENS = 8
# The first argument of a process that measures one figure.
CHILD = "child"
FREEING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
}
LARGE_VOCABULARY = 151_936


class Case(NamedTuple):
    about: str
    window: int
    prompts: int
    tokens_per_batch: int


CASES = {
    "embedded": Case("the shipped pair", 128, 48, 2048),
    "smollm2": Case("SmolLM2-135M's shape and half of its layers, random weights", 48, 4, 1024),
    "smollm2-long": Case("the same, in two batches", 256, 8, 1024),
    "qwen3-50m": Case("Qwen3's shape, 50 M and 69 M parameters, random weights", 96, 4, 1024),
    "qwen3-50m-long": Case("the same, in two batches", 384, 4, 1024),
}


def main(
    only: str = "",
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measure the cases whose name begins with `only`, print a table, and write its rows."""
    rows = []
    for name in CASES:
        if name.startswith(only):
            kinds: tuple[Kind, ...] = ("freed", "default", "operations", "seconds")
            rows.append({"case": name} | {kind: in_a_process(name, kind) for kind in kinds})
            print_row(rows[-1])
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


def print_row(row: dict[str, Any]) -> None:
    print(f"{row['case']}: {CASES[row['case']].about}")
    for kind in ("freed", "default", "operations"):
        found = row[kind]
        unit, name = (1e9, "G") if kind == "operations" else (1e6, "MB")
        print(
            f"  {kind:10} predicted {found['predicted'] / unit:,.1f} {name}, measured "
            f"{found['measured'] / unit:,.1f} {name}: {found['predicted'] / found['measured']:.3f}",
            flush=True,
        )
    planned, taken = row["seconds"]["predicted"], row["seconds"]["measured"]
    for part, seconds in taken.items():
        print(
            f"  {part:10} predicted {planned[part]:.3f} s, measured {seconds:.3f} s: "
            f"{planned[part] / seconds:.2f}; shares {planned[part] / planned['step']:.2f}, "
            f"{seconds / taken['step']:.2f}",
            flush=True,
        )


def in_a_process(name: str, kind: Kind) -> dict[str, Any]:
    """`measure` in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (FREEING if kind == "freed" else {})
    command = [sys.executable, __file__, CHILD, name, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, {kind}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, kind: Kind) -> dict[str, Any]:
    """The predicted and the measured figure of a case."""
    with tempfile.TemporaryDirectory(prefix="potstill-plan-") as folder:
        if kind == "operations":
            return measured_operations(name, Path(folder))
        if kind == "seconds":
            return measured_seconds(name, Path(folder))
        return measured_memory(name, Path(folder))


def measured_memory(name: str, folder: Path) -> dict[str, float]:
    tiny = Case("", 8, 4, 64)
    train(recipe_of(tiny, folder / "tiny", loss_memory=0), quiet=True)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    student, teacher = models_of(name)
    recipe = recipe_of(CASES[name], folder / "run")
    train(recipe, student=student, teacher=teacher, quiet=True)
    measured = status("VmHWM") - before
    return {"predicted": predicted(recipe, student, teacher).memory.peak, "measured": measured}


def measured_operations(name: str, folder: Path) -> dict[str, float]:
    from torch.utils.flop_counter import FlopCounterMode

    student, teacher = models_of(name)
    for model in (student, teacher):
        probe(model)
        # The counter does not know the fused kind; and no row ends early, by a token that none
        # writes.
        model.model.set_attn_implementation("eager")
        model.end_ids = (0,)
    recipe = recipe_of(CASES[name], folder / "run", steps=3)
    totals = []
    with FlopCounterMode(display=False) as counter:
        train(
            recipe,
            student=student,
            teacher=teacher,
            quiet=True,
            on_step=lambda row: totals.append(counter.get_total_flops()),
        )
    needs = predicted(recipe, student, teacher)
    work, num = needs.work, needs.work.num_rollouts
    positions, prompt = work.positions, work.prompt_tokens
    # Pairs of a query and a later key, forward and twice backward.
    later, later_in_prompt = positions * (positions - 1) // 2, prompt * (prompt - 1) // 2
    per_pair = [model.flops.per_pair or 0 for model in (student, teacher)]
    not_causal = num * (later * (3 * per_pair[0] + per_pair[1]) + later_in_prompt * per_pair[0])
    measured = totals[1] - totals[0] - not_causal
    return {"predicted": sum(needs.operations.values()), "measured": measured}


def measured_seconds(name: str, folder: Path) -> dict[str, Any]:
    """Seconds by part; the student's are those of its passes, the heads and the update."""
    # Other programs do not lengthen these; there is one thread.
    time.perf_counter = time.process_time
    student, teacher = models_of(name)
    for model in (student, teacher):
        probe(model)
        model.end_ids = (0,)
    recipe = recipe_of(CASES[name], folder / "run", steps=4)
    found = predicted(recipe, student, teacher, measured_here()).seconds
    train(recipe, student=student, teacher=teacher, quiet=True)
    rows: list[Any] = run_folder.read_metrics(folder / "run")[1:]
    parts = ("rollout", "teacher", "student")
    taken = {part: statistics.median(row[f"{part}_seconds"] for row in rows) for part in parts}
    others = sum(found.values()) - found["rollouts"] - found["teacher"]
    planned = {"rollout": found["rollouts"], "teacher": found["teacher"], "student": others}
    return {
        "predicted": planned | {"step": sum(planned.values())},
        "measured": taken | {"step": sum(taken.values())},
    }


def predicted(
    recipe: Recipe,
    student: LanguageModel,
    teacher: LanguageModel,
    device: DeviceSpec | None = None,
) -> Needs:
    """What the plan says of the same recipe: by default a CPU, and responses as long as the
    window."""
    here = device or dataclasses.replace(DEVICES["H100-SXM"], is_cpu=True)
    asked = Circumstances(device=here, prompt_tokens=PROMPT_TOKENS)
    pair = Outlines(student=outline_of(student), teacher=outline_of(teacher))
    return needs_of(recipe, pair, "live", asked)


def recipe_of(case: Case, out: Path, steps: int = 2, **train_fields: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "out": str(out),
            "data": {"source": "multiplication", "num_prompts": max(64, case.prompts)},
            "window": {"tokens": case.window},
            "objective": {"prefix": "student", "kl": "reverse"},
            "train": {
                "steps": steps,
                "prompts_per_step": case.prompts,
                "tokens_per_batch": case.tokens_per_batch,
                "warmup_steps": 0,
                "lr": 1e-6,
                **train_fields,
            },
        }
    )


def models_of(name: str) -> tuple[LanguageModel, LanguageModel]:
    """The student and the teacher of a case."""
    if name == "embedded":
        return load_model("potstill:base"), load_model("potstill:teacher")
    if name.startswith("smollm2"):
        return random_model("llama", 15, SMOLLM2), random_model("llama", 30, SMOLLM2)
    student, teacher = (
        {
            "vocab_size": LARGE_VOCABULARY,
            "hidden_size": width,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_heads // 2,
            "head_dim": 64,
            "intermediate_size": inner,
        }
        for width, num_heads, inner in ((256, 8, 1024), (384, 6, 1152))
    )
    return random_model("qwen3", 9, student), random_model("qwen3", 6, teacher)


def random_model(kind: str, num_layers: int, sizes: dict[str, int]) -> LanguageModel:
    import transformers

    config = transformers.AutoConfig.for_model(
        kind,
        **sizes,
        num_hidden_layers=num_layers,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(num_layers)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return LanguageModel(model, build_tokenizer(), f"{kind}-{num_layers}")


def status(key: str) -> int:
    """Bytes of this process, as the system counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        torch.set_num_threads(1)
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))  # pyright: ignore[reportArgumentType]
    else:
        tyro.cli(main)
