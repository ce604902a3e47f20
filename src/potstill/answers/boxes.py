r"""Where the answers of a response stand: `\boxed{...}`, `\fbox{...}`, and `\boxed 5` without
braces."""

import re
from typing import NamedTuple


class Box(NamedTuple):
    """Where a box's contents begin and end, and where the box ends (characters)."""

    start: int
    end: int
    after: int


_BRACES = re.compile(
    r"\\(?:f?boxed|fbox)\s*(?P<box>\{)"
    # A number, a sign, a macro, or a letter that stands alone.
    r"|\\(?:boxed|fbox)(?P<bare>\s*(?=[-+.\d(\\])|\s+(?=[a-zA-Z]\b))"
    r"|\\[{}]|[{}]"
)
# The pieces of a box without braces: braces and all else but spaces, dollars and what ends
# mathematics.
_PIECE = re.compile(r"\\[{}]|[{}]|\\[)\]]|\\.|[^\\{}]", re.DOTALL)
MAX_BARE = 200


def closed_boxes(text: str) -> list[Box]:
    """All boxes that are closed, in the order of their ends.

    One pass: an unclosed box costs nothing, however many there are, and does not hide the others.
    """
    found: list[Box] = []
    # One number for each open brace: where its box's contents begin, or -1 for a brace that is no
    # box.
    opened: list[int] = []
    for match in _BRACES.finditer(text):
        if match["box"]:
            opened.append(match.end())
        elif match["bare"] is not None:
            if (end := _bare_end(text, match.end())) > match.end():
                found.append(Box(match.end(), end, end))
        elif match[0] == "{":
            opened.append(-1)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start >= 0:
                found.append(Box(start, match.start(), match.end()))
    return found


def _bare_end(text: str, start: int) -> int:
    """Where the contents of a box without braces end: before a space, a dollar or a brace that it
    did not open."""
    depth, end = 0, start
    for match in _PIECE.finditer(text, start, start + MAX_BARE):
        piece = match[0]
        if piece in (r"\)", r"\]") or (depth == 0 and (piece in "}$" or piece.isspace())):
            break
        depth += {"{": 1, "}": -1}.get(piece, 0)
        end = match.end()
    if depth or text.startswith((r"\boxed", r"\fbox"), start):
        return start
    return start + len(text[start:end].rstrip(".,;:!?*"))


def last_box(text: str) -> str | None:
    """The contents of the closed box that begins last, or None."""
    boxes = closed_boxes(text)
    if not boxes:
        return None
    box = max(boxes)
    return text[box.start : box.end].strip()


def box_end(text: str) -> int | None:
    """Where the first closed box ends (characters), or None."""
    boxes = closed_boxes(text)
    return boxes[0].after if boxes else None
