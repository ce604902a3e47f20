"""Help on the fields of a recipe: those that everyone sets, with two examples, or all of them."""

import shutil
import textwrap
from collections.abc import Sequence

from pydantic import BaseModel

from potstill.cli.overrides import SCHEMAS
from potstill.config.reference import DescribedField, about_section, described

WIDEST = 100
# Examples for each command whose help shows fields: command lines, what each does, and the recipe
# that it takes where that is a user's own.
EXAMPLES = {
    "train": (
        (
            "potstill train demo --method opd --out runs/opd",
            "the shipped models on the shipped task, in minutes",
            "",
        ),
        (
            "potstill train my.toml --method sft --train.steps 200 --out runs/sft",
            "your own models and prompts, with this in my.toml:",
            'student.model = "Qwen/Qwen3-0.6B"\nteacher.model = "Qwen/Qwen3-4B"\ndata.source = '
            '"prompts.jsonl"\nwindow.tokens = 1024\n',
        ),
        (
            "potstill train rl --student.model runs/opd --out runs/rl",
            "reinforcement learning from there, with the task's scores as the reward",
            "",
        ),
    ),
}


def field_help(command: str, is_all: bool) -> list[str]:
    """Lines on the fields that a command takes; of those that not everyone sets only where all are
    asked for."""
    schema = SCHEMAS[command]
    fields = described(schema)
    first = [field for field in fields if field.is_first]
    lines = ["Fields that everyone sets, each over the recipe's:", "", *_listed(first)]
    if is_all:
        lines += _sections(schema, [field for field in fields if not field.is_first])
    lines += ["Examples:", ""]
    for words, about, recipe in EXAMPLES[command]:
        lines += [f"  {words}", f"      {about}", *textwrap.indent(recipe, " " * 8).splitlines()]
    if not is_all:
        lines += [
            "",
            f"potstill {command} --help-all also shows the other {len(fields) - len(first)} "
            "fields.",
        ]
    return lines


def _sections(schema: type[BaseModel], fields: Sequence[DescribedField]) -> list[str]:
    lines = []
    for section in dict.fromkeys(field.section for field in fields):
        about = about_section(schema, section).split("\n\n")[0]
        lines += [f"Section {section}:" if section else "Top level:", *_wrapped(about, 0), ""]
        lines += _listed([field for field in fields if field.section == section])
    return lines


def _listed(fields: Sequence[DescribedField]) -> list[str]:
    lines = []
    for field in fields:
        default = "" if field.default is None else f"; default {field.default}"
        lines += _wrapped(
            f"--{field.name.replace('_', '-')} ({field.kind.replace('`', '')}{default})", 2
        )
        lines += _wrapped(field.meaning, 6)
    return [*lines, ""]


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    return textwrap.wrap(
        text, width, initial_indent=space, subsequent_indent=space, break_on_hyphens=False
    )
