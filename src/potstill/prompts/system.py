"""A system prompt before every chat that has none of its own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from potstill.types import SYSTEM_ROLES, DataError, Example


def with_system(
    examples: Sequence[Example], system: str | None, template: Literal["chat", "raw"] | None
) -> list[Example]:
    """The examples with a system prompt. Raises DataError for one that is taken as it is, where a
    system prompt has no place."""
    if not system:
        return list(examples)
    for example in examples:
        if isinstance(example.prompt, str) and template != "chat":
            raise DataError(
                f"{example.name} is taken as it is, and a system prompt needs a chat; set "
                'template = "chat", or leave the system prompt out'
            )
    return [replace(example, system=system) for example in examples]


def system_notes(examples: Sequence[Example], system: str | None) -> list[str]:
    """A line for the user where prompts have a system message of their own, which stays."""
    num = sum(map(has_own_system, examples))
    if not system or not num:
        return []
    return [
        f"{num:,} of {len(examples):,} prompts have a system message of their own, which stays in "
        "place of the system prompt"
    ]


def has_own_system(example: Example) -> bool:
    """Whether one of an example's messages is by the system."""
    messages = () if isinstance(example.prompt, str) else example.prompt
    return any(message["role"] in SYSTEM_ROLES for message in messages)
