"""What a row read from JSON has that its schema does not say, and the other way round."""

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict


def faults(value: Any, kind: Any, where: str = "") -> list[str]:
    """Where a value read from JSON is not of a type, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        return faults_of_row(value, kind, where)
    if origin in (Union, types.UnionType):
        return (
            [] if any(not faults(value, each) for each in inner) else [f"{where} is {value!r:.60}"]
        )
    if origin is Literal:
        return [] if value in inner else [f"{where} is {value!r:.60}"]
    if origin in (dict, Mapping):
        return [
            fault
            for key, item in value.items()
            for fault in faults(item, inner[1], f"{where}.{key}")
        ]
    if origin in (list, Sequence):
        return [
            fault
            for i, item in enumerate(value)
            for fault in faults(item, inner[0], f"{where}[{i}]")
        ]
    if kind is Any:
        return []
    # JSON has one kind of number.
    allowed = {float: (int, float), int: int, str: str, bool: bool, type(None): type(None)}[kind]
    fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    return [] if fits else [f"{where} is {value!r:.60}"]


def faults_of_row(row: Any, kind: Any, where: str) -> list[str]:
    hints = get_type_hints(kind)
    found = [f"{where} lacks {key}" for key in sorted(kind.__required_keys__ - row.keys())]
    found += [f"{where} has {key}" for key in sorted(row.keys() - hints.keys())]
    known = [key for key in row if key in hints]
    return found + [
        fault for key in known for fault in faults(row[key], hints[key], f"{where}.{key}")
    ]
