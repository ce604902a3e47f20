"""Where a data source leads: to a task, a file or the hub."""

from collections.abc import Sequence
from pathlib import Path

# What makes or scores problems (`tasks.TASKS`); any other data source is a table.
TASK_NAMES = ("multiplication", "columns", "reasoning-gym", "gsm8k", "math500", "amc23", "aime24", "deepscaler")
# What the name of a data file ends in, or these and .gz.
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def sources(source: str | Sequence[str]) -> tuple[str, ...]:
    """The parts of a data source: one, or several."""
    return (source,) if isinstance(source, str) else tuple(source)


def is_table(source: str | Sequence[str]) -> bool:
    """Whether a data source is of files or hub data sets rather than a task."""
    return not isinstance(source, str) or source.split(":")[0] not in TASK_NAMES


def is_hub_id(source: str) -> bool:
    """Whether a data source is for `datasets` to find: a hub id, or a folder."""
    is_file = source.removesuffix(".gz").endswith(DATA_SUFFIXES) and not Path(source).is_dir()
    return is_table(source) and not is_file and not any(mark in source for mark in "*?[")
