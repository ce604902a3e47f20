"""Calls of an engine's server, and whether it serves at all."""

from typing import Any

from potstill.engines.protocol import EngineError
from potstill.wire import Late, Unavailable, request

HEALTH_SECONDS = 2.0


def call_server(url: str, path: str, body: Any = None, *, seconds: float) -> Any:
    """The answer's JSON, None where it is empty. Raises Unavailable as `request`, and EngineError
    where the server refuses the request."""
    answer = request(url, path, body, seconds=seconds)
    if answer.status >= 400:
        raise EngineError(f"the engine refuses {path} (status {answer.status}): {answer.text}")
    return answer.json() if answer.body else None


def is_healthy(url: str) -> bool:
    """Whether a server says that it can serve."""
    try:
        return request(url, "/health", seconds=HEALTH_SECONDS).status == 200
    except Unavailable:
        return False


def is_gone(url: str) -> bool:
    """Whether a server serves no longer, or says so; one that is busy answers late."""
    try:
        request(url, "/health", seconds=HEALTH_SECONDS)
    except Late:
        return False
    except Unavailable:
        return True
    return False
