"""Transformers without what it prints by itself, which would tear our lines."""

import contextlib


@contextlib.contextmanager
def without_warnings():
    """Without what transformers logs of a model that we then load or refuse."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def without_progress_bars():
    """Without transformers' own progress bars, which would tear ours."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
