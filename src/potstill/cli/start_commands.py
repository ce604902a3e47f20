"""The commands before a run: `potstill doctor`, `plan` and `init`, one function for each."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from potstill.cli.overrides import refuse_overrides
from potstill.cli.recipe_commands import with_method
from potstill.cli.usage import UsageError
from potstill.config import METHODS, RecipeError, load_recipe
from potstill.console.printable import printable, say


def doctor(
    overrides: dict[str, Any],
    recipe: Positional[str],
    method: Literal["sft", "dagger", "offline-rl", "opd"] | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Examine a recipe in about a minute, on its models and prompts; it trains nothing.

    Takes the fields of a recipe as `potstill train` does. Exits with 1 if there is an error, and
    with 0 if there are warnings alone.

    Args:
        recipe: A TOML file, or the name of a shipped recipe such as demo.
        method: A corner of the grid; sets objective.prefix and objective.kl.
        as_json: Print the findings as JSON, for other programs.
    """
    resolved = load_recipe(recipe, with_method(method, overrides))
    from potstill.doctor.examine import examine
    from potstill.doctor.show import print_json, print_report, progress_line

    with progress_line() as tell:
        report = examine(resolved, tell)
    print_json(report) if as_json else print_report(report)
    if not report.is_fit:
        sys.exit(1)


def plan(
    overrides: dict[str, Any],
    recipe: Positional[str],
    method: Literal["sft", "dagger", "offline-rl", "opd"] | None = None,
    device: str = "this-machine",
    devices: int = 1,
    prompt_tokens: int = 128,
    response_tokens: int | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Say what a recipe takes, from its models' configurations alone; nothing is loaded.

    Memory, operations, time, disk and traffic by part, for the recipe and the cells of its grid,
    and what to change if it does not fit. Time is a model and no measurement.

    Args:
        recipe: A TOML file, or the name of a shipped recipe such as demo.
        method: A corner of the grid; sets objective.prefix and objective.kl.
        device: H100-SXM, H200, A100-80GB, L40S, RTX-4090, or this-machine, which is measured.
        devices: How many devices share the student.
        prompt_tokens: Tokens of the longest prompt.
        response_tokens: Tokens of a usual response; by default as many as the window has.
        as_json: Print the plan as JSON, for other programs.
    """
    counts = {
        "devices": devices,
        "prompt-tokens": prompt_tokens,
        "response-tokens": response_tokens,
    }
    for name, number in counts.items():
        if number is not None and number < 1:
            raise UsageError(f"--{name} is {number}; give 1 or more")
    resolved = load_recipe(recipe, with_method(method, overrides))
    if response_tokens is not None and response_tokens > resolved.window.tokens:
        raise UsageError(
            f"--response-tokens is {response_tokens}, more than window.tokens = "
            f"{resolved.window.tokens}; lower it or raise the window"
        )
    from potstill.planning.devices import device_of
    from potstill.planning.plan import Circumstances, make_plan_of
    from potstill.planning.show import print_as_json, print_tables

    asked = Circumstances(
        device=device_of(device),
        num_devices=devices,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
    )
    made = make_plan_of(resolved, asked)
    print_as_json(made) if as_json else print_tables(made)


def init(
    overrides: dict[str, Any],
    out: Positional[Path] = Path("my.toml"),
    student: str | None = None,
    teacher: str | None = None,
    data: str | None = None,
    method: Literal["sft", "dagger", "offline-rl", "opd"] | None = None,
    device: Literal["cpu", "gpu"] | None = None,
    column: str | None = None,
    force: bool = False,
) -> None:
    """Write a first recipe for your models and prompts, with values that fit their sizes.

    Asks on a terminal for what no flag says. Reads configurations, tokenizers and prompts, and
    checks that they fit together.

    Args:
        out: The recipe to write.
        student: Folder or hub id of the model to train.
        teacher: Folder or hub id of the model to learn from.
        data: A file of prompts (.jsonl, .json, .csv, .parquet, .txt), a hub data set, or a task.
        method: A corner of the grid, which `potstill methods` describes.
        device: Where it will be trained; by default on a GPU if there is one here.
        column: Column of the prompts; by default one called prompt, messages, question or the like.
        force: Replace the file if it is there.
    """
    refuse_overrides(overrides)
    if out.exists() and not force:
        raise RecipeError(f"{str(out)!r} is there already; choose another file, or give --force")
    given = {"student": student, "teacher": teacher, "data": data, "method": method}
    missing = [name for name, value in given.items() if value is None]
    if missing and not sys.stdin.isatty():
        flags = ", ".join(f"--{name}" for name in missing)
        raise UsageError(f"potstill init needs {flags}, as there is no terminal to ask on")
    for name in missing:
        given[name] = _asked(ASKED_FIELDS[name], tuple(METHODS) if name == "method" else ())
    import torch

    from potstill.doctor.draft import Wanted, draft, write_draft

    here: Literal["cpu", "gpu"] = "gpu" if torch.cuda.is_available() else "cpu"
    named = {name: str(value) for name, value in given.items()}
    made = draft(Wanted(**named, device=device or here, column=column), out)
    write_draft(made, out)
    say(*made.said, f"wrote {out}, for a {(device or here).upper()}")
    say(f"next: potstill doctor {out}", f"then: potstill train {out}")


ASKED_FIELDS = {
    "student": "Student to train (folder or hub id): ",
    "teacher": "Teacher to learn from (folder or hub id): ",
    "data": "Prompts (a file such as prompts.jsonl, a hub data set, or a task): ",
    "method": "Method (sft, dagger, offline-rl or opd): ",
}


def _asked(question: str, allowed: Sequence[str]) -> str:
    """A user's answer that is not empty, and one of those that are allowed if not all are."""
    while True:
        try:
            answer = input(printable(question)).strip()
        except EOFError:
            raise UsageError(
                "the answers ended; give them as flags, see potstill init --help"
            ) from None
        if answer and (not allowed or answer in allowed):
            return answer
