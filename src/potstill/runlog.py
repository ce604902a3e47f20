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
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from potstill.config import RunRecipe, load_any_recipe, to_toml
from potstill.digests import file_digest

# What each step adds rows to; `evals.jsonl` belongs to a student that is finished.
STEP_LOGS = ("metrics.jsonl", "window.jsonl", "samples.jsonl")
PACKAGES = ("potstill", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "trl")


# What to do with a damaged file, by its name.
REPAIRS = {
    "evals.jsonl": "restore it, or remove it and evaluate the run again",
    "environment.json": "restore it, or remove it: the same command writes it again",
    "plan.json": "restore it, or remove it: `potstill study` writes it again",
    "results.json": "remove it: `potstill report` writes it again",
} | dict.fromkeys(STEP_LOGS, "restore it, or remove the run folder and train again")


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
    return done.is_file() and done.read_bytes().strip() == recipe.hash().encode()


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


def seal_logs(folder: Path) -> dict[str, dict[str, Any]]:
    """Flush the logs of the steps so far; returns the size and SHA-256 of each, for `rewind`."""
    sealed = {}
    for name in STEP_LOGS:
        if (path := folder / name).exists():
            flush(path)
            sealed[name] = {"num_bytes": path.stat().st_size, "sha256": file_digest(path)}
    return sealed


def rewind(folder: Path, num_steps: int, sealed: dict[str, dict[str, Any]]) -> None:
    """Cut the logs back to what `seal_logs` saw when the checkpoint after `num_steps` steps was saved.

    What came after it will be written again. Raises RunError for a log whose rows up to there are not as they were.
    """
    for name in sealed:
        _check_log(folder / name, num_steps, **sealed[name])
    for name in STEP_LOGS:
        if (path := folder / name).exists():
            os.truncate(path, sealed.get(name, {"num_bytes": 0})["num_bytes"])
    evals = read_rows(folder / "evals.jsonl", ("step",))
    if late := [row for row in evals if row["step"] > num_steps]:
        write_rows(folder / "evals.jsonl", [row for row in evals if row not in late])


def _check_log(path: Path, num_steps: int, num_bytes: int, sha256: str) -> None:
    size = path.stat().st_size if path.is_file() else 0
    if size < num_bytes:
        found = f"has {size} bytes where {num_bytes} were written, so that rows are missing"
    elif file_digest(path, num_bytes) != sha256:
        found = "was changed after it was written"
    else:
        return
    raise RunError(
        f"{str(path)!r} {found} up to step {num_steps}, from which the run would go on; restore it, or remove the "
        f"folder {str(path.parent / 'checkpoint')!r} to begin again"
    )


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON line; a last line that a kill or a full disk has torn is cut off before."""
    with path.open("ab+") as file:
        size = file.tell()
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json_line(row).encode())


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a JSONL file by these rows, as `write_atomically` does."""
    write_atomically(path, "".join(map(json_line, rows)))


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path: Path, keys: Collection[str] = ()) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file; none when it does not exist.

    Raises RunError that names the line for one that is no JSON object with these keys.
    """
    if not path.exists():
        return []
    lines = _read_bytes(path).split(b"\n")[:-1]
    return [_parse(line, path, keys, f", line {i}") for i, line in enumerate(lines, 1)]


def read_json(path: Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """A file that is one JSON object. Raises RunError where it is not, or lacks some of the keys."""
    return _parse(_read_bytes(path), path, keys)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error.strerror}; {_repair(path)}") from None


def _repair(path: Path) -> str:
    return REPAIRS.get(path.name, "restore it, or remove it and make it again")


def _parse(text: bytes, path: Path, keys: Collection[str], where: str = "") -> dict[str, Any]:
    """A JSON object with these keys."""
    try:
        found = json.loads(text.decode())
    except UnicodeDecodeError:
        raise RunError(f"{str(path)!r}{where} is not UTF-8; {_repair(path)}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{str(path)!r}{where} is not JSON ({error}); {_repair(path)}") from None
    if not isinstance(found, dict):
        raise RunError(f"{str(path)!r}{where} is {type(found).__name__} and not a JSON object; {_repair(path)}")
    if missing := [key for key in keys if key not in found]:
        raise RunError(f"{str(path)!r}{where} has no {missing[0]!r}; {_repair(path)}")
    return found


def finish(recipe: RunRecipe) -> None:
    """Write DONE, once all that it vouches for is on disk."""
    model = recipe.out / "model"
    for path in (*model.iterdir(), model, recipe.out):
        flush(path)
    write_atomically(recipe.out / "DONE", recipe.hash() + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader or a kill sees the old text or the new, never a part."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    flush(path.parent)


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
