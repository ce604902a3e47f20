"""Servers of one model, and questions to them. Questions are pure: one that fails is asked again,
of the same server or another, until it is given up."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from potstill.config import TeacherModel
from potstill.types import ModelError
from potstill.wire import Answer, Unavailable, request, token_in

# Requests under way at once, a server.
IN_FLIGHT = 4
# Seconds between two attempts, at first and at most.
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
# Seconds until a request is given up and asked again.
REQUEST_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server's own words on its model: the name it goes by, the fingerprint of its weights, and
    how many tokens it reads; None where it does not say."""

    name: str
    fingerprint: str | None
    longest: int | None


class Servers:
    """The servers at `spec.url`, which have been reached."""

    def __init__(self, spec: TeacherModel):
        self.patience = spec.patience
        self.urls = (spec.url,) if isinstance(spec.url, str) else tuple(spec.url or ())
        self.token = token_in(spec.token_variable)
        self.pool = ThreadPoolExecutor(IN_FLIGHT * len(self.urls), "teacher")
        self.served = [served_by(url, self.token) for url in self.urls]
        self.fingerprint = self.served[0].fingerprint

    def ask(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[Answer, str], Any],
        *,
        first: int = 0,
        seconds: float | None = None,
    ) -> Any:
        """The answer to a question, from whichever server gives one within so many seconds (by
        default REQUEST_SECONDS). `first` says which is asked first; `read` is told its URL.

        Raises ModelError when none does for `teacher.patience` seconds.
        """
        deadline, pause = time.monotonic() + self.patience, FIRST_WAIT
        seconds = REQUEST_SECONDS if seconds is None else seconds
        place = first % len(self.urls)
        while True:
            url = self.urls[place]
            try:
                asked = {"model": self.served[place].name, **body}
                answer = request(url, path, asked, seconds=seconds, token=self.token)
                return read(answer, url)
            except Unavailable as error:
                if time.monotonic() + pause > deadline:
                    raise ModelError(
                        f"the teacher at {url} has not answered for teacher.patience = "
                        f"{self.patience:g} seconds ({error}); start it again, and the same "
                        "command goes on"
                    ) from None
            # Not all at once, when a server is back.
            time.sleep(pause * random.uniform(0.5, 1.0))
            place, pause = (place + 1) % len(self.urls), min(2 * pause, LONGEST_WAIT)


def served_by(url: str, token: str | None) -> Served:
    """A server's own words on its model. Raises ModelError where it cannot be reached, or refuses
    us."""
    try:
        answer = request(url, "/v1/models", seconds=REQUEST_SECONDS, token=token)
    except Unavailable as error:
        raise ModelError(
            f"the teacher at {url} cannot be reached ({error}); start it, or mend teacher.url"
        ) from None
    _refuse_status(url, answer)
    try:
        (model,) = answer.json()["data"]
        longest = model.get("max_model_len")
        return Served(
            name=model["id"],
            fingerprint=model.get("fingerprint"),
            longest=None if longest is None else int(longest),
        )
    except (Unavailable, AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(
            f"{url} is no server of one model: /v1/models answers {answer.text}"
        ) from None


def _refuse_status(url: str, answer: Answer) -> None:
    if answer.status in (401, 403):
        raise ModelError(
            f"the teacher at {url} wants a token (status {answer.status}); put it into an "
            "environment variable and name that in teacher.token_variable"
        )
    if answer.status != 200:
        raise ModelError(f"the teacher at {url} answers {answer.status}: {answer.text}")
