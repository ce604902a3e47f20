"""A section of a recipe: a frozen schema whose errors are one line that says what to do."""

import functools
import re
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from potstill.config.roles import Role
from potstill.config.values import items_of, shown
from potstill.console.names import nearest, nearest_field

AnySection = TypeVar("AnySection", bound=BaseModel)


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one line and says what to do."""


class Section(BaseModel):
    """Fields of one subject. `role` is that of the fields which say no other."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
    default_role: ClassVar[Role | None] = None

    def __init_subclass__(cls, role: Role | None = None, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.default_role = role or cls.default_role

    def __init__(self, /, **fields: Any) -> None:
        # From Python. Raises RecipeError with one line. A docstring here would be the help text of
        # every section that has none of its own.
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise RecipeError(_describe(error.errors()[0], type(self))) from None

    # Inner sections are validated by the outer one, which knows their place.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    @field_validator("*", mode="before")
    @classmethod
    def _typed_as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what would be read as a value of another type: true is no 1, and "2" is no 2."""
        types = _plain_types(cls, str(info.field_name))
        wanted = next((word for kind, word in TYPE_WORDS.items() if kind in types), None)
        if wanted is not None and not all(_is_typed(item, types) for item in items_of(value)):
            raise PydanticCustomError("type_as_written", f"Input should be a valid {wanted}")  # pyright: ignore
        return value


TYPE_WORDS = {int: "integer", float: "number", bool: "boolean, true or false"}


def _is_typed(value: Any, types: frozenset[type]) -> bool:
    """Whether a plain value is of one of these types; whole numbers are numbers, and others are
    judged later."""
    return (
        type(value) not in (bool, str, int)
        or type(value) in types
        or (type(value) is int and float in types)
    )


@functools.cache
def _plain_types(section: type[BaseModel], field: str) -> frozenset[type]:
    """The types that a field's annotation is made of; those of the texts and numbers that it
    lists."""

    def leaves(annotation: Any) -> list[type]:
        inner = get_args(annotation)
        if not inner:
            return [annotation if isinstance(annotation, type) else type(annotation)]
        return [leaf for each in inner for leaf in leaves(each)]

    return frozenset(leaves(section.model_fields[field].annotation))


def validate(data: dict[str, Any], where: str, schema: type[AnySection]) -> AnySection:
    """Validate plain data by a schema.

    Raises RecipeError with one line for an unknown key (with the nearest name), a wrong type, a
    value out of range, or a field that the chosen mode does not read.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_describe(error.errors()[0], schema)}") from None


def _describe(error: Any, schema: type[BaseModel]) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        return (
            f"{name} is not a field of the recipe; the nearest is "
            f"{nearest_field(name, _names_beside(schema, location))}"
        )
    # Where a value may be of several types, pydantic names the first one that it is not.
    name = ".".join(part for part in location if part != "str" and "[" not in part)
    if error["type"] == "missing":
        return f"{name} is missing; it has no default"
    if not location:
        return error["msg"].removeprefix("Value error, ")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        # An error of a whole section names the field in its message.
        return f"{name}: {message}"
    if error["type"] in ("model_type", "dict_type"):
        message = f"it is a section; write its fields below a line [{name}]"
    if error["type"] == "tuple_type":
        message = 'it is a list; write it in brackets, as in ["a", "b"]'
    if error["type"] == "too_short":
        message = "it is empty; name at least one, or leave it out"
    message = f"{message[0].lower()}{message[1:]}"
    if error["type"] == "literal_error":
        allowed = re.findall("'(.+?)'", error["ctx"]["expected"])
        near = nearest(str(error["input"]), allowed, 0.6)
        message = f"the nearest is {near!r}; {message}" if near else message
    return f"{name} is {shown(error['input'])}: {message}"


def _names_beside(schema: type[BaseModel], location: list[str]) -> list[str]:
    """The dotted names that may stand where another does: of the item of a list, or of the
    recipe."""
    section = schema
    for part in [part for part in location[:-1] if not part.isdigit()]:
        annotation = section.model_fields[part].annotation
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        section = next((kind for kind in kinds if issubclass(kind, BaseModel)), section)
    if location[-2:-1] and location[-2].isdigit():
        return [".".join([*location[:-1], name]) for name in section.model_fields]
    return field_names(schema)


def field_names(schema: type[BaseModel]) -> list[str]:
    """Dotted names of all fields of the schema."""
    return [name for name, _, _ in leaves(schema)]


@functools.cache
def roles_of(schema: type[Section]) -> dict[str, Role]:
    """The role of each field of the schema by its dotted name. Raises TypeError where a field has
    none, or two."""
    roles = {}
    for name, field, section in leaves(schema):
        own = [item for item in field.metadata if isinstance(item, Role)]
        found = own or [section.default_role] * (section.default_role is not None)
        if len(found) != 1:
            raise TypeError(f"{name} has {len(found)} roles; give it one: Annotated[..., Role.X]")
        roles[name] = found[0]
    return roles


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Dotted name, definition and section of each field."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field, section


def set_fields(section: BaseModel, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name in section.model_fields_set:
        value = getattr(section, name)
        names += (
            set_fields(value, f"{prefix}{name}.")
            if isinstance(value, BaseModel)
            else [prefix + name]
        )
    return names
