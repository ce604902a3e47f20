"""SHA-256 of files and of plain data, and JSON that carries the checksum of itself."""

import hashlib
import json
from pathlib import Path
from typing import Any


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
