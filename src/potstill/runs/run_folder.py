"""The run folder: what a run writes beside its weights, and what makes it a result.

`recipe.toml`, `environment.json`, `metrics.jsonl`, `window.jsonl` (what the length gate decided and
why), `validation.jsonl` (both models on prompts that are not trained on), `evals.jsonl`,
`responses/`, `samples.jsonl`, `checkpoint/`, `model/`, `DONE`. `DONE` holds the recipe's identity
and is written last; a folder without a matching one is not a result. Needs no torch.
"""

import errno
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from potstill.config import (
    CHANGE_NOTHING,
    CHANGE_ROUNDING,
    Recipe,
    Role,
    load_recipe,
    role_of,
    to_toml,
)
from potstill.files import file_digest, flush, write_atomically, write_json, write_rows
from potstill.runs.machine import describe_machine
from potstill.runs.results_schema import EVAL_KEYS, EvalRow, RunEvalRow
from potstill.runs.schema import MetricsRow, ValidationRow

# Logs that each step adds rows to, and the keys of every row; `evals.jsonl` belongs to a student
# that is finished.
STEP_LOGS = {
    "metrics.jsonl": ("step", "seconds"),
    "samples.jsonl": ("step", "tokens", "trained"),
    "window.jsonl": ("step", "window", "action", "failed"),
    "validation.jsonl": ("step", "num_prompts", "max_tokens"),
}

# Advice on a damaged file, by its name.
REPAIRS = {
    "evals.jsonl": "restore it, or remove it and evaluate the run again",
    "environment.json": "restore it, or remove it: the same command writes it again",
    "plan.json": "restore it, or remove it: `potstill study` writes it again",
    "results.json": "remove it: `potstill report` writes it again",
} | dict.fromkeys(STEP_LOGS, "restore it, or remove the run folder and train again")


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message is one line and says what to do."""


def check_folder(recipe: Recipe, may_change: Collection[Role] = ()) -> dict[str, tuple[Any, Any]]:
    """The fields in which the recipe of the run in its folder differs, with both values. Writes
    nothing.

    Raises RunError if the folder holds something else than this recipe's run. Fields that a resume
    may change, and those with a role of `may_change`, make it no other run.
    """
    folder = recipe.out
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run folder {str(folder)!r} is a file; choose another --out")
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return {}
    if not (folder / "recipe.toml").exists():
        raise RunError(
            f"folder {str(folder)!r} is not empty and holds no run; choose another --out"
        )
    there = load_recipe(folder / "recipe.toml")
    changes = there.changes_to(recipe)
    for name, (theirs, ours) in changes.items():
        if role_of(name) not in (*CHANGE_NOTHING, *CHANGE_ROUNDING, *may_change):
            raise RunError(
                f"run folder {str(folder)!r} holds another recipe ({name} is {_shown(theirs)} "
                f"there and {_shown(ours)} here); "
                f"{_extension(there, recipe, name)}{_other_place(folder)}"
            )
    return changes


def _extension(there: Recipe, here: Recipe, name: str) -> str:
    """How `--extend-to` would make this recipe that of the run there, which differs in field
    `name`; else nothing."""
    if there.train.flops is not None or role_of(name) is not Role.LENGTH:
        return ""
    if here.train.steps > there.train.steps:
        return f"go on with --extend-to {here.train.steps}, or "
    if there.train.extended:
        return f"the run was extended: add --extend-to {there.train.steps}, or "
    return ""


def _shown(value: Any) -> str:
    return "not read" if value is None else json.dumps(value)


def _other_place(folder: Path) -> str:
    """Advice on a folder that holds another run."""
    return "choose another --out" + (
        " (this run is finished)" if (folder / "DONE").exists() else " or remove the folder"
    )


def is_trained(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a finished run of this recipe, but for its evaluation."""
    done = folder / "DONE"
    return done.is_file() and done.read_bytes().strip() == recipe.identity().encode()


def is_done(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds this recipe's finished run, evaluated as it says."""
    if not is_trained(folder, recipe):
        return False
    changes = load_recipe(folder / "recipe.toml").changes_to(recipe)
    return not any(role_of(name) is Role.EVALUATION for name in changes)


def begun_on(folder: Path) -> str | None:
    """The date that the chat templates of a run were told when it began; None where none has
    begun."""
    environment = folder / "environment.json"
    return read_json(environment, ("date",))["date"] if environment.exists() else None


def resume_command(folder: Path) -> str:
    """The command that goes on with an unfinished run."""
    return f"potstill train {folder / 'recipe.toml'}"


@contextmanager
def open_run(
    recipe: Recipe, environment: dict[str, Any], may_change: Collection[Role] = ()
) -> Iterator[tuple[str, ...]]:
    """Create the run folder or enter it again, for this process alone; gives lines about what the
    recipe changed.

    Raises RunError as `check_folder`, when another process is in it, or when it was begun with
    other models or prompts under the same names: what a recipe names can change, and objects may
    have taken its place. A file of a task of the user's own that has changed is noted: a grader
    that failed at the end of a run is mended without another training.
    """
    folder = recipe.out
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "run folder"):
        changes = check_folder(recipe, may_change)
        begun: dict[str, Any] = {}
        if (folder / "environment.json").exists():
            begun = read_json(folder / "environment.json", ("models", "prompts"))
        for key in ("models", "prompts"):
            if begun.get(key, environment[key]) != environment[key]:
                raise RunError(
                    f"run folder {str(folder)!r} was begun with other {key} "
                    f"({json.dumps(begun[key])} there, {json.dumps(environment[key])} here); "
                    f"{_other_place(folder)}"
                )
        edited = edited_files(folder, environment.get("task_files", {}))
        history = begun.get("changes", [])
        if changes or edited:
            what = {"fields": changes} | ({"task_files": edited} if edited else {})
            history = [*history, {"num_steps": _num_rows(folder / "metrics.jsonl"), **what}]
        if changes:
            # It is finished no longer: what it has to do is done below.
            (folder / "DONE").unlink(missing_ok=True)
            flush(folder)
        if not (folder / "recipe.toml").exists():
            # First: by it a folder is known as a run, to go on with after a kill.
            write_atomically(folder / "recipe.toml", to_toml(recipe.resolved()))
        write_environment(folder, environment | {"changes": history})
        if changes:
            write_atomically(folder / "recipe.toml", to_toml(recipe.resolved()))
        of_recipe = [
            _said(name, *values, recipe.student.dropout)
            for name, values in changes.items()
            if role_of(name) not in CHANGE_NOTHING
        ]
        yield (*of_recipe, *describe_edits(edited))


def edited_files(folder: Path, files: dict[str, str]) -> dict[str, tuple[str, str]]:
    """The files among these (with their SHA-256) that the run in a folder knows otherwise, with
    both checksums."""
    environment = folder / "environment.json"
    known = read_json(environment).get("task_files", {}) if environment.exists() else {}
    return {file: (known[file], now) for file, now in files.items() if known.get(file, now) != now}


def describe_edits(edited: dict[str, tuple[str, str]]) -> list[str]:
    """A line for each file of a task that is not the one that the run was begun with."""
    return [
        f"warning: {file} has changed since the run began (SHA-256 {then[:16]}..., now "
        f"{now[:16]}...); the prompts are the same, scores and the ends of answers may differ"
        for file, (then, now) in edited.items()
    ]


def _num_rows(path: Path) -> int:
    """Whole lines of a file, whatever they are."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def write_environment(folder: Path, environment: dict[str, Any]) -> None:
    """Write `environment.json`: of this machine, and of the run."""
    write_json(folder / "environment.json", describe_machine() | environment)


def _said(name: str, theirs: Any, ours: Any, has_dropout: bool) -> str:
    said = f"{name} is {_shown(ours)} and was {_shown(theirs)}"
    if role_of(name) in CHANGE_ROUNDING:
        by = "rounding, and by what is dropped," if has_dropout else "rounding"
        said += f"; from here on the run differs by {by} from one that is not changed"
    return said


@contextmanager
def locked(path: Path, what: str, waits: bool = False) -> Iterator[None]:
    """A folder or file for this process alone. Raises RunError where another has it, or waits for
    that."""
    from filelock import FileLock, Timeout

    lock = FileLock(path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=-1 if waits else 0)
    except Timeout:
        raise RunError(
            f"{what} {str(path)!r} is in use by another process; wait for it or stop it"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        raise RunError(
            f"the file system of {str(path)!r} has no locks ({error.strerror}), without which two "
            "processes could write there at once; choose a folder elsewhere, or have it mounted "
            "with locks (NFS: not with nolock)"
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_in_use(folder: Path) -> bool:
    """Whether a process holds the lock of a folder that `locked` takes. Writes nothing."""
    import fcntl

    lock = folder / ".lock"
    if not lock.is_file():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def store_evals(folder: Path, step: int, rows: Sequence[EvalRow]) -> None:
    """Add rows to `evals.jsonl`, in place of those of the same step, temperature and settings."""

    def key(row: RunEvalRow) -> str:
        return json.dumps([row["step"], row["temperature"], row["settings"]], sort_keys=True)

    added: list[RunEvalRow] = [{"step": step, **row} for row in rows]
    new = {key(row): row for row in added}
    with locked(folder / "evals.jsonl", "evaluations", waits=True):
        kept = [row for row in read_evals(folder, EVAL_KEYS) if key(row) not in new]
        write_rows(folder / "evals.jsonl", [*kept, *new.values()])


def read_evals(folder: Path, keys: Collection[str] = ("step",)) -> list[RunEvalRow]:
    """The evaluations of a run; errors as `read_rows`."""
    return cast(list[RunEvalRow], read_rows(folder / "evals.jsonl", keys))


def read_metrics(folder: Path, keys: Collection[str] = ("step",)) -> list[MetricsRow]:
    """The rows of a run's steps; errors as `read_rows`."""
    return cast(list[MetricsRow], read_rows(folder / "metrics.jsonl", keys))


def read_validations(folder: Path, keys: Collection[str] = ("step",)) -> list[ValidationRow]:
    """The rows of a run's validations; errors as `read_rows`."""
    return cast(list[ValidationRow], read_rows(folder / "validation.jsonl", keys))


def last_row(folder: Path) -> MetricsRow:
    """The metrics of a run's last step. Raises RunError where there are none."""
    rows = read_metrics(folder)
    if not rows:
        path = folder / "metrics.jsonl"
        raise RunError(f"{str(path)!r} is missing or empty; {_repair(path)}")
    return rows[-1]


def seal_logs(folder: Path) -> dict[str, dict[str, Any]]:
    """Flush the logs of the steps so far; returns the size and SHA-256 of each, for `rewind`."""
    sealed = {}
    for name in STEP_LOGS:
        if (path := folder / name).exists():
            flush(path)
            sealed[name] = {"num_bytes": path.stat().st_size, "sha256": file_digest(path)}
    return sealed


def rewind(folder: Path, num_steps: int, sealed: dict[str, dict[str, Any]]) -> None:
    """Cut the logs back to what `seal_logs` saw when the checkpoint after `num_steps` steps was
    saved.

    What came after it will be written again. Raises RunError for a log whose rows up to there are
    not as they were.
    """
    for name in sealed:
        _check_log(folder / name, num_steps, **sealed[name])
    for name in STEP_LOGS:
        if (path := folder / name).exists():
            os.truncate(path, sealed.get(name, {"num_bytes": 0})["num_bytes"])
    evals = read_evals(folder)
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
        f"{str(path)!r} {found} up to step {num_steps}, from which the run would go on; restore "
        f"it, or remove the folder {str(path.parent / 'checkpoint')!r} to begin again"
    )


def read_rows(path: Path, keys: Collection[str] = ()) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file; none when it does not exist.

    Raises RunError that names the line for one that is no JSON object with these keys.
    """
    if not path.exists():
        return []
    lines = _read_bytes(path).split(b"\n")[:-1]
    numbered = [(line, f", line {i}") for i, line in enumerate(lines, 1)]
    return [check_keys(_parse(line, path, where), path, keys, where) for line, where in numbered]


def read_json(path: Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """A file that is one JSON object. Raises RunError where it is not, or lacks some of the
    keys."""
    return check_keys(_parse(_read_bytes(path), path), path, keys)


def read_json_list(path: Path, keys: Collection[str] = ()) -> list[dict[str, Any]]:
    """A file that is a JSON list of at least one object, each with these keys. Raises RunError
    where it is not."""
    found = _parse(_read_bytes(path), path)
    if not isinstance(found, list) or not found:
        raise RunError(f"{str(path)!r} is not a JSON list of rows; {_repair(path)}")
    return [check_keys(row, path, keys, f", row {i}") for i, row in enumerate(found, 1)]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error.strerror}; {_repair(path)}") from None


def _parse(text: bytes, path: Path, where: str = "") -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError:
        raise RunError(f"{str(path)!r}{where} is not UTF-8; {_repair(path)}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{str(path)!r}{where} is not JSON ({error}); {_repair(path)}") from None


def check_keys(found: Any, path: Path, keys: Collection[str], where: str = "") -> dict[str, Any]:
    """Return what was found in a file (`where` in it) if it is a JSON object with these keys.
    Raises RunError."""
    if not isinstance(found, dict):
        raise RunError(f"{str(path)!r}{where} is not a JSON object; {_repair(path)}")
    if missing := [key for key in keys if key not in found]:
        raise RunError(f"{str(path)!r}{where} has no {missing[0]!r}; {_repair(path)}")
    return found


def _repair(path: Path) -> str:
    return REPAIRS.get(path.name, "restore it, or remove it and make it again")


def mark_done(recipe: Recipe) -> None:
    """Write DONE, once all that it vouches for is on disk."""
    for path in (recipe.out, *recipe.out.glob("model"), *recipe.out.glob("model/*")):
        flush(path)
    write_atomically(recipe.out / "DONE", recipe.identity() + "\n")
