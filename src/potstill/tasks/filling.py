"""Prompts filled in from the columns of a row: `Question: {question}`.

Braces hold a column's name and nothing else: no attribute, no index, no format. `{{` and `}}` are
braces of the text.
"""

import string
from typing import NamedTuple

from potstill.tasks.tables import DataRow
from potstill.types import DataError

NOT_IN_NAMES = ".[]!:{}"


class Part(NamedTuple):
    """A piece of a template: a text, and the column whose value follows it, if one does."""

    text: str
    column: str | None


def parts_of(template: str) -> tuple[Part, ...]:
    """A template in pieces. Raises ValueError where its braces hold more than names of columns."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"its braces do not match ({error}); write a column as {{name}}, and a brace of the "
            "text as {{ or }}"
        ) from None
    parts = []
    for text, column, spec, conversion in parsed:
        if column == "" or spec or conversion or set(column or "") & set(NOT_IN_NAMES):
            shown = f"{column}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
            raise ValueError(
                f"{{{shown}}} is no name of a column; write {{name}}, without "
                "attributes, indices and formats, and a brace of the text as {{ or }}"
            )
        parts.append(Part(text, column))
    if not any(part.column for part in parts):
        raise ValueError("it names no column, so that all prompts were one; write {name}")
    return tuple(parts)


def columns_of(template: str) -> list[str]:
    """The columns that a template names, each once."""
    return list(dict.fromkeys(part.column for part in parts_of(template) if part.column))


def filled(template: str, row: DataRow, field: str) -> str:
    """The template of a recipe's field with a row's values. Raises DataError that names the row."""
    for column in columns_of(template):
        if column not in row.names:
            raise DataError(
                f"{row.where} has no column {column!r}, which {field} names, only "
                f"{', '.join(sorted(row.names))}"
            )
        if column not in row.values:
            raise DataError(
                f"{row.where}: {column!r}, which {field} names, is empty; fill it or remove the row"
            )
        if not isinstance(row.values[column], str | int | float):
            raise DataError(
                f"{row.where}: {column!r}, which {field} names, is "
                f"{str(row.values[column])[:80]}; it must be a text or a number (chats are prompts "
                f"as they are: {field.replace('_template', '_column')} names their column)"
            )
    texts = [
        part.text + ("" if part.column is None else str(row.values[part.column]))
        for part in parts_of(template)
    ]
    return "".join(texts)
