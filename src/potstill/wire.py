"""HTTP requests to a server that may be gone, late or broken."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from potstill.types import ModelError


class Unavailable(Exception):
    """No answer, or half of one: the same question may be asked again."""


class Late(Unavailable):
    """No answer in time, as of a server that is busy, or hangs."""


@dataclass(frozen=True)
class Answer:
    """A whole answer. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The beginning of the body, for messages."""
        return " ".join(self.body[:300].decode(errors="replace").split())

    def json(self) -> Any:
        """The body as JSON. Raises Unavailable for anything else, as a body that was cut is."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise Unavailable(f"no JSON: {self.text}") from None


def token_in(variable: str | None) -> str | None:
    """The token in an environment variable; None without one. Raises ModelError where it is not
    set."""
    if variable is None:
        return None
    token = os.environ.get(variable)
    if not token:
        raise ModelError(
            f"the environment variable {variable!r}, which has the token, is not set; export it "
            "first"
        )
    return token


def request(
    url: str, path: str, body: Any = None, *, seconds: float, token: str | None = None
) -> Answer:
    """POST a body as JSON, or GET without one, to a path below a URL, with a bearer token where one
    is given.

    Raises Late for a time-out, and Unavailable for no connection, a cut body and an error of the
    server (5xx). Other statuses are the caller's.
    """
    place = urlsplit(url)
    assert place.hostname is not None, "the recipe checks the URL"
    kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    # Not urllib's own opener, which would send this through a proxy of the environment.
    connection = kind(place.hostname, place.port, timeout=seconds)
    try:
        data = None if body is None else json.dumps(body)
        method = "GET" if body is None else "POST"
        connection.request(method, place.path.rstrip("/") + path, data, headers)
        return _read(connection.getresponse(), path)
    except TimeoutError:
        raise Late(f"{path}: no answer within {seconds:g} seconds") from None
    except (OSError, HTTPException) as error:
        raise Unavailable(f"{path}: {type(error).__name__}: {error}") from None
    finally:
        connection.close()


def _read(response: HTTPResponse, path: str) -> Answer:
    headers = {name.lower(): value for name, value in response.getheaders()}
    answer = Answer(response.status, headers, response.read())
    if answer.status >= 500:
        raise Unavailable(f"{path}: status {answer.status}: {answer.text}")
    return answer
