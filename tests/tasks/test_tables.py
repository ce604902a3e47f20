"""Rows as they are written: mixed shapes, numbers and dates as text, several files, no more read
than is asked for."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from potstill.prompts.examples import load_examples
from potstill.tasks import make_task
from potstill.tasks.tables import blank_lines, read_table_rows
from potstill.types import DataError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write(path: Path, *rows) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def prompts_of(source, **options):
    return [example.prompt for example in load_examples(source, **options)]


def test_json_lines_have_no_types_of_columns(tmp_path):
    """Dates stay text, shapes mix row by row, null is absent, and a column that nobody reads may
    change its type."""
    file = write(
        tmp_path / "rows.jsonl",
        {"prompt": "Which day? ", "completion": "2024-01-01", "unused": 1},
        "",
        {"messages": CHAT, "prompt": None, "unused": "a"},
        {"prompt": "And then? ", "completion": None, "unused": {"a": [None, {}]}},
    )
    first, second, third = load_examples(file)
    assert first.completion == (("2024-01-01", True),) and third.completion is None
    assert second.prompt == (CHAT[0],) and [example.id for example in (first, second, third)] == [
        "0",
        "1",
        "2",
    ]


@pytest.mark.parametrize(
    ("written", "gold"),
    [
        ('"2024-01-01"', "2024-01-01"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("3.14159265358979323846", "3.14159265358979323846"),
        ("1.50", "1.50"),
        ("1e3", "1e3"),
        ("true", "True"),
    ],
)
def test_gold_answers_are_what_is_written(tmp_path, written, gold):
    file = write(
        tmp_path / "rows.jsonl", f'{{"problem": "p", "answer": {written}, "unique_id": "a"}}'
    )
    (example,) = make_task(f"math500:{file}").examples("test", 1, 0)
    assert example.answer == gold


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["0", "1", "0", "1"], ["0:0", "1:1", "2:0", "3:1"]),
        (["a", None, None, None], ["a", "1", "2", "3"]),
        (["b", "0", None, "2"], ["b", "0", "2", "2"]),
    ],
)
def test_every_problem_has_an_id_of_its_own(tmp_path, ids, expected):
    if len(set(expected)) < len(expected):
        expected = [f"{place}:{name}" for place, name in enumerate(expected)]
    rows = [
        {"problem": f"_1{i}*3=", "answer": "x", "level": 1, "unique_id": name}
        for i, name in enumerate(ids)
    ]
    examples = make_task(f"math500:{write(tmp_path / 'rows.jsonl', *rows)}").examples("test", 4, 0)
    assert [example.id for example in examples] == expected
    rows = [{"prompt": "p", "id": name} for name in ids]
    assert [e.id for e in load_examples(write(tmp_path / "rows.jsonl", *rows))] == expected


def test_files_of_every_kind_and_several_of_them(tmp_path):
    rows = [{"prompt": "a", "id": "x"}, {"prompt": "b, “c”", "id": "y"}]
    write(tmp_path / "lines.jsonl", *rows)
    (tmp_path / "lines.jsonl.gz").write_bytes(
        gzip.compress((tmp_path / "lines.jsonl").read_bytes())
    )
    (tmp_path / "marked.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (tmp_path / "lines.jsonl").read_bytes()
    )
    write(tmp_path / "list.json", json.dumps(rows, indent=1))
    write(tmp_path / "lines.json", *rows)
    write(
        tmp_path / "table.csv",
        "id,prompt,level",
        "x,a,",
        'y,"b, “c”",',
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    files = sorted(str(path) for path in tmp_path.iterdir())
    assert len(files) == 7
    expected = [("x", "a", ""), ("y", "b, “c”", "")]
    for file in files:
        assert [(e.id, e.prompt, e.level) for e in load_examples(file)] == expected, file
    assert prompts_of(files) == ["a", "b, “c”"] * 7 == prompts_of(str(tmp_path / "*.*"))
    assert prompts_of([files[0], str(tmp_path / "tab*")], num_examples=3) == ["a", "b, “c”", "a"]
    with pytest.raises(
        DataError, match=r"no\*\.jsonl' does not exist; give a file that ends in \.jsonl"
    ):
        load_examples(str(tmp_path / "no*.jsonl"))


def test_text_has_a_prompt_a_line(tmp_path):
    """Lines are as they stand but for their breaks; blank ones are counted and are no prompts."""
    data = "\ufeffWhat is two?\r\n\n  And “three”? \n \t\n\f\nlast".encode()
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl").write_text('{"prompt": "x"}\n\n')
    expected = ["What is two?", "  And “three”? ", "last"]
    for name in ("a.txt", "b.txt.gz"):
        assert prompts_of(str(tmp_path / name)) == expected
        assert blank_lines(str(tmp_path / name)) == {str(tmp_path / name): 3}
    assert prompts_of(str(tmp_path / "*"), num_examples=5) == [*expected, *expected[:2]]
    assert list(blank_lines([str(tmp_path / "*.txt*"), str(tmp_path / "c.jsonl")]).values()) == [
        3,
        3,
    ]
    (tmp_path / "latin1.txt").write_bytes("one\né\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"line 2 of .* is not UTF-8 \(byte 0xe9\)"):
        load_examples(str(tmp_path / "latin1.txt"))
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(DataError, match="has no rows"):
        load_examples(str(tmp_path / "blank.txt"))
    with pytest.raises(DataError, match=r"has no column 'question' .* only prompt"):
        load_examples(str(tmp_path / "a.txt"), prompt_column="question")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "cut.jsonl",
            b'{"prompt": "a"}\n{"prompt": "b',
            r"line 2 of '.*' is no JSON: Unterminated string .* column 12; repair",
        ),
        (
            "utf16.jsonl",
            '{"prompt": "a"}\n'.encode("utf-16"),
            r"line 1 of '.*' is not UTF-8 \(byte 0xff at 1\); save the",
        ),
        (
            "latin1.jsonl",
            '{"prompt": "é"}\n'.encode("latin-1"),
            r"line 1 of '.*' is not UTF-8 \(byte 0xe9 at 13\); save",
        ),
        ("half.jsonl", b'{"prompt": "\\ud800"}\n', "line 1 of '.*' has half of a surrogate pair"),
        (
            "deep.jsonl",
            b"[" * 100_000 + b"\n",
            "line 1 of '.*' cannot be read as JSON: maximum recursion",
        ),
        (
            "long.jsonl",
            b'{"prompt": ' + b"9" * 5000 + b"}\n",
            "line 1 of '.*' cannot be read as JSON: Exceeds the limit",
        ),
        (
            "list.jsonl",
            b"[1, 2]\n",
            r"line 1 of '.*' is '\[1, 2\]'; each row must be a JSON object",
        ),
        (
            "list.json",
            b'[{"prompt": "a"},\n {]',
            "data file '.*' is no JSON: .* at line 2, column 3",
        ),
        ("cut.csv", b'prompt\n"a', "line 2 of '.*' is no CSV: unexpected end of data"),
        (
            "wide.csv",
            b"prompt\na,b\n",
            "line 2 of '.*' has more cells than the header; quote what holds commas",
        ),
        (
            "latin1.csv",
            "prompt\né\n".encode("latin-1"),
            r"line 2 of '.*' is not UTF-8 \(byte 0xe9\)",
        ),
        ("bad.jsonl.gz", b"no gzip", "cannot be read: Not a gzipped file"),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"prompt": "a"}\n', mtime=0)[:-9],
            "cannot be read: Compressed file ended",
        ),
        ("bad.parquet", b"PAR1", "data file '.*' cannot be read: "),
        ("empty.csv", b"", "has no rows"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, capfd, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        load_examples(str(tmp_path / name))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert capfd.readouterr() == ("", "")


def test_a_column_that_nobody_reads_may_be_of_any_type(tmp_path):
    map_type = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    columns = {"prompt": ["a", "b"], "unused": pyarrow.array([[("k", 1)], []], map_type)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    assert prompts_of(str(tmp_path / "rows.parquet")) == ["a", "b"]
    with pytest.raises(DataError, match=r"has no column 'text' .* only prompt, unused"):
        load_examples(str(tmp_path / "rows.parquet"), prompt_column="text")


def test_nulls_that_a_typed_table_adds_are_absent(tmp_path):
    """Arrow gives every message the keys of all."""
    called = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}],
    }
    rows = [{"messages": [CHAT[0], CHAT[1]]}, {"messages": [CHAT[0], called, CHAT[1]]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [
        row.values for row in read_table_rows(str(tmp_path / "rows.parquet"), ["messages"])
    ] == rows


def test_no_more_is_read_than_is_asked_for(tmp_path):
    """A small file can hold millions of rows; ten of them cost what ten cost."""
    column = (
        pyarrow.array(["the same text"]).take(pyarrow.array([0] * 2_000_000)).dictionary_encode()
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": column}), tmp_path / "rows.parquet", compression="zstd"
    )
    del column
    assert (tmp_path / "rows.parquet").stat().st_size < 50_000
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.write('{"prompt": "a"}\n' * 10 + "broken\n" + '{"prompt": "a"}\n' * 200_000)
    before = pyarrow.total_allocated_bytes()
    for name in ("rows.parquet", "rows.jsonl"):
        tracemalloc.start()
        assert len(load_examples(str(tmp_path / name), num_examples=10)) == 10
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
        tracemalloc.stop()
    assert pyarrow.total_allocated_bytes() - before < 1_000_000


def test_data_sets_with_several_configurations(tmp_path):
    listed = "".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "other")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    for name in ("main", "other"):
        write(tmp_path / f"{name}.jsonl", {"prompt": name, "completion": "2024-01-01"})
        (example,) = load_examples(str(tmp_path), config=name)
        assert (example.prompt, example.completion) == (name, (("2024-01-01", True),))
    for config, what in ((None, "several configurations"), ("third", "no configuration 'third'")):
        with pytest.raises(DataError, match=f"has {what}; set data.config to one of main, other"):
            load_examples(str(tmp_path), config=config)


def test_a_task_stands_alone(tmp_path):
    """It has no rows, and must not be looked for on the hub."""
    file = write(tmp_path / "a.jsonl", {"prompt": "a"})
    with pytest.raises(DataError, match="has the task 'multiplication:novice' among its tables"):
        load_examples([file, "multiplication:novice"])
