"""The model hub: asked once whether it can be reached. Where it cannot, what is in the cache is
found at once."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

# Seconds for the one try. What the hub's own client would wait is more than a minute.
HUB_SECONDS = 3.0


@functools.cache
def is_reachable() -> bool:
    """Whether the hub answers, asked once a process. Also False where the user has switched it
    off."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answers = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            answers.append(True)
        # Errors of every kind, by network and version of the client: each means that it does not
        # answer.
        except Exception:
            answers.append(False)

    # In a thread: looking up a name can take longer than any limit on the request.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return bool(answers) and answers[0]


@contextmanager
def cache_first() -> Iterator[None]:
    """Within this, the hub's clients read the cache alone if the hub does not answer, without tries
    and lines."""
    if is_reachable():
        yield
        return
    settings: list[Any] = [
        import_module(name) for name in ("huggingface_hub.constants", "datasets.config")
    ]
    before = [module.HF_HUB_OFFLINE for module in settings]
    for module in settings:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


def cannot_be_had(what: str, name: str) -> str:
    """The line for what is named and neither here, nor in the cache, nor to be had."""
    return (
        f"{what} {name!r} is not here nor in the hub's cache, and the hub does not answer; "
        "give a folder or file"
    )
