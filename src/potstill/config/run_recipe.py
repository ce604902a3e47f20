"""The base of every kind of recipe: what it resolves to, its hash, and what makes a run this
run."""

from pathlib import Path
from typing import Annotated, Any

from potstill.config.roles import CHANGE_NOTHING, CHANGE_ROUNDING, Role, Selection
from potstill.config.section import Section, roles_of, set_fields
from potstill.console.names import nearest_field
from potstill.files import json_digest


class RunRecipe(Section):
    """The common base of all recipes: fields, of which the chosen mode reads some, and a run
    folder."""

    out: Annotated[Path, Role.OUTPUT] = Path("runs/run")
    _notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes that a user should read before the run begins."""
        return self._notes

    def unread(self) -> dict[str, str]:
        """Fields (or whole sections) that the recipe's mode does not read, with the reason."""
        return {}

    def refuse_unread(self) -> None:
        """Raise ValueError when a field is set that is not read."""
        unread = self.unread()
        for name in set_fields(self):
            for unread_name, reason in unread.items():
                if name == unread_name or name.startswith(unread_name + "."):
                    raise ValueError(
                        f"{name} is set but not read: {reason}; remove it or change the mode"
                    )

    def resolved(self) -> dict[str, Any]:
        """Every field that is read, defaults included, as plain data."""
        return self.resolved_without(())

    def resolved_without(self, left_out: Selection) -> dict[str, Any]:
        """The same without the fields of some roles, some dotted fields or whole sections.

        Raises ValueError for a name that is no field or section of this kind of recipe.
        """
        data = self.model_dump(mode="json", exclude_none=True)
        for name in names_of(type(self), (*self.unread(), *left_out)):
            *sections, field = name.split(".")
            section = data
            for key in sections:
                section = section.get(key, {})
            section.pop(field, None)
        return {name: value for name, value in data.items() if value != {}}

    def hash(self) -> str:
        """The hash of the resolved recipe without the folder it is written to."""
        return json_digest(self.resolved_without(("out",)))

    def identity(self) -> str:
        """The hash of what a run's weights depend on: the resolved recipe without what a resume may
        change."""
        return json_digest(self.resolved_without((*CHANGE_NOTHING, *CHANGE_ROUNDING)))

    def changes_to(self, other: "RunRecipe") -> dict[str, tuple[Any, Any]]:
        """The dotted fields in which another recipe differs, with both values; None where a field
        is not read."""
        mine, theirs = (
            _flat(self.resolved_without(("out",))),
            _flat(other.resolved_without(("out",))),
        )
        pairs = {name: (mine.get(name), theirs.get(name)) for name in {**mine, **theirs}}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def names_of(kind: type[Section], selection: Selection) -> list[str]:
    """The dotted fields and the sections that are meant. Raises ValueError for a name that this
    kind does not have."""
    roles = roles_of(kind)
    sections = {name.partition(".")[0] for name in roles if "." in name}
    names: list[str] = []
    for item in selection:
        if isinstance(item, Role):
            names += [name for name, role in roles.items() if role is item]
        elif item in roles or item in sections:
            names.append(item)
        else:
            nearest = nearest_field(item, list(roles))
            raise ValueError(
                f"{item!r} is no field and no section of a {kind.__name__}; the nearest is "
                f"{nearest}"
            )
    return names


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    """Fields of sections by their dotted names."""
    sections = {key: value for key, value in data.items() if isinstance(value, dict)}
    inner = {
        f"{key}.{name}": value
        for key, section in sections.items()
        for name, value in section.items()
    }
    return {key: value for key, value in data.items() if key not in sections} | inner
