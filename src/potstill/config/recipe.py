"""A whole recipe: what it resolves to, its hash, and what makes a run this run."""

from typing import Any

from pydantic import model_validator

from potstill.config.fields import RecipeFields
from potstill.config.fitting import refuse_misfits
from potstill.config.roles import CHANGE_NOTHING, CHANGE_ROUNDING, Role, Selection
from potstill.config.section import RecipeError, roles_of, set_fields
from potstill.config.sections.models import FurtherTeacher
from potstill.config.unread import check_weighting, unread_fields, unread_of_place
from potstill.config.values import shown
from potstill.console.names import nearest_field
from potstill.files import json_digest


class Recipe(RecipeFields):
    """The recipe of a run. Fields that the chosen mode does not read may not be set."""

    _notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self):
        self.refuse_unread()
        check_weighting(self)
        refuse_misfits(self)
        return self

    @property
    def method(self) -> str:
        """The name of this cell of the grid, and of the reward beside it."""
        older = " on an older student's prefixes" if self.has_older_prefixes else ""
        first = self.objective.name + older
        parts = [first if self.teacher.weight == 1 else f"{self.teacher.weight:g} {first}"]
        if self.reward.weight and self.objective.kl != "none":
            parts.append(f"{self.reward.weight:g} reward")
        if self.reward.start_kl:
            parts.append(f"{self.reward.start_kl:g} KL to the start")
        parts += [f"{each.weight:g} {each.name}" for each in self.teachers]
        return " + ".join(parts)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes that a user should read before the run begins."""
        return self._notes

    def unread(self) -> dict[str, str]:
        """Fields (or whole sections) that the recipe's mode does not read, with the reason."""
        return unread_fields(self)

    def refuse_unread(self) -> None:
        """Raise ValueError when a field is set that is not read."""
        unread = self.unread()
        for name in set_fields(self):
            for unread_name, reason in unread.items():
                if name == unread_name or name.startswith(unread_name + "."):
                    raise ValueError(
                        f"{name} is set but not read: {reason}; remove it or change the mode"
                    )
        for each in self.teachers:
            for name, reason in unread_of_place(each).items():
                if name in each.model_fields_set:
                    raise ValueError(
                        f"{name} of teacher {each.name!r} is set but not read: {reason}; remove it"
                    )

    def resolved(self) -> dict[str, Any]:
        """Every field that is read, defaults included, as plain data."""
        return self.resolved_without(())

    def resolved_without(self, left_out: Selection) -> dict[str, Any]:
        """The same without the fields of some roles, some dotted fields or whole sections.

        Raises ValueError for a name that is no field or section of a recipe.
        """
        data = self.model_dump(mode="json", exclude_none=True)
        for name in _names_of((*self.unread(), *left_out)):
            *sections, field = name.split(".")
            section = data
            for key in sections:
                section = section.get(key, {})
            section.pop(field, None)
        if "teachers" in data:
            data["teachers"] = [_resolved_teacher(each, left_out) for each in self.teachers]
        return {name: value for name, value in data.items() if value != {}}

    def hash(self) -> str:
        """The hash of the resolved recipe without the folder it is written to."""
        return json_digest(self.resolved_without(("out",)))

    def identity(self) -> str:
        """The hash of what a run's weights depend on: the resolved recipe without what a resume may
        change."""
        return json_digest(self.resolved_without((*CHANGE_NOTHING, *CHANGE_ROUNDING)))

    def changes_to(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """The dotted fields in which another recipe differs, with both values; None where a field
        is not read."""
        mine, theirs = (
            dotted(self.resolved_without(("out",))),
            dotted(other.resolved_without(("out",))),
        )
        pairs = {name: (mine.get(name), theirs.get(name)) for name in {**mine, **theirs}}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _resolved_teacher(teacher: FurtherTeacher, left_out: Selection) -> dict[str, Any]:
    """Every field that is read of a teacher beside the first one, without those of some roles."""
    roles, unread = roles_of(FurtherTeacher), unread_of_place(teacher)
    fields = teacher.model_dump(mode="json", exclude_none=True).items()
    return {
        name: value for name, value in fields if name not in unread and roles[name] not in left_out
    }


def _names_of(selection: Selection) -> list[str]:
    """The dotted fields and the sections that are meant. Raises ValueError for a name that a recipe
    does not have."""
    roles = roles_of(Recipe)
    sections = {name.rpartition(".")[0] for name in roles if "." in name}
    names: list[str] = []
    for item in selection:
        if isinstance(item, Role):
            names += [name for name, role in roles.items() if role is item]
        elif item in roles or item in sections:
            names.append(item)
        else:
            nearest = nearest_field(item, list(roles))
            raise ValueError(
                f"{item!r} is no field and no section of a recipe; the nearest is {nearest}"
            )
    return names


def dotted(data: dict[str, Any], section: str = "") -> dict[str, Any]:
    """The fields of a resolved recipe, or of a section of it, by their dotted names."""
    fields: dict[str, Any] = {}
    roles = roles_of(Recipe)
    for key, value in data.items():
        name = f"{section}{key}"
        if name == "teachers":
            # Each by its name, as its fields have roles of their own.
            for table in value:
                fields |= {f"teachers.{table['name']}.{field}": table[field] for field in table}
            continue
        # A table that is a field's value, such as arguments, is no section.
        is_section = isinstance(value, dict) and name not in roles
        fields |= dotted(value, f"{name}.") if is_section else {name: value}
    return fields


def role_of(name: str) -> Role:
    """The role of a dotted field, also of one of several teachers: `teachers.NAME.url`. Raises
    KeyError for any other name."""
    if name.startswith("teachers."):
        return roles_of(FurtherTeacher)[name.split(".")[2]]
    return roles_of(Recipe)[name]


def fields_with(*roles: Role) -> tuple[str, ...]:
    """The dotted fields with these roles."""
    return tuple(name for name, role in roles_of(Recipe).items() if role in roles)


def check_recipe(given: Any) -> None:
    """Raise RecipeError for what is given from Python and is no recipe."""
    if not isinstance(given, Recipe):
        raise RecipeError(
            f"the recipe is {shown(given)}; give a Recipe, such as load_recipe(NAME) returns"
        )
