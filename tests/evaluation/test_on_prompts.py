"""Models on prompts without a task: the numbers of a run's validation, and a judge of one's own."""

import json
from pathlib import Path

import pytest
from conftest import tiny_recipe
from small_runs import rows_of

import potstill
from potstill.cli.app import main
from potstill.evaluation.quality import QUANTITIES
from potstill.files import write_rows

JUDGE = """
def length(examples, responses):
    assert examples[0].prompt == "__10*3="
    return [len(response) + 1000 for response in responses]

def short(examples, responses):
    return [1.0]

def words(examples, responses):
    return ["good" for _ in responses]

def broken(examples, responses):
    return [1 / 0 for _ in responses]

helpful = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts, a judge, and a run that has validated on these prompts."""
    folder = tmp_path_factory.mktemp("work")
    write_rows(folder / "prompts.jsonl", [{"prompt": f"__{i}*3="} for i in range(10, 15)])
    (folder / "my_judge.py").write_text(JUDGE)
    validation = {"source": str(folder / "prompts.jsonl"), "every": 2}
    small = {"window": {"tokens": 12}, "train": {"steps": 2, "prompts_per_step": 4}}
    potstill.train(tiny_recipe(folder / "run", validation=validation, **small), quiet=True)
    return folder


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def refused(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *arguments.split()])
    assert ended.value.code == 2
    return capsys.readouterr().err.strip()


def test_the_numbers_are_those_of_the_runs_validation(capsys):
    command = "evaluate run potstill:base --prompts prompts.jsonl --teacher potstill:teacher"
    main([*command.split(), "--max-tokens", "12", "--out", "out.json"])
    finished, base = json.loads(Path("out.json").read_text())
    first, *_, last = rows_of(Path("run"), "validation.jsonl")
    for row, validated in ((base, first), (finished, last)):
        assert row["num_prompts"] == validated["num_prompts"] == 5
        names = QUANTITIES.keys() & validated.keys()
        assert names == QUANTITIES.keys() & row.keys() and len(names) >= 13
        for name in names:
            assert row[name] == pytest.approx(validated[name], rel=1e-4, abs=1e-5), name
    said = capsys.readouterr().out
    value, low, high = finished["student_prefix_reverse_kl"]
    assert f"  run            {value:.4f} [{low:.4f}, {high:.4f}]" in said


def test_one_prompt_has_no_interval(capsys):
    asked = ["--prompts", "prompts.jsonl", "--num-prompts", "1", "--max-tokens", "4"]
    main(["evaluate", "potstill:base", *asked])
    first, *lines = capsys.readouterr().out.splitlines()
    assert "1 prompt of prompts.jsonl" in first and "[one prompt has no interval]" in first
    assert lines and not any("[" in line for line in lines)


def test_without_a_teacher_there_is_what_needs_none_and_a_judge_scores(capsys):
    command = "evaluate potstill:base --prompts prompts.jsonl --judge my_judge.py:length"
    main([*command.split(), "--max-tokens", "6", "--num-prompts", "3", "--out", "alone.json"])
    (row,) = json.loads(Path("alone.json").read_text())
    assert row.keys() & QUANTITIES.keys() == {
        *("student_entropy_before_answer", "length", "truncation", "repetition", "judged")
    }
    # A character is a token, and an end token is none.
    ended = 1 - row["truncation"][0]
    assert row["judged"][0] == pytest.approx(1000 + row["length"][0] - ended)
    assert "the code of my_judge.py is run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--judge my_judge.py:short",
            "my_judge.py: short returned [1.0]; return a list of 5",
        ),
        ("--judge my_judge.py:words", "my_judge.py: words returned 'good'; return a number a resp"),
        ("--judge my_judge.py:broken", "my_judge.py: broken: line 13 raised ZeroDivisionError"),
        ("--judge my_judge.py:helpful", "my_judge.py has no function 'helpful'; write it, or"),
        ("--judge my_judge.py", "'my_judge.py' names no function; write it after the file, as in"),
        ("--judge helpful", "the judge is 'helpful'; name a function in a Python file of yours"),
        ("--judge none.py:helpful", "none.py does not exist; give a Python file of yours"),
        ("--num-responses 3", "--num-responses is not read with --prompts; remove it"),
        ("--num-prompts 0", "--num-prompts is 0; it must be at least 1"),
        ("--num-prompts 9", "9 examples are asked of 'prompts.jsonl', which has 5"),
        ("--teacher potstill:none", "'potstill:none' is not a shipped model"),
    ],
)
def test_what_cannot_be_measured_is_one_line(capsys, arguments, message):
    said = refused(capsys, f"potstill:base --prompts prompts.jsonl --max-tokens 4 {arguments}")
    assert message in said.splitlines()[-1]


def test_what_belongs_to_prompts_needs_them(capsys):
    said = refused(capsys, "potstill:base --teacher potstill:teacher")
    assert "--teacher is read with --prompts FILE alone" in said
    said = refused(capsys, "potstill:base --prompts multiplication")
    assert "--prompts is the task 'multiplication'" in said
