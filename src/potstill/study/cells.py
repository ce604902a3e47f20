"""Cells of a panel: every combination of its axes, as fields over the base recipe."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from potstill.config import METHODS, NAMED, RecipeError, fields_with
from potstill.study.file import PanelPlan, Study, StudyGroup


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One distillation of a panel before its seed is set: fields over the base recipe, and what
    follows it."""

    fields: dict[str, Any]
    method: str | None
    details: tuple[str, ...]
    seeds: tuple[int, ...]
    group: StudyGroup


def cells(study: Study, panel: PanelPlan) -> list[Cell]:
    """Every combination of every group's axes."""
    found = []
    named = fields_with(*NAMED)
    for group in panel.groups:
        for values in itertools.product(*group.axes.values()):
            chosen = dict(zip(group.axes, values, strict=True))
            method = chosen.pop("method", None)
            fields = study.fields | panel.fields | group.fields | corner(method) | chosen
            details = [group.label] if group.label else []
            details += [
                axis_text(field, value) for field, value in chosen.items() if field not in named
            ]
            found.append(
                Cell(
                    fields=fields,
                    method=group.sweep_as or method,
                    details=tuple(details),
                    seeds=group.seeds or study.seeds,
                    group=group,
                )
            )
    return found


def widest_window(found: Sequence[Cell]) -> int:
    """The widest window that one of the cells sets; 0 where none does."""
    return max((cell.fields.get("window.tokens", 0) for cell in found), default=0)


def axis_text(field: str, value: Any) -> str:
    """`window 24` for window.tokens, `teacher small` for a model's path, else the field with its
    value."""
    section, _, name = field.rpartition(".")
    if name in ("model", "tokens"):
        return f"{section} {str(value).rstrip('/').rpartition('/')[2].removeprefix('potstill:')}"
    return f"{field} {value}"


def corner(method: str | None) -> dict[str, str]:
    if method is None:
        return {}
    if method not in METHODS:
        raise RecipeError(f"method is {method!r} on an axis; choose one of {', '.join(METHODS)}")
    return {"objective.prefix": METHODS[method].prefix, "objective.kl": METHODS[method].kl}
