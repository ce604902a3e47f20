"""Rows of data files and data sets: JSON lines, JSON, CSV, Parquet, text, what is gzipped of these,
and hub data sets.

JSON is taken as it is written, each line by itself: no column has a type, and no row's shape binds
another's. Only the columns that are asked for are kept, and no more rows are read than are asked
for.
"""

import contextlib
import csv
import dataclasses
import glob
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from potstill.console.names import nearest
from potstill.console.printable import error_text
from potstill.hub import cache_first, cannot_be_had, is_reachable
from potstill.types import DataError, Example

# Endings of a data file's name, which .gz may follow.
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
# The one column of a text file.
TEXT_COLUMN = "prompt"
# Rows of a Parquet file that are decoded together.
BATCH_ROWS = 1024
UTF8 = "save the file as UTF-8"


class DataRow(NamedTuple):
    """One row: where it stands, for messages; its columns that were asked for, without nulls; the
    names of all; and the place of its data source among several."""

    where: str
    values: dict[str, Any]
    names: tuple[str, ...]
    source: int = 0


class WrittenFloat(float):
    """A number that, as text, is what stood in the file: a gold answer of 1.50 stays `1.50`."""

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return self.text


def sources(source: str | Sequence[str]) -> tuple[str, ...]:
    """The parts of a data source: one, or several."""
    return (source,) if isinstance(source, str) else tuple(source)


def is_hub_id(name: str) -> bool:
    """Whether a table is for `datasets` to find: a hub id, or a folder."""
    is_file = name.removesuffix(".gz").endswith(DATA_SUFFIXES) and not Path(name).is_dir()
    return not is_file and not any(mark in name for mark in "*?[")


def read_table_rows(
    source: str | Sequence[str],
    columns: Sequence[str],
    *,
    num_rows: int | None = None,
    split: str = "train",
    config: str | None = None,
) -> list[DataRow]:
    """The first rows of one or more files (patterns such as `part-*.jsonl` too), folders and hub
    data sets, in order.

    `split` and `config` are those of folders and hub data sets. Raises DataError.
    """
    parts: list[Iterator[DataRow]] = []
    for place, name in enumerate(sources(source)):
        if is_hub_id(name):
            found = [_rows_of_data_set(name, columns, num_rows, split, config)]
        else:
            found = [_rows_of_file(file, columns, num_rows) for file in _find_files(name)]
        parts += [_numbered(rows, place) for rows in found]
    return list(itertools.islice(itertools.chain(*parts), num_rows))


def _numbered(rows: Iterator[DataRow], source: int) -> Iterator[DataRow]:
    for row in rows:
        yield row._replace(source=source)


def _find_files(name: str) -> list[str]:
    """The files of a name or pattern, in alphabetical order."""
    if Path(name).is_file():
        return [name]
    files = sorted(path for path in glob.glob(name, recursive=True) if Path(path).is_file())
    if not files and "," in name:
        raise DataError(
            f"data file {name!r} does not exist; give several files as a list: data.source = "
            f"{json.dumps([part.strip() for part in name.split(',')])}"
        )
    if not files:
        kinds = ", ".join(DATA_SUFFIXES)
        raise DataError(
            f"data file {name!r} does not exist{_nearest_file(name)}; give a file that ends in "
            f"{kinds}, a task or a hub id"
        )
    return files


def _nearest_file(name: str) -> str:
    """Words on the file of the same folder whose name is most like this one, if one is like it;
    none for a pattern."""
    folder = Path(name).parent
    if glob.has_magic(name):
        return ""
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    near = nearest(Path(name).name, names, 0.7)
    return f" (the nearest is {str(folder / near)!r})" if near else ""


def _kind(file: str) -> str:
    """The ending of a file's name, before .gz."""
    return Path(file.removesuffix(".gz")).suffix


def _rows_of_file(file: str, columns: Sequence[str], num_rows: int | None) -> Iterator[DataRow]:
    kind = _kind(file)
    if kind not in READERS:
        raise DataError(
            f"data file {file!r} is of no known kind; give a file that ends in "
            f"{', '.join(DATA_SUFFIXES)}"
        )
    if Path(file).stat().st_size == 0:
        return
    try:
        for i, values in enumerate(READERS[kind](file, columns, num_rows)):
            yield make_row(f"row {i} of {file!r}", values, columns)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"data file {file!r} cannot be read: {error_text(error)}; restore or repair it"
        ) from None


def make_row(where: str, values: dict[str, Any], columns: Sequence[str]) -> DataRow:
    """A row of which only some columns are kept."""
    kept = {name: values[name] for name in columns if values.get(name) is not None}
    return DataRow(where, kept, tuple(values))


def _opened(file: str) -> BinaryIO:
    return gzip.open(file) if file.endswith(".gz") else open(file, "rb")  # pyright: ignore[reportReturnType]


def _json_lines(
    file: str, columns: Sequence[str], num_rows: int | None
) -> Iterator[dict[str, Any]]:
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _object(
                    _parse(line, f"line {number} of {file!r}"), f"line {number} of {file!r}"
                )


def _json(file: str, columns: Sequence[str], num_rows: int | None) -> Iterator[dict[str, Any]]:
    """A list of objects, or an object a line."""
    with _opened(file) as lines:
        is_list = (
            next((line for line in lines if line.strip()), b"")
            .decode(errors="ignore")
            .lstrip("\ufeff \t\r\n")
        )
        if not is_list.startswith("["):
            yield from _json_lines(file, columns, num_rows)
            return
        lines.seek(0)
        for i, value in enumerate(_parse(lines.read(), f"data file {file!r}")):
            yield _object(value, f"row {i} of {file!r}")


def _parse(data: bytes, where: str) -> Any:
    """JSON with its numbers as they are written. Raises DataError."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 (byte {data[error.start]:#04x} at {error.start + 1}); {UTF8}"
        ) from None
    try:
        value = json.loads(text, parse_float=WrittenFloat)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = (
            f"line {error.lineno}, column {error.colno}"
            if error.lineno > 1
            else f"column {error.colno}"
        )
        raise DataError(
            f"{where} is no JSON: {error.msg} at {place}; repair or remove it"
        ) from None
    except UnicodeEncodeError:
        raise DataError(
            f"{where} has half of a surrogate pair, which is no character; repair or remove it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} cannot be read as JSON: {error_text(error)}; repair or remove it"
        ) from None
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{where} is {str(value)[:80]!r}; each row must be a JSON object with the columns as "
            "keys"
        )
    return value


def _csv(file: str, columns: Sequence[str], num_rows: int | None) -> Iterator[dict[str, Any]]:
    """Rows under a header; an empty cell is absent."""
    csv.field_size_limit(2**31 - 1)
    with _opened(file) as data:
        lines = (_decoded(line, number, file) for number, line in enumerate(data, 1))
        reader = csv.DictReader(lines, strict=True)
        try:
            for values in reader:
                if None in values:
                    raise DataError(
                        f"line {reader.line_num} of {file!r} has more cells than the header; "
                        "quote what holds commas"
                    )
                yield {name: value or None for name, value in values.items()}
        except csv.Error as error:
            raise DataError(
                f"line {reader.reader.line_num} of {file!r} is no CSV: {error}; repair or remove it"
            ) from None


def _text(file: str, columns: Sequence[str], num_rows: int | None) -> Iterator[dict[str, Any]]:
    """A prompt a line; blank lines are none."""
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            text = _decoded(line, number, file).rstrip("\r\n")
            if text.strip():
                yield {TEXT_COLUMN: text}


def blank_lines(source: str | Sequence[str]) -> dict[str, int]:
    """The number of blank lines in each text file of a data source that has some."""
    names = [name for name in sources(source) if not is_hub_id(name)]
    files = [file for name in names for file in _find_files(name)]
    counts = {file: _num_blank(file) for file in files if _kind(file) == ".txt"}
    return {file: count for file, count in counts.items() if count}


def _num_blank(file: str) -> int:
    with _opened(file) as lines:
        return sum(not line.decode("utf-8-sig", "replace").strip() for line in lines)


def _decoded(line: bytes, number: int, file: str) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"line {number} of {file!r} is not UTF-8 (byte {line[error.start]:#04x}); {UTF8}"
        ) from None


def _parquet(file: str, columns: Sequence[str], num_rows: int | None) -> Iterator[dict[str, Any]]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            used = [name for name in columns if name in names]
            size = min(num_rows or BATCH_ROWS, BATCH_ROWS)
            absent = dict.fromkeys(names)
            for batch in table.iter_batches(batch_size=size, columns=used):
                for values in batch.to_pylist():
                    yield absent | without_nulls(values)
    # Text that is not UTF-8 is a ValueError.
    except (pyarrow.lib.ArrowException, ValueError) as error:
        raise DataError(
            f"data file {file!r} cannot be read: {error_text(error)}; restore or repair it"
        ) from None


def without_nulls(value: Any) -> Any:
    """A value of a typed table, without the nulls that it has for the keys of other rows."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[str, Sequence[str], int | None], Iterator[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}


def _rows_of_data_set(
    name: str, columns: Sequence[str], num_rows: int | None, split: str, config: str | None
) -> Iterator[DataRow]:
    """Rows of a hub data set or a folder; the files of a folder are read as any other file."""
    import datasets

    if Path(name).is_file():
        raise DataError(
            f"data file {name!r} is of no known kind; give a file that ends in "
            f"{', '.join(DATA_SUFFIXES)}"
        )
    datasets.disable_progress_bars()
    try:
        if Path(name).is_dir():
            found = datasets.load_dataset_builder(name, config).config.data_files or {}
            if split in found and all(_kind(file) in READERS for file in found[split]):
                for file in found[split]:
                    yield from _rows_of_file(file, columns, num_rows)
                return
        with contextlib.nullcontext() if Path(name).is_dir() else cache_first():
            table = datasets.load_dataset(name, config, split=split)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        if not Path(name).is_dir() and not is_reachable():
            raise DataError(cannot_be_had("data set", name)) from None
        raise DataError(_why_not(name, config, split, error)) from None
    used = [column for column in columns if column in table.column_names]
    chosen = table.select(range(min(len(table), num_rows or len(table)))).select_columns(used)
    absent = dict.fromkeys(table.column_names)
    for i, values in enumerate(chosen):
        yield make_row(f"row {i} of {name!r}", absent | without_nulls(values), columns)


def _why_not(name: str, config: str | None, split: str, error: Exception) -> str:
    """The line for a data set that cannot be read."""
    import datasets

    configs: list[str] = []
    if Path(name).is_dir() or "Config name" in str(error):
        with contextlib.suppress(OSError, ValueError):
            configs = datasets.get_dataset_config_names(name)
    if config is None and len(configs) > 1:
        return (
            f"data set {name!r} has several configurations; set data.config to one of "
            f"{', '.join(configs)}"
        )
    if config is not None and configs and config not in configs:
        return (
            f"data set {name!r} has no configuration {config!r}; set data.config to one of "
            f"{', '.join(configs)}"
        )
    of = f"split {split!r}" + (f", configuration {config!r}" if config else "")
    return (
        f"data set {name!r} ({of}) cannot be read: {error_text(error)}; without the network "
        "give a local file"
    )


def with_own_ids(examples: Sequence[Example]) -> list[Example]:
    """The examples, each with an id that no other has: where any is doubled, all begin with their
    place."""
    if len({example.id for example in examples}) == len(examples):
        return list(examples)
    return [
        dataclasses.replace(example, id=f"{i}:{example.id}") for i, example in enumerate(examples)
    ]
