"""The fields of a recipe in words, for help texts and documentation: type, bounds, default,
meaning, place."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from potstill.config.roles import Place
from potstill.config.section import leaves
from potstill.config.toml import toml_value

BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
WORDS = {int: "integer", float: "number", bool: "boolean", str: "text", Path: "path"}


@dataclass(frozen=True, kw_only=True)
class DescribedField:
    """A field by its dotted name.

    `kind` is its type and its bounds, with choices in backticks; `default` is TOML, or None where
    the field is absent by default or follows from others.
    """

    name: str
    kind: str
    default: str | None
    meaning: str
    is_first: bool

    @property
    def section(self) -> str:
        """The section's name; empty at the top level."""
        return self.name.rpartition(".")[0]


def described(schema: type[BaseModel]) -> list[DescribedField]:
    """All fields of a schema, in its order. Raises ValueError for one without a docstring."""
    fields = []
    for name, field, _ in leaves(schema):
        if not field.description:
            raise ValueError(f"the recipe field {name} has no docstring; write one below it")
        fields.append(
            DescribedField(
                name=name,
                kind=_kind(field),
                default=_default(field.default),
                meaning=" ".join(field.description.split()),
                is_first=Place.FIRST in field.metadata,
            )
        )
    return fields


def about_section(schema: type[BaseModel], section: str) -> str:
    """The docstring of a section; empty where it has none, and for the top level."""
    kind: Any = schema
    for name in section.split(".") if section else ():
        kind = kind.model_fields[name].annotation
    return inspect.cleandoc(kind.__doc__ or "") if section else ""


def _kind(field: FieldInfo) -> str:
    limits = []
    for name, sign in BOUNDS:
        limits += [
            f"{sign} {_number(getattr(item, name))}"
            for item in field.metadata
            if hasattr(item, name)
        ]
    return ", ".join([_words_for(field.annotation), *limits])


def _number(value: float) -> str:
    """A bound as a reader wants it: whole numbers with all their digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _words_for(annotation: Any) -> str:
    """The name of a type in a recipe: choices as code, lists by their items."""
    if annotation in WORDS:
        return WORDS[annotation]
    origin = get_origin(annotation)
    inner = [
        item for item in get_args(annotation) if item is not type(None) and item is not Ellipsis
    ]
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin is Annotated:
        return _words_for(inner[0])
    if origin is dict:
        return "table"
    if origin is tuple:
        return "list of " + ", ".join(dict.fromkeys(_words_for(item) for item in inner))
    if inner:
        return " or ".join(_words_for(item) for item in inner)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    raise ValueError(f"{annotation} has no name in the recipe's documentation; add it to WORDS")


def _default(value: Any) -> str | None:
    if value is None or value is PydanticUndefined:
        return None
    return toml_value(str(value) if isinstance(value, Path) else _plain(value))


def _plain(value: Any) -> Any:
    """Tuples as the lists that TOML has."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
