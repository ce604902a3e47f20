"""Files that a kill leaves whole: text, JSON lines, checksums; and texts that are packed. Knows
nothing of runs."""

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON line; a last line that a kill or a full disk has torn is cut off before."""
    with path.open("ab+") as file:
        size = file.tell()
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json_line(row).encode())


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSONL file by these rows, as `write_atomically` does."""
    write_atomically(path, "".join(map(json_line, rows)))


def json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader or a kill sees the old text or the new, never a part."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    flush(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Replace a file by this plain data, indented, as `write_atomically` does."""
    write_atomically(path, json.dumps(data, indent=1) + "\n")


def flush(path: Path) -> None:
    """Have the file's (or folder's) bytes on disk before anything refers to them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path, num_bytes: int | None = None) -> str:
    """SHA-256 of a file, or of its first bytes, as 64 hexadecimal digits."""
    if num_bytes is not None:
        with path.open("rb") as file:
            return hashlib.sha256(file.read(num_bytes)).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(data: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def seal(data: dict[str, Any], indent: int | None = None) -> str:
    """JSON of plain data with a checksum of it, for `unseal`."""
    plain = json.loads(json.dumps(data))
    return json.dumps({"checksum": json_digest(plain), **plain}, indent=indent) + "\n"


def unseal(data: dict[str, Any]) -> dict[str, Any] | None:
    """The data without its checksum; None where the two do not belong together."""
    rest = {key: value for key, value in data.items() if key != "checksum"}
    return rest if data.get("checksum") == json_digest(rest) else None


def pack(text: str) -> str:
    """The text as gzip in base64, a third as large in a page; the same text gives the same."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def pack_data(data: Any) -> str:
    """Plain data as packed JSON."""
    return pack(json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False))


def unpack(packed: str) -> str:
    """The text that was packed."""
    return gzip.decompress(base64.b64decode(packed)).decode()
