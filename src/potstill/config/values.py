"""Values of fields: limits that several share, types that check themselves, and how a message shows
a value."""

import math
import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from potstill.tasks.filling import parts_of

NonNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# numpy and torch take no other seeds.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# AdamW computes with ten times the rate in float32.
LARGEST_RATE = 1e30
# Numbers that no run can reach; a list of that many would fill the memory before the first step.
MANY, MANY_AT_ONCE = 10**9, 10**6
# In float32, logits near 30 are rounded by 2e-6: divided by less than this it would be a share of a
# nat.
COLDEST = 1e-4


def _drawable(temperature: float) -> float:
    if not (temperature == 0 or temperature >= COLDEST):
        raise ValueError(f"it must be 0, which is greedy, or at least {COLDEST:g}")
    return temperature


Temperature = Annotated[float, AfterValidator(_drawable)]


def _storable(arguments: dict[str, Any]) -> dict[str, Any]:
    """Refuse what a recipe's file cannot say, or a chat template's process cannot be told."""
    for name, value in arguments.items():
        for item in items_of(value):
            is_plain = isinstance(item, str | int) or (
                isinstance(item, float) and math.isfinite(item)
            )
            if isinstance(item, dict):
                _storable(item)
            elif not is_plain:
                raise ValueError(
                    f"{name!r} is {shown(item)}; give texts, numbers, true or false, and lists "
                    "or tables of these"
                )
    return arguments


Arguments = Annotated[dict[str, Any], AfterValidator(_storable)]


def _fillable(template: str) -> str:
    parts_of(template)
    return template


Filled = Annotated[str, AfterValidator(_fillable)]


def _reachable(url: str) -> str:
    place = urlsplit(url)
    if place.scheme not in ("http", "https") or not place.hostname or place.query:
        raise ValueError("give a URL such as http://127.0.0.1:8000")
    return url


Url = Annotated[str, AfterValidator(_reachable)]


def _device(name: str) -> str:
    if not re.fullmatch(r"cpu|cuda:\d+", name):
        raise ValueError('give "cpu", or a GPU by its number such as "cuda:1"')
    return name


DeviceName = Annotated[str, AfterValidator(_device)]


def items_of(value: Any) -> list[Any]:
    """A value, or those of nested lists."""
    return (
        [item for each in value for item in items_of(each)]
        if isinstance(value, list | tuple)
        else [value]
    )


def shown(value: Any, width: int = 100) -> str:
    """A value of a user's as a message shows it: quoted where it is text, and not too long."""
    try:
        text = repr(value)
    except ValueError:
        # Python does not write integers of thousands of digits.
        text = "a number of thousands of digits"
    return text if len(text) <= width else f"{text[:width]}..."


def refuse_any(where: str, otherwise: str, *cases: tuple[bool, str]) -> None:
    """Raise ValueError for the first case that is so, with its reason."""
    for is_so, reason in cases:
        if is_so:
            raise ValueError(f"{where}: {reason}, or {otherwise}")
