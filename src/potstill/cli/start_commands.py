"""The commands before a run: `potstill doctor` and `init`, one function for each."""

import sys
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from potstill.cli.recipe_commands import with_method
from potstill.config import load_recipe


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
