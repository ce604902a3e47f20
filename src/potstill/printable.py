"""Text that is not ours, made safe to print: a prompt, a path or a title must not steer the terminal."""

import unicodedata

# Marks that turn the direction of what follows, or hide in it: a line would read otherwise than it is.
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def printable(text: object, keep: str = "\n\t") -> str:
    """The text with control characters, marks of direction and other invisible ones written as escapes."""
    return "".join(c if c in keep or not _is_hidden(c) else _escaped(c) for c in str(text))


def one_line(text: object) -> str:
    """Printable, with line breaks and tabs as spaces."""
    return printable(" ".join(str(text).split()), keep="")


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in HIDDEN and character not in JOINERS


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# Scripts and emoji need these two to join letters; they move nothing.
JOINERS = "\u200c\u200d"
