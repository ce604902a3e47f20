"""Small potstill commands, and whether two of them left the same."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from potstill.cli.app import main

SMALL = {
    "data.num-prompts": "24",
    "train.prompts-per-step": "4",
    "train.warmup-steps": "1",
    "train.lr": "3e-3",
    "train.steps": "6",
    "train.checkpoint-every": "2",
    "window.tokens": "12",
    "evaluation.num-problems": "2",
    "evaluation.num-responses": "2",
    "evaluation.max-tokens": "8",
    "evaluation.batch-size": "3",
}
SFT = {"objective.prefix": "teacher", "objective.kl": "forward"}
OPD = {"objective.prefix": "student", "objective.kl": "reverse"}


# Values that may differ: checksums of run logs, in which there are seconds; states of runs as a
# study last saw them; the revision of the code, which a commit changes.
VOLATILE = {
    "state.json": ("logs", "checksum"),
    "plan.json": ("state",),
    "environment.json": ("revision",),
}


def command(text: str, *options: dict[str, str]) -> list[str]:
    """A command line from its words and from the options, of which later ones win."""
    merged: dict[str, str] = {}
    for each in options:
        merged |= each
    return [
        *text.split(),
        *(word for name, value in merged.items() for word in (f"--{name}", *value.split())),
    ]


def train(*options: dict[str, str]) -> list[str]:
    """A distillation to the folder `run`."""
    return command("train demo --out run", SMALL, *options)


def cache(*options: dict[str, str]) -> list[str]:
    """The build of a teacher cache in the folder `cache`."""
    of_recipe = {name: value for name, value in SMALL.items() if not name.startswith("evaluation")}
    return command("cache build demo --out cache --rollouts-per-shard 5", of_recipe, SFT, *options)


def contents(folder: Path) -> dict[str, Any]:
    """The contents of each file of a folder, but for locks, logs, seconds and checksums of what has
    them."""
    found = {}
    # With what links lead to.
    paths = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
    ]
    for path in sorted(path for path in paths if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name.endswith(".lock") or path.suffix == ".log":
            continue
        if path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [without_seconds(json.loads(line)) for line in lines]
            if path.name in VOLATILE:
                found[name] = [without_keys(row, VOLATILE[path.name]) for row in found[name]]
        else:
            found[name] = path.read_bytes()
    return found


def without_seconds(value: Any) -> Any:
    """The same without keys whose values depend on the machine's speed."""
    if isinstance(value, dict):
        return {
            key: without_seconds(inner)
            for key, inner in value.items()
            if not key.endswith("seconds")
        }
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


def without_keys(value: Any, names: tuple[str, ...]) -> Any:
    """The same without these keys, however deep."""
    if isinstance(value, dict):
        return {key: without_keys(inner, names) for key, inner in value.items() if key not in names}
    return [without_keys(inner, names) for inner in value] if isinstance(value, list) else value


def differences(mine: Path, theirs: Path) -> list[str]:
    """The files that differ, or that one side lacks."""
    a, b = contents(mine), contents(theirs)
    unequal = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return [
        f"{name} ({'differs' if name in a and name in b else 'on one side alone'})"
        for name in unequal
    ]


def refused(capsys, arguments: list[str], *parts: str) -> None:
    """Exit 2 with one line that has these parts, and nothing new in the folder."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert (stop.value.code, len(lines)) == (2, 1), lines
    for part in parts:
        assert part in lines[0], lines
    assert sorted(Path().rglob("*")) == before
