"""The run folder: what a run writes beside its weights, and what makes it a result.

`recipe.toml`, `environment.json`, `metrics.jsonl`, `window.jsonl` (what the length gate decided and why),
`evals.jsonl`, `responses/`, `samples.jsonl`, `checkpoint/`, `model/`, `DONE`.
`DONE` holds the recipe's hash and is written last; a folder without a matching one is not a result. Needs no torch.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from potstill.config import RunRecipe, load_any_recipe, to_toml

PACKAGES = ("potstill", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "trl")


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message is one line and says what to do."""


def check_folder(recipe: RunRecipe) -> None:
    """Raise RunError if the recipe's folder holds something other than this recipe's run. Writes nothing."""
    folder = recipe.out
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run folder {str(folder)!r} is a file; choose another --out")
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    if not (folder / "recipe.toml").exists():
        raise RunError(f"folder {str(folder)!r} is not empty and holds no run; choose another --out")
    other = load_any_recipe(folder / "recipe.toml")
    if other.hash() != recipe.hash():
        name, theirs, ours = _first_difference(other.resolved(), recipe.resolved())
        raise RunError(
            f"run folder {str(folder)!r} holds another recipe ({name} is {theirs} there and {ours} here); "
            "choose another --out or remove the folder"
        )


def _first_difference(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any]:
    for key in {**theirs, **ours}:
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            return _first_difference(a, b, f"{prefix}{key}.")
        if a != b and prefix + key != "out":
            return prefix + key, json.dumps(a), json.dumps(b)
    raise AssertionError("the recipes are equal")


def is_done(folder: Path, recipe: RunRecipe) -> bool:
    """Whether the folder holds this recipe's finished run."""
    done = folder / "DONE"
    return done.exists() and done.read_text().strip() == recipe.hash()


@contextmanager
def open_run(recipe: RunRecipe, environment: dict[str, Any]) -> Iterator[None]:
    """Create the run folder or enter it again, for this process alone.

    Raises RunError when another process is in it, or when it was begun with other models or prompts under the same
    names: what a recipe names can change, and objects may have taken its place.
    """
    from filelock import FileLock, Timeout

    folder = recipe.out
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            if (folder / "environment.json").exists():
                begun = json.loads((folder / "environment.json").read_text())
                for key in ("models", "prompts"):
                    if begun[key] != environment[key]:
                        raise RunError(
                            f"run folder {str(folder)!r} was begun with other {key} ({json.dumps(begun[key])} there, "
                            f"{json.dumps(environment[key])} here); choose another --out or remove the folder"
                        )
            if not (folder / "recipe.toml").exists():
                write_atomically(folder / "recipe.toml", to_toml(recipe.resolved()))
            write_atomically(folder / "environment.json", json.dumps(describe_machine() | environment, indent=1) + "\n")
            yield
    except Timeout:
        raise RunError(f"run folder {str(folder)!r} is in use by another process; wait for it or stop it") from None


def rewind(folder: Path, num_steps: int) -> None:
    """Forget what was logged after the checkpoint that a run is resumed from, and a line torn by a kill."""
    for name in ("metrics.jsonl", "window.jsonl", "samples.jsonl", "evals.jsonl"):
        path = folder / name
        if path.exists():
            kept = [row for row in read_rows(path) if row["step"] <= num_steps]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file; none when it does not exist."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def finish(recipe: RunRecipe) -> None:
    write_atomically(recipe.out / "DONE", recipe.hash() + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader or a kill sees the old text or the new, never a part."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def flush(path: Path) -> None:
    """Have the file's (or folder's) bytes on disk before anything refers to them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_machine() -> dict[str, Any]:
    """Code revision, library versions and platform."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "revision": revision or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }
