"""`potstill init`: what it writes is a recipe that trains, and fits the models and prompts."""

import json
import sys
import tomllib

import pytest
from planted import MESSAGES, chat_tokenizer, write_pair

from potstill import load_recipe
from potstill.cli.app import main
from potstill.doctor.draft import TOY_LR, _lr, choose_window
from potstill.models.language_model import load_model
from potstill.prompts.examples import load_examples
from potstill.types import DataError

FLAGS = ["--student", "student", "--teacher", "teacher", "--method", "opd", "--device", "cpu"]
# A line for each row of a data file, the column that is taken, and the template.
TABLES = {
    "prompt": ({"prompt": "Is it?", "text": "no"}, None, "chat"),
    "question": ({"question": "Is it?", "answer": "yes"}, "question", "chat"),
    "text alone": ({"text": "Is it?"}, "text", "chat"),
    "an unknown one alone": ({"ask": "Is it?"}, "ask", "chat"),
    "messages of a user": ({"messages": MESSAGES[0]}, None, None),
    "messages with an answer": (
        {"messages": [*MESSAGES[0], {"role": "assistant", "content": "yes"}]},
        None,
        None,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A folder with the models and the prompts, in which nothing else is."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_written_trains_as_it_is(here, capsys):
    """But for the number of steps and the window, for the time that they take."""
    main(["init", "mine.toml", *FLAGS, "--data", "prompts.jsonl"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["next: potstill doctor mine.toml", "then: potstill train mine.toml"]
    text = (here / "mine.toml").read_text()
    recipe = load_recipe("mine.toml")
    num_weights = load_model("student").num_weights
    assert recipe.train.lr == TOY_LR
    assert f"# {num_weights:,} weights" in text
    assert len(text.splitlines()) <= 30 and max(map(len, text.splitlines())) <= 100
    main(["train", "mine.toml", "--train.steps", "2", "--window.tokens", "8"])
    assert (here / "runs/mine/DONE").exists()


@pytest.mark.slow
def test_what_is_written_trains_and_is_fit_without_any_change(here):
    main(["init", *FLAGS, "--data", "prompts.jsonl"])
    main(["doctor", "my.toml"])
    main(["train", "my.toml"])
    assert (here / "runs/my/DONE").exists()


def test_a_recipe_of_eight_lines_trains(here):
    (here / "short.toml").write_text(
        '[student]\nmodel = "student"\n[teacher]\nmodel = "teacher"\n'
        '[data]\nsource = "prompts.jsonl"\n[window]\ntokens = 8\n'
    )
    main(["train", "short.toml", "--train.steps", "1", "--train.prompts-per-step", "2"])
    assert (here / "runs/run/DONE").exists()


@pytest.mark.parametrize("table", TABLES)
def test_the_column_of_the_prompts_is_found(here, table, capsys):
    row, column, template = TABLES[table]
    (here / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    main(["init", *FLAGS, "--data", "rows.jsonl"])
    data = tomllib.loads((here / "my.toml").read_text())["data"]
    assert (data.get("prompt_column"), data.get("template")) == (column, template)
    assert (f"in the column {column!r}" in capsys.readouterr().out) == (column is not None)


def test_an_answer_is_no_part_of_a_prompt_wherever_it_stands(here):
    """The first chat waits for its answer, and the second has one."""
    answered = [*MESSAGES[0], {"role": "assistant", "content": "yes, " * 40}]
    rows = [{"messages": MESSAGES[0]}, {"messages": answered}]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["init", *FLAGS, "--data", "rows.jsonl"])
    data = load_recipe("my.toml").data
    first, second = load_examples(data.source, prompt_column=data.prompt_column)
    assert first.prompt == second.prompt


def test_a_terminal_is_asked_for_what_no_flag_says(here, monkeypatch):
    answers = iter(["", "prompts.jsonl", "gkd", "sft"])
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or next(answers))
    main(["init", "--student", "student", "--teacher", "teacher"])
    assert [text.split()[0] for text in asked] == ["Prompts", "Prompts", "Method", "Method"]
    recipe = load_recipe("my.toml")
    assert (recipe.objective.prefix, recipe.objective.kl) == ("teacher", "forward")


REFUSED = [
    ("", "needs --student, --teacher, --data, --method, as there is no terminal to ask on"),
    ("--student student --teacher teacher --data prompts.jsonl", "needs --method, as"),
    ("there.toml --student student", "'there.toml' is there already; choose another file, or"),
    (f"{' '.join(FLAGS)} --data none.jsonl", "none.jsonl' does not exist"),
    (f"{' '.join(FLAGS)} --data odd.jsonl", "has the columns a, b, and none is called prompt"),
    (f"{' '.join(FLAGS)} --data odd.jsonl --column c", "has no column 'c'"),
    (
        "--student student --teacher potstill:teacher --data prompts.jsonl --method sft",
        "the tokenizers of student 'student' and teacher 'potstill:teacher' differ at",
    ),
    ("--method gkd", "invalid choice 'gkd'"),
    ("--train.lr 3", "--train.lr is a field of a recipe"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(here, line, message, capsys):
    (here / "there.toml").write_text("mine")
    (here / "odd.jsonl").write_text('{"a": 1, "b": 2}\n')
    before = sorted(here.iterdir())
    with pytest.raises(SystemExit) as ended:
        main(["init", *line.split()])
    (error,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in error
    assert sorted(here.iterdir()) == before and (here / "there.toml").read_text() == "mine"


def test_a_file_is_replaced_only_if_that_is_asked_for(here):
    (here / "my.toml").write_text("mine")
    main(["init", *FLAGS, "--data", "prompts.jsonl", "--force"])
    assert load_recipe("my.toml").student.model == "student"


@pytest.mark.parametrize(
    ("context", "expected"),
    [(None, (256, 900)), (2000, (256, 900)), (1000, (96, 900)), (600, (256, 190))],
)
def test_the_window_is_what_prompts_leave_of_the_context(context, expected):
    """A hundred prompts: all but one have at most 190 tokens, and one has 900."""
    lengths = [*range(92, 191), 900]
    window, longest = choose_window(lengths, context, 256, "prompts.jsonl")
    assert (window, longest if longest == 900 else 190) == expected


def test_prompts_that_leave_no_room_are_refused():
    with pytest.raises(DataError, match="there is no room for a response"):
        choose_window([100, 200], 96, 256, "prompts.jsonl")


def test_the_long_prompts_are_left_out(here):
    """The tiny models have a context of 512 tokens."""
    long = [{"prompt": "one file " * 300}]
    rows = [{"prompt": "Is it one file?"}] * 99 + long
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(chat_tokenizer().encode(long[0]["prompt"])) > 512
    main(["init", *FLAGS, "--data", "rows.jsonl"])
    assert load_recipe("my.toml").data.too_long == "drop"


def test_the_rate_fits_the_size():
    """A toy at a real model's rate hardly moves; the shipped one is trained at 3e-3."""
    assert [_lr(num).value for num in (75_000, 9_999_999, 10_000_000, 4_000_000_000)] == [
        TOY_LR,
        TOY_LR,
        1e-5,
        2.5e-6,
    ]
