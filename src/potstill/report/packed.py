"""Texts of a page that are packed, which makes them a third as large: gzip in base64."""

import base64
import gzip
import json
from typing import Any


def pack(text: str) -> str:
    """The text as the page's script unpacks it; the same text gives the same."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def pack_data(data: Any) -> str:
    """Plain data as packed JSON."""
    return pack(json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False))


def unpack(packed: str) -> str:
    """The text that was packed."""
    return gzip.decompress(base64.b64decode(packed)).decode()
