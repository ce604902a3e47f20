"""The command line: a thin face of the library, with one function for each command.

A command's options and help text are its signature and docstring; its first parameter holds the overrides that
`split_overrides` found. Heavy imports stay inside the commands, so that `--help` answers at once. Bad input prints one
line and exits with 2.
"""

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional
from tyro.extras import SubcommandApp

from potstill.cli import cache_commands
from potstill.cli.overrides import refuse_overrides, split_overrides, template_arguments
from potstill.cli.usage import UsageError, add_commands, parse
from potstill.config import (
    METHODS,
    Evaluation,
    GrpoFields,
    GrpoRecipe,
    Recipe,
    RecipeError,
    RecipeFields,
    Sampling,
    load_grpo_recipe,
    load_recipe,
    to_toml,
)
from potstill.console.boundary import boundary
from potstill.console.printable import say

# Shown as the defaults in help texts.
MULTIPLICATION = Evaluation(source="multiplication")
EXACT_SAMPLING = Sampling()
RECIPE_FIELDS = RecipeFields()
GRPO_FIELDS = GrpoFields()

DESCRIPTION = "Distil language models: who writes the prefixes, and which KL is minimised there."


def main(argv: list[str] | None = None) -> None:
    """Run one command; exits with 2 and one line on standard error for bad input."""
    with boundary():
        run(argv)


def run(argv: list[str] | None = None) -> None:
    """The same without the boundary, for those who have one."""
    arguments, overrides = split_overrides(list(sys.argv[1:] if argv is None else argv))
    if arguments[:1] in (["--version"], ["-V"]):
        say(f"potstill {importlib.metadata.version('potstill')}")
        return
    parse(_app(overrides), arguments, DESCRIPTION)()


def _app(overrides: dict[str, Any]) -> SubcommandApp:
    """All commands, in the order of the help text."""
    cache = SubcommandApp()
    add_commands(cache, overrides, cache_commands.build, cache_commands.info, cache_commands.verify)
    app = SubcommandApp()
    add_commands(app, overrides, train, grpo, evaluate, sample)
    app.command(cache, name="cache", help="Build, look at and check teacher caches.")
    add_commands(app, overrides, methods, verify, report, study)
    return app


def train(
    overrides: dict[str, Any],
    recipe: Positional[str],
    method: Literal["sft", "dagger", "offline-rl", "opd"] | None = None,
    dry_run: bool = False,
    extend_to: int | None = None,
    fields: Annotated[RecipeFields, tyro.conf.arg(name="")] = RECIPE_FIELDS,
) -> None:
    """Train a recipe, or resume it in its run folder. Every field below overrides the recipe's.

    Args:
        recipe: A TOML file, or the name of a shipped recipe such as demo.
        method: A corner of the grid; sets objective.prefix and objective.kl.
        dry_run: Print the resolved recipe and stop.
        extend_to: Go on with the run in the folder, finished or not, to this step. The steps that are done keep
            what they were; what follows a schedule over all steps goes on as in a run of so many, so that a cosine
            learning rate that has decayed rises again.
    """
    # `fields` is there for the help text; what was given is in `overrides`, and the schema alone judges it.
    resolved = load_recipe(recipe, _with_method(method, overrides))
    if dry_run:
        _print_recipe(resolved)
        return
    from potstill.cli.show import print_results
    from potstill.models import distributed
    from potstill.training.loop import train

    world = distributed.start()
    result = train(resolved, extend_to=extend_to)
    distributed.stop()
    if world.is_main:
        say(f"{resolved.method}: the student is in {result.folder / 'model'}")
        print_results([result.folder])


def grpo(
    overrides: dict[str, Any],
    recipe: Positional[str],
    dry_run: bool = False,
    fields: Annotated[GrpoFields, tyro.conf.arg(name="")] = GRPO_FIELDS,
) -> None:
    """Train a run or model by reinforcement learning, or resume that. Every field below overrides the recipe's.

    Args:
        recipe: A TOML file, or the name of a shipped recipe such as grpo.
        dry_run: Print the resolved recipe and stop.
    """
    resolved = load_grpo_recipe(recipe, overrides)
    if dry_run:
        _print_recipe(resolved)
        return
    from potstill.cli.show import print_results
    from potstill.grpo.run import run_grpo

    folder = run_grpo(resolved)
    say(f"GRPO from {resolved.model}: the model is in {folder / 'model'}")
    print_results([folder])


def evaluate(
    overrides: dict[str, Any],
    models: Positional[tuple[str, ...]],
    settings: OmitArgPrefixes[Evaluation] = MULTIPLICATION,
    out: Path | None = None,
    responses: Path | None = None,
) -> None:
    """Evaluate models or finished runs on held-out problems; compare each with the first.

    Args:
        models: Run folders, model folders, hub ids, or potstill:teacher and potstill:base.
        out: Also write the results to this JSON file (one model). A run's results are added to its folder.
        responses: Folder for the responses of models that are no runs; an evaluation that was stopped goes on from
            them. Those of a run are in its own folder.
    """
    from potstill.cli.show import evaluate_and_store

    settings = settings.model_copy(update=template_arguments(overrides))
    if not models:
        raise RecipeError("nothing to evaluate; give run folders, model folders, or potstill:base")
    if out is not None and len(models) > 1:
        raise RecipeError(
            f"--out takes the results of one model, and {len(models)} are given; leave it out, or evaluate each alone"
        )
    evaluate_and_store(models, settings, out, responses)


def sample(
    overrides: dict[str, Any],
    model: Positional[str],
    prompt: tuple[str, ...] = (),
    source: str = "multiplication",
    template: Literal["chat", "raw"] | None = None,
    num: int = 4,
    max_tokens: int = 128,
    seed: int = 0,
    sampling: OmitArgPrefixes[Sampling] = EXACT_SAMPLING,
) -> None:
    """Show a few responses of a model.

    Args:
        model: A run folder, a model folder, a hub id, or potstill:teacher or potstill:base.
        prompt: Prompts; held-out problems of the source when there are none.
        source: The task to take problems from.
        template: Render the prompts with the chat template, or take them as they are. What it reads beside the
            messages is said by --template-arguments.NAME VALUE.
        num: How many problems, or responses to each given prompt.
        max_tokens: Completion length cap.
        seed: Seed of the problems and of sampling.
    """
    from potstill.cli.show import show_responses

    told = template_arguments(overrides)
    for name, value, least in (("num", num, 1), ("max-tokens", max_tokens, 1), ("seed", seed, 0)):
        if value < least:
            raise UsageError(f"--{name} is {value}; it must be at least {least}")
    show_responses(model, prompt, source, template, num, max_tokens, seed, sampling, **told)


def methods(overrides: dict[str, Any]) -> None:
    """Print the grid of methods."""
    refuse_overrides(overrides)
    _print_grid()


def verify(
    overrides: dict[str, Any],
    model: str | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Check the theory: each identity of docs/theory.md as a number, in seconds.

    Exits with 1 if one is broken.

    Args:
        model: Check a real model instead, as far as that needs no enumeration: a folder, hub id or run folder.
        json_file: Also write the rows to this JSON file.
    """
    from potstill.cli.show import print_checks
    from potstill.theory.identities import identities
    from potstill.theory.real_model import check_model

    refuse_overrides(overrides)
    if model is None:
        checks = list(identities())
    else:
        from potstill.models.probe import ready

        checks = check_model(ready(model))
    if not print_checks(checks, json_file):
        sys.exit(1)


def report(overrides: dict[str, Any], paths: Positional[tuple[Path, ...]], out: Path = Path("report.html")) -> None:
    """Write one HTML file that compares runs, and `results.json` with its numbers beside it; print a summary.

    Args:
        paths: Run folders, study folders, and JSON files that `potstill evaluate --out` wrote.
        out: The file to write.
    """
    from potstill.report.page import write_report
    from potstill.report.terminal import print_summary

    refuse_overrides(overrides)
    page = write_report(paths, out)
    print_summary(page)
    say(f"wrote {page}")


def study(
    overrides: dict[str, Any],
    study: Positional[str],
    jobs: int | None = None,
    dry_run: bool = False,
    report: bool = True,
) -> None:
    """Run a grid of distillations, each once, and write one report of all.

    Prints the plan with estimated time and disk first. The same command goes on after a kill; what crashed is done
    again. Exits with 1 if anything crashed.

    Args:
        study: A TOML file, or the name of a shipped study such as quick.
        jobs: Processes side by side; by default one a core, or one where there is a GPU.
        dry_run: Print the plan, run by run, and stop.
        report: Write report.html into the study's folder at the end.
    """
    from potstill.study.file import read_study_file
    from potstill.study.run import run_study

    refuse_overrides(overrides)
    found = read_study_file(study)
    is_whole = run_study(found, main, jobs, dry_run)
    if report and not dry_run:
        from potstill.report.page import write_report
        from potstill.report.terminal import print_summary

        page = write_report([found.out], found.out / "report.html")
        print_summary(page)
        say(f"Open {page} for grids, claims, curves and rollouts.")
    if not is_whole:
        sys.exit(1)


def _with_method(method: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides, and those that a method stands for."""
    if method is None:
        return overrides
    corner = {"objective.prefix": METHODS[method].prefix, "objective.kl": METHODS[method].kl}
    if clash := sorted(corner.keys() & overrides.keys()):
        raise RecipeError(f"--method {method} and --{clash[0]} both set {clash[0]}; give one of them")
    return corner | overrides


def _print_recipe(recipe: Recipe | GrpoRecipe) -> None:
    say(*recipe.notes, error=True)
    say(to_toml(recipe.resolved()).rstrip())


def _print_grid() -> None:
    from rich.console import Console
    from rich.table import Table

    grid = Table(title="who writes the prefixes, and which KL is minimised there", show_lines=True)
    for name in ("", "forward KL(teacher ‖ student)", "reverse KL(student ‖ teacher)"):
        grid.add_column(name)
    cells = {
        (method.prefix, method.kl): f"[bold]{method.name}[/] (--method {key})\n{method.advice}\nTRL: {method.trl}"
        for key, method in METHODS.items()
    }
    for prefix in ("teacher", "student"):
        grid.add_row(f"{prefix} prefix", cells[prefix, "forward"], cells[prefix, "reverse"])
    Console().print(grid)
    say(
        'Between forward and reverse: objective.kl = "mixed" with objective.forward_weight, their exact linear mixture '
        "(not in TRL).\n"
        'objective.kl = "jsd" with jsd_weight is TRL\'s beta strictly between 0 and 1. TRL 1.16: DistillationConfig is '
        "stable, GKDConfig is in trl.experimental.gkd."
    )
