"""The command line: a thin face of the library, with one function for each command.

A command's options and help text are its function's signature and docstring; its first parameter
holds the overrides that `split_overrides` found. Nothing is imported before it is known which
command is asked for, and heavy imports stay inside the commands, so that `--help` answers at once.
Bad input prints one line and exits with 2.
"""

import ast
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import potstill
from potstill.console.boundary import STOPPED_AND_SAVED, boundary, saying_when_stopped
from potstill.console.printable import say

# The module of each command, in the order of the help text. The function is named as the command's
# last word.
COMMANDS = {
    "init": "start_commands",
    "plan": "start_commands",
    "doctor": "start_commands",
    "train": "recipe_commands",
    "evaluate": "model_commands",
    "sample": "model_commands",
    "chat": "model_commands",
    "merge": "model_commands",
    "serve": "model_commands",
    "cache build": "cache_commands",
    "cache info": "cache_commands",
    "cache verify": "cache_commands",
    "methods": "recipe_commands",
    "verify": "model_commands",
    "runs": "run_commands",
    "report": "run_commands",
    "study": "run_commands",
}
# Commands that save as they go. Others that may go on say so themselves.
SAVING = ("train", "cache build", "study")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exits with 2 and one line on standard error for bad input."""
    with boundary():
        run(argv)


def run(argv: Sequence[str] | None = None) -> None:
    """The same without the boundary, for those who have one."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["--version"], ["-V"]):
        from importlib.metadata import version

        say(f"potstill {version('potstill')}")
        return
    command = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if command is None:
        _help_or_refuse(words)
        return
    saving = saying_when_stopped(lambda: STOPPED_AND_SAVED) if command in SAVING else nullcontext()
    with saving:
        _prepared(command, words[len(command.split()) :])()


def _prepared(command: str, arguments: list[str]) -> Callable[[], None]:
    """The call that is asked for. Raises UsageError, or SystemExit after a help text."""
    from potstill.cli.field_help import EXAMPLES, field_help
    from potstill.cli.overrides import split_overrides
    from potstill.cli.usage import parse

    has_fields = command in EXAMPLES
    is_all = has_fields and "--help-all" in arguments
    arguments = ["--help"] if is_all else arguments
    rest, overrides = split_overrides(command, arguments)
    module = importlib.import_module(f"potstill.cli.{COMMANDS[command]}")
    try:
        return parse(command, getattr(module, command.split()[-1]), overrides, rest)
    except SystemExit:
        if has_fields:
            say(*field_help(command, is_all))
        raise


def _help_or_refuse(words: list[str]) -> None:
    """Print the list of commands where it is asked for. Raises UsageError for words that are no
    command."""
    is_group = any(name.startswith(f"{words[0]} ") for name in COMMANDS) if words else False
    group, rest = (words[0], words[1:]) if is_group else ("", words)
    if rest[:1] in (["--help"], ["-h"]):
        say(*_help_text(group))
        return
    from potstill.cli.usage import no_command

    raise no_command(group, rest[:1], list(_known(group)))


def _known(group: str) -> dict[str, str]:
    """The commands that follow the words of a group (none: all), each with its module."""
    return {
        name.removeprefix(group).strip(): COMMANDS[name]
        for name in COMMANDS
        if name.startswith(group)
    }


def _help_text(group: str) -> list[str]:
    known = _known(group)
    width = max(map(len, known))
    program = f"potstill {group}".strip()
    lines = [f"  {name:{width}}  {_summary(known[name], name.split()[-1])}" for name in known]
    about = str(potstill.__doc__) if not group else ""
    return [
        f"usage: {program} COMMAND ...",
        "",
        *([about, ""] if about else []),
        *lines,
        "",
        _more(program),
    ]


def _more(program: str) -> str:
    return f"{program} COMMAND --help shows what a command takes."


def _summary(module: str, function: str) -> str:
    """The first line of a command's docstring, read from its source: to import it takes twenty
    times as long."""
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
    found = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function
    )
    return (ast.get_docstring(found) or "").partition("\n")[0]
