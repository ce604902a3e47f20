"""The base of every kind of recipe: what it resolves to, its hash, and what makes a run this run."""

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from potstill.config.section import Section, set_fields

# Fields and sections that a run may be resumed with whatever they were, as none of its steps depends on them ...
CHANGE_NOTHING = ("out", "evaluation", "train.checkpoint_every", "train.loss_memory", "grpo.checkpoint_every")
# ... or only by rounding, which is said then. Every other field is what makes it this run.
CHANGE_ROUNDING = ("train.tokens_per_batch", "sampling.batch_size", "grpo.rows_per_batch")


def is_one_of(name: str, fields: Collection[str]) -> bool:
    """Whether a dotted field is among these, or in a section that is."""
    return name in fields or name.partition(".")[0] in fields


class RunRecipe(Section):
    """What every kind of recipe is: fields, of which the chosen mode reads some, and a run folder."""

    out: Path = Path("runs/run")
    _notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should read before the run begins."""
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
                    raise ValueError(f"{name} is set but not read: {reason}; remove it or change the mode")

    def resolved(self) -> dict[str, Any]:
        """Every field that is read, defaults included, as plain data."""
        return self.resolved_without(())

    def resolved_without(self, names: Iterable[str]) -> dict[str, Any]:
        """The same without some dotted fields or whole sections."""
        data = self.model_dump(mode="json", exclude_none=True)
        for name in (*self.unread(), *names):
            *sections, field = name.split(".")
            section = data
            for key in sections:
                section = section.get(key, {})
            section.pop(field, None)
        return data

    def hash(self) -> str:
        """Of the resolved recipe without the folder it is written to."""
        return _hash(self.resolved_without(["out"]))

    def identity(self) -> str:
        """Of what a run's weights depend on: the resolved recipe without the fields that a resume may change."""
        return _hash(self.resolved_without([*CHANGE_NOTHING, *CHANGE_ROUNDING]))

    def changes_to(self, other: "RunRecipe") -> dict[str, tuple[Any, Any]]:
        """The dotted fields in which another recipe differs, with both values; None where a field is not read."""
        mine, theirs = _flat(self.resolved_without(["out"])), _flat(other.resolved_without(["out"]))
        pairs = {name: (mine.get(name), theirs.get(name)) for name in {**mine, **theirs}}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _hash(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    """Fields of sections by their dotted names."""
    sections = {key: value for key, value in data.items() if isinstance(value, dict)}
    inner = {f"{key}.{name}": value for key, section in sections.items() for name, value in section.items()}
    return {key: value for key, value in data.items() if key not in sections} | inner
