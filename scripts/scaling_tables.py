"""Write the tables of docs/scaling.md: plans of two pairs of models on many devices, by the
functions of `potstill plan`.

`python scripts/scaling_tables.py` replaces the text between a line `<!-- planned: NAME -->` and the
next `<!-- end -->`. A test compares the page with what this would write.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from potstill.config import CacheOptions, Recipe, make_recipe
from potstill.planning.devices import DEVICES
from potstill.planning.disk import bytes_a_token
from potstill.planning.memory import Outlines, TeacherPlace
from potstill.planning.plan import Circumstances, Needs, needs_of, pair_of
from potstill.planning.seconds import decoding_seconds
from potstill.planning.units import shown_bytes, shown_seconds
from potstill.planning.work import with_field

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"
SHAPES = ROOT / "examples" / "shapes"
DEVICE = DEVICES["H100-SXM"]
PROMPT_TOKENS, RESPONSE_TOKENS, WINDOW = 256, 2000, 4096
BILLION = 1e9
# Seconds of a layer and token at least, in an engine that replays its kernels.
ENGINE_LAYER = 0.02e-3
BLOCK = re.compile(
    r"(?<=<!-- planned: )(?P<name>[a-z0-9 ]+)(?: -->\n)(?P<text>.*?)(?=<!-- end -->)", re.DOTALL
)


class Size(NamedTuple):
    """A row: devices, prompts of a step, padded tokens of a batch, rows decoded together, and where
    the teacher is; "sharded" is a live one whose weights are spread."""

    num_devices: int
    prompts_per_step: int
    tokens_per_batch: int
    rows: int
    teacher: str = "live"
    recomputes: bool = False

    @property
    def place(self) -> TeacherPlace:
        return "live" if self.teacher == "sharded" else self.teacher  # pyright: ignore


SMALL = (
    Size(1, 64, 16384, 32),
    Size(8, 512, 16384, 32),
    Size(64, 4096, 16384, 32),
    Size(64, 4096, 16384, 32, "remote"),
)
LARGE = (
    Size(64, 1024, 4352, 16, "sharded", True),
    Size(64, 1024, 4352, 16, "remote"),
    Size(64, 1024, 4352, 16, "remote", True),
    Size(128, 2048, 4352, 16, "remote", True),
    Size(512, 8192, 4352, 16, "sharded", True),
    Size(512, 8192, 4352, 16, "remote", True),
)


def recipe_of(student: str, teacher: str, size: Size, prefix: str = "student") -> Recipe:
    fields: dict[str, Any] = {
        "student": {"model": str(SHAPES / student)},
        "teacher": {"model": str(SHAPES / teacher), "dtype": "bfloat16"},
        "objective": {"prefix": prefix, "kl": "reverse"},
        "window": {"tokens": WINDOW},
        "train": {
            "prompts_per_step": size.prompts_per_step,
            "tokens_per_batch": size.tokens_per_batch,
            "activation_checkpointing": size.recomputes,
        },
        "sampling": {"batch_size": size.rows},
    }
    if size.teacher == "sharded":
        fields["teacher"]["placement"] = "sharded"
    if size.teacher == "remote":
        fields["teacher"] |= {"url": "http://teacher:8000", "wire_dtype": "bfloat16"}
    return make_recipe(fields)


def planned(pair: Outlines, recipe: Recipe, size: Size) -> Needs:
    asked = Circumstances(
        device=DEVICE,
        num_devices=size.num_devices,
        prompt_tokens=PROMPT_TOKENS,
        response_tokens=RESPONSE_TOKENS,
    )
    return needs_of(recipe, pair, size.place, asked)


def engine_seconds(pair: Outlines, recipe: Recipe, needs: Needs) -> float:
    """Seconds of the rollouts in an engine that takes all rows at once, in bfloat16."""
    rows = recipe.sampling.model_copy(update={"batch_size": needs.work.num_rollouts})
    other = recipe.model_copy(update={"sampling": rows})
    device = dataclasses.replace(DEVICE, a_layer=ENGINE_LAYER)
    return decoding_seconds(other, pair.student.sizes, needs.work, device, "bfloat16")


def sizes_table(student: str, teacher: str, sizes: Sequence[Size]) -> str:
    """A row for each number of devices: memory, and seconds of a step by part."""
    pair = pair_of(recipe_of(student, teacher, sizes[0]))
    names = (
        *("devices", "prompts a step", "teacher", "memory of a device", "without the copy"),
        *("rollouts", "in an engine"),
        *("teacher", "student", "heads", "sending", "a step", "with an engine"),
        "a billion prompts",
    )
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for size in sizes:
        recipe = recipe_of(student, teacher, size)
        needs = planned(pair, recipe, size)
        by_part, engine = needs.seconds, engine_seconds(pair, recipe, needs)
        step = needs.step_seconds - by_part["rollouts"] + engine
        fits = "" if needs.fits(DEVICE) else ", **too much**"
        memory = needs.memory
        copy = memory.kept.get("decoding copy", 0)
        cells = (
            str(size.num_devices),
            f"{size.prompts_per_step:,}",
            size.teacher + (", again" if size.recomputes else ""),
            f"{shown_bytes(memory.peak)} ({memory.fullest}){fits}",
            shown_bytes(memory.peak - copy),
            shown_seconds(by_part["rollouts"]),
            shown_seconds(engine),
            shown_seconds(by_part["teacher"]),
            shown_seconds(by_part["student forward"] + by_part["student backward"]),
            shown_seconds(by_part["heads"]),
            shown_seconds(by_part["sending"]),
            shown_seconds(needs.step_seconds),
            shown_seconds(step),
            shown_seconds(step * BILLION / size.prompts_per_step),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def cells_table() -> str:
    """The small pair on eight devices: whose prefixes, and where the teacher is."""
    size = Size(8, 512, 16384, 32)
    pair = pair_of(recipe_of("qwen3-0.6b", "qwen3-8b", size))
    names = ("prefixes", "teacher", "memory of a device", "rollouts", "a step", "received a step")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    places: tuple[tuple[str, TeacherPlace], ...] = (
        *(("teacher", "live"), ("teacher", "cached"), ("teacher", "remote")),
        *(("student", "live"), ("student", "remote")),
    )
    for prefix, place in places:
        recipe = recipe_of("qwen3-0.6b", "qwen3-8b", size, prefix)
        recipe = with_field(recipe, "teacher.wire_dtype", "bfloat16")
        needs = planned(pair, recipe, size._replace(teacher=place))
        cells = (
            prefix,
            place,
            shown_bytes(needs.memory.peak),
            shown_seconds(needs.seconds["rollouts"]),
            shown_seconds(needs.step_seconds),
            shown_bytes(needs.traffic.total),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def caches_table() -> str:
    """Disk that a cache of a billion responses takes, by what it keeps."""
    names = ("teacher", "what is kept", "bytes a token", "a million responses", "a billion")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for name in ("qwen3-8b", "qwen3-235b-a22b"):
        size = Size(1, 64, 16384, 32)
        teacher = pair_of(recipe_of("qwen3-0.6b", name, size)).teacher
        assert teacher is not None
        for options, kept in (
            (CacheOptions(), "hidden states, bfloat16"),
            (CacheOptions(dtype="int8"), "hidden states, int8"),
            (CacheOptions(payload="topk"), "the 64 likeliest"),
        ):
            token = bytes_a_token(options, teacher.sizes, 64)
            held = [shown_bytes(token * RESPONSE_TOKENS * num) for num in (1e6, 1e9)]
            lines.append(f"| {name} | {kept} | {token:,} | {held[0]} | {held[1]} |")
    return "\n".join([*lines, ""])


PLANNED: dict[str, Callable[[], str]] = {
    "small": lambda: sizes_table("qwen3-0.6b", "qwen3-8b", SMALL),
    "large": lambda: sizes_table("qwen3-8b", "qwen3-235b-a22b", LARGE),
    "cells": cells_table,
    "caches": caches_table,
}


def rewritten(text: str) -> str:
    """A page with every planned table made again."""
    return BLOCK.sub(lambda block: f"{block['name']} -->\n{PLANNED[block['name']]()}", text)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
