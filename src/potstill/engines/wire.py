"""JSON of an engine's server, and whether it lives."""

from typing import Any

from potstill.engines.protocol import EngineError
from potstill.wire import Late, Unavailable, request

HEALTH_SECONDS = 2.0


def call_server(url: str, path: str, body: Any = None, *, seconds: float) -> Any:
    """POST a body as JSON, or GET without one; the answer's JSON, None where it is empty.

    Raises Unavailable for no connection, a time-out, a cut body and an error of the server, and
    EngineError where the server refuses the request.
    """
    answer = request(url, path, body, seconds=seconds)
    if answer.status >= 400:
        raise EngineError(f"the engine refuses {path} (status {answer.status}): {answer.text}")
    return answer.json() if answer.body else None


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
