"""Text that is not ours, made safe to print: a prompt, a path or a title must not steer the
terminal.

Everything that the package prints goes through here.
"""

import sys
import unicodedata

# Controls, marks that turn the direction of what follows or hide in it, and what is no character.
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
# Scripts and emoji need these two to join letters; they move nothing.
JOINERS = "\u200c\u200d"
# Columns of what is printed, whatever the terminal: its lines may be kept in a file.
WIDTH = 100


def printable(text: object, keep: str = "\n\t") -> str:
    """The text with control characters, marks of direction and other hidden ones as escapes, as in
    JSON and TOML."""
    return "".join(c if c in keep or not _is_hidden(c) else _escaped(c) for c in str(text))


def one_line(text: object) -> str:
    """Printable, with line breaks and tabs as spaces."""
    return printable(" ".join(str(text).split()), keep="")


def error_text(error: Exception, most: int = 200) -> str:
    """An error's text on one line, its first characters; the name of its type where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def say(*lines: object, error: bool = False) -> None:
    """Print lines, on standard output or as an error or note on standard error."""
    for line in lines:
        print(printable(line), file=sys.stderr if error else sys.stdout, flush=error)


def say_on(text: str) -> None:
    """Print a piece of text at once, with nothing after it."""
    print(printable(text), end="", flush=True)


def plain(text: object, style: str = ""):
    """The text for rich: no markup, and nothing that steers the terminal."""
    from rich.text import Text

    return Text(printable(text), style=style)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in HIDDEN and character not in JOINERS


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
