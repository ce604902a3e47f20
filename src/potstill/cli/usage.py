"""From arguments to a command that is ready to run, or one line on what is wrong with them.

tyro parses and says what is wrong in a box of many lines; of that the first sentence and its advice
are kept.
"""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from potstill.console.names import nearest
from potstill.console.printable import one_line


class UsageError(ValueError):
    """Arguments that no command takes; the message is one line and says what to do."""


# Names of commands in other programs.
MEANT = {
    "check": "doctor",
    "eval": "evaluate",
    "generate": "sample",
    "grpo": "train",
    "list": "runs",
    "ls": "runs",
    "new": "init",
    "run": "train",
}


def no_command(group: str, words: Sequence[str], known: Sequence[str]) -> UsageError:
    """The line for a command that is missing or misspelt, where the commands of a group (or all)
    are known."""
    program = f"potstill {group}".strip()
    if not words:
        return UsageError(f"{program} needs a command: {', '.join(known)}; see {program} --help")
    if words[0].startswith("-"):
        return UsageError(f"{words[0]!r} is no option of {program}; see {program} --help")
    meant = MEANT.get(words[0])
    near = meant if meant in known else nearest(words[0], known)
    return UsageError(
        f"{words[0]!r} is no command of {program}; the nearest is {near}; see {program} --help"
    )


def _postponed(
    function: Callable[..., None], overrides: dict[str, Any]
) -> Callable[..., Callable[[], None]]:
    """A function with the signature of a command that returns the call instead of making it."""
    told = functools.partial(function, overrides)

    def later(*arguments: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(told, *arguments, **options)

    postponed = functools.update_wrapper(later, function)
    # tyro takes the signature from here, and `overrides` is no option.
    postponed.__wrapped__ = told
    return postponed


def parse(
    command: str, function: Callable[..., None], overrides: dict[str, Any], arguments: Sequence[str]
) -> Callable[[], None]:
    """The call that the arguments ask a command's function for. Raises UsageError; SystemExit after
    a help text."""
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                _postponed(function, overrides), prog=f"potstill {command}", args=arguments
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_sentence(box.getvalue())) from None


def _sentence(box: str) -> str:
    """The text of a box without its frame: the message, the nearest option, and where the help
    is."""
    lines = [re.sub(r"^[│ ]+|[│ ]+$", "", line) for line in box.splitlines()]
    if "╭" not in box:
        # Without frames, as for a terminal of ASCII alone, the first line is the title.
        lines = lines[1:]
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r"[╭╰─╮╯ ].*[─╮╯]", line) or set(line) <= set("─-"):
            parts.append([])
        else:
            parts[-1].append(line)
    texts = [one_line(" ".join(part)) for part in parts if any(part)]
    message = texts[0].removeprefix("Error parsing ").rstrip(".") if texts else "bad arguments"
    message = re.sub(
        r"invalid literal for int\(\) with base 10: (.*)", r"\1 is no whole number", message
    )
    message = re.sub(
        r"no type matching (\S+) could be instantiated from \[(.*)\]", r"\2 is not \1", message
    )
    message = re.sub(r"\. Expected one of \((.*)\)", _choices, message)
    told = [message[0].lower() + message[1:]]
    for text in texts[1:]:
        if flag := re.match(r"Perhaps you meant: (--\S+)", text):
            told.append(f"the nearest is {flag[1]}")
        elif help_text := re.search(r"potstill( \w+)* --help", text):
            told.append(f"see {help_text[0]}")
    return "; ".join(told)


def _choices(expected: re.Match[str]) -> str:
    """The choices by name: tyro lists them in the order of a set, which is another in each process,
    and None among them."""
    names = sorted(set(re.findall(r"'([^']*)'", expected[1])) - {"None"})
    return f"; choose one of {', '.join(names)}"
