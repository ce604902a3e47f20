"""JSON over HTTP, to a server that may be gone or broken."""

import json
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from potstill.engines.protocol import EngineError

HEALTH_SECONDS = 2.0


class Unavailable(Exception):
    """No answer, or half of one: the same question may be asked again."""


class Late(Unavailable):
    """No answer in time, as of a server that is busy, or hangs."""


def call_server(url: str, path: str, body: Any = None, *, seconds: float) -> Any:
    """POST a body as JSON, or GET without one; the answer's JSON, None where it is empty.

    Raises Unavailable for no connection, a time-out, a cut body and an error of the server, and
    EngineError where the server refuses the request.
    """
    place = urlsplit(url)
    assert place.hostname is not None, "the recipe checks the URL"
    kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
    connection = kind(place.hostname, place.port, timeout=seconds)
    try:
        # Not urllib's own opener, which would send this through a proxy of the environment.
        connection.request(
            "GET" if body is None else "POST",
            place.path.rstrip("/") + path,
            None if body is None else json.dumps(body),
            {"Content-Type": "application/json"},
        )
        return _answer(connection.getresponse(), path)
    except TimeoutError:
        raise Late(f"{path}: no answer within {seconds:g} seconds") from None
    except (OSError, HTTPException) as error:
        raise Unavailable(f"{path}: {type(error).__name__}: {error}") from None
    finally:
        connection.close()


def _answer(response: HTTPResponse, path: str) -> Any:
    data = response.read()
    text = data[:300].decode(errors="replace")
    if response.status >= 500:
        raise Unavailable(f"{path}: status {response.status}: {text}")
    if response.status >= 400:
        raise EngineError(f"the engine refuses {path} (status {response.status}): {text}")
    try:
        return json.loads(data) if data else None
    except ValueError:
        raise Unavailable(f"{path}: no JSON: {text}") from None


def is_healthy(url: str) -> bool:
    """Whether a server says that it can serve."""
    try:
        call_server(url, "/health", seconds=HEALTH_SECONDS)
    except (Unavailable, EngineError):
        return False
    return True


def is_gone(url: str) -> bool:
    """Whether a server serves no longer, or says so; one that is busy answers late."""
    try:
        call_server(url, "/health", seconds=HEALTH_SECONDS)
    except Late:
        return False
    except Unavailable:
        return True
    return False
