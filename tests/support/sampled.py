"""Long lists of cases, of which the default run takes some."""

import pytest


def some(rows, every):
    """All rows as parameters, of which the default run takes one in so many; the others are marked
    slow."""
    return [
        pytest.param(*row, marks=() if i % every == 0 else pytest.mark.slow)
        for i, row in enumerate(rows)
    ]
