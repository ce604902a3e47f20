"""The commands `potstill train`, which takes a recipe, and `methods`, which says what to choose."""

from typing import Any, Literal

from tyro.conf import Positional

from potstill.cli.overrides import refuse_overrides
from potstill.config import (
    METHODS,
    NOTATION,
    WEIGHTINGS,
    Recipe,
    RecipeError,
    load_recipe,
    to_toml,
)
from potstill.console.printable import say


def train(
    overrides: dict[str, Any],
    recipe: Positional[str],
    method: Literal["sft", "dagger", "offline-rl", "opd"] | None = None,
    dry_run: bool = False,
    extend_to: int | None = None,
    push_to_hub: str | None = None,
) -> None:
    """Train a recipe, or resume it in its run folder.

    Args:
        recipe: A TOML file, or the name of a shipped recipe such as demo.
        method: A corner of the grid; sets objective.prefix and objective.kl.
        dry_run: Print the resolved recipe and stop.
        extend_to: Go on with the run in the folder, finished or not, to this step. The steps that
            are done keep what they were; what follows a schedule over all steps goes on as in a run
            of so many, so that a cosine learning rate that has decayed rises again.
        push_to_hub: Upload the finished student, as ORG/NAME, to the Hugging Face hub. The
            repository is private if it is not there yet. Nothing is uploaded by default.
    """
    resolved = load_recipe(recipe, with_method(method, overrides))
    if dry_run:
        _print_recipe(resolved)
        return
    from potstill.cli.show import print_results
    from potstill.models import distributed
    from potstill.runs.publish import push, refuse_push
    from potstill.training.loop import train

    if push_to_hub is not None:
        refuse_push(push_to_hub)
    world = distributed.start()
    result = train(resolved, extend_to=extend_to)
    distributed.stop()
    if world.is_main:
        say(f"{resolved.method}: the student is in {result.folder / 'model'}")
        print_results([result.folder])
        if push_to_hub is not None:
            say(f"pushed: {push(result.folder, push_to_hub)}")


def methods(overrides: dict[str, Any]) -> None:
    """Print the grid of methods, and the weightings of tokens by name."""
    refuse_overrides(overrides)
    _print_grid()
    _print_weightings()


def with_method(method: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides, and those that a method stands for."""
    if method is None:
        return overrides
    corner = {"objective.prefix": METHODS[method].prefix, "objective.kl": METHODS[method].kl}
    if clash := sorted(corner.keys() & overrides.keys()):
        raise RecipeError(
            f"--method {method} and --{clash[0]} both set {clash[0]}; give one of them"
        )
    return corner | overrides


def _print_recipe(recipe: Recipe) -> None:
    say(*recipe.notes, error=True)
    say(to_toml(recipe.resolved()).rstrip())


def _print_grid() -> None:
    from rich.console import Console
    from rich.table import Table

    grid = Table(title="who writes the prefixes, and which KL is minimised there", show_lines=True)
    for name in ("", "forward KL(teacher ‖ student)", "reverse KL(student ‖ teacher)"):
        grid.add_column(name)
    cells = {
        (
            method.prefix,
            method.kl,
        ): f"[bold]{method.name}[/] (--method {key})\n{method.advice}\nTRL: {method.trl}"
        for key, method in METHODS.items()
    }
    for prefix in ("teacher", "student"):
        grid.add_row(f"{prefix} prefix", cells[prefix, "forward"], cells[prefix, "reverse"])
    console = Console(highlight=False)
    console.print(grid)
    console.print(
        'Between forward and reverse: objective.kl = "mixed" with objective.forward_weight, '
        'their exact linear mixture (not in TRL). objective.kl = "jsd" with jsd_weight is '
        "TRL's beta strictly between 0 and 1. TRL 1.16: DistillationConfig is stable, GKDConfig "
        "is in trl.experimental.gkd."
    )


def _print_weightings() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    for name, weighting in WEIGHTINGS.items():
        known = [f"{each} = {argument.default:g}" for each, argument in weighting.arguments.items()]
        defaults = f" ({', '.join(known)})" if known else ""
        table.add_row(name, f"{weighting.about}{defaults}; {weighting.source}")
    console = Console(highlight=False)
    console.print("\nWhat each token counts for (objective.weights):")
    console.print(table)
    console.print(NOTATION)
