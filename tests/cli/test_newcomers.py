"""Mistakes that newcomers make: each ends in one line that says what to do, or is none any more."""

import json
import shlex
from pathlib import Path

import pytest
from planted import MESSAGES, chat_model, chat_recipe, chat_tokenizer, write_pair

from potstill import train
from potstill.cli.app import main
from potstill.cli.show import cut_short
from potstill.cli.usage import _sentence
from potstill.config import RecipeError
from potstill.runs.results import Entry
from potstill.statistics import Estimate
from potstill.types import DataError, ModelError

# A command line that is wrong, and the parts of the answer that lead on.
MISTAKES = [
    ("train demo --train.learning_rate 1e-5", ["train.learning_rate", "the nearest is train.lr"]),
    ("train demo --lr 1e-5", ["--lr is no option", "the nearest is --train.lr"]),
    (
        "train demo --train.gradient_checkpointing true",
        ["is not a field", "the nearest is train.tokens_per_batch"],
    ),
    ("train demo --train.eval_steps 10", ["is not a field", "the nearest is validation.every"]),
    ("train demo --data.system_prompt Hello", ["the nearest is data.system"]),
    ("sample potstill:base --temperature -1", ["temperature is -1.0", "0, which is greedy"]),
    ("evaluate potstill:base --source mmlu", ["'mmlu'", "gsm8k, math500, amc23, aime24"]),
    ("evaluate runs/nope", ["'runs/nope' does not exist", "the nearest is 'runs/none'"]),
    (
        "train demo --student.model some/model",
        ["'some/model' is not here nor in the hub's cache", "give a folder"],
    ),
    (
        "train demo --student.model gpt2",
        ["'gpt2' is no folder here", "a hub id has an owner", "openai-community/gpt2"],
    ),
    ("train nothing", ["'nothing' does not exist", "one of demo, opsd, qwen3, rl, sdft, smollm2"]),
    ("train mien.toml", ["'mien.toml' does not exist", "the nearest is 'mine.toml'"]),
    (
        "train demo --data.source a.jsonl,b.jsonl",
        ["give several files as a list", 'data.source = ["a.jsonl", "b.jsonl"]'],
    ),
    ("train demo --data.source promtps.csv", ["does not exist", "the nearest is 'prompts.csv'"]),
    ("train demo --data.source prompts.csv", ["has no column 'prompt'", "data.prompt_column"]),
    ("list", ["'list' is no command", "the nearest is runs"]),
    ("run demo", ["'run' is no command", "the nearest is train"]),
    ("report prompts.csv", ["prompts.csv"]),
    ("report runs", ["is no run folder", "`potstill runs FOLDER`"]),
    ("train student", ["'student' is a folder", "give a TOML file"]),
]


@pytest.fixture(scope="module")
def yard(tmp_path_factory):
    folder = write_pair(tmp_path_factory.mktemp("yard"))
    (folder / "runs/none").mkdir(parents=True)
    (folder / "mine.toml").write_text('[student]\nmodel = "student"\n')
    (folder / "prompts.csv").write_text("question,answer\nIs it?,yes\n")
    return folder


@pytest.mark.parametrize(("line", "parts"), MISTAKES)
def test_a_mistake_ends_in_one_line_to_act_on(line, parts, yard, monkeypatch, capsys):
    monkeypatch.chdir(yard)
    before = sorted(yard.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line))
    printed = capsys.readouterr()
    (error,) = printed.err.splitlines()
    assert ended.value.code == 2
    assert error.startswith("potstill: ") and printed.out == ""
    assert all(part in error for part in parts), error
    assert "pydantic" not in error and "Traceback" not in error and "tyro" not in error
    assert sorted(yard.rglob("*")) == before


def test_a_terminal_of_ascii_alone_gets_the_same_line():
    """tyro then draws no frames."""
    box = (
        " Value error\n ------- \n  Error parsing sampling: temperature is -1.0: it must be\n"
        "  at least 0\n -------\n  For full helptext, see potstill sample --help\n"
    )
    assert _sentence(box) == (
        "sampling: temperature is -1.0: it must be at least 0; see potstill sample --help"
    )


# Changes that a default of a shipped recipe could refuse, or ruin.
NO_MISTAKES = {
    "a few steps": ("--train.steps 5", "warmup_steps = 0"),
    "a model of one's own": ("--student.model student", None),
    "a file of one's own": ("--data.source prompts.jsonl", None),
}


@pytest.mark.parametrize("name", NO_MISTAKES)
def test_defaults_of_the_demo_give_way(name, yard, monkeypatch, capsys):
    monkeypatch.chdir(yard)
    given, field = NO_MISTAKES[name]
    main(["train", "demo", *given.split(), "--dry-run"])
    recipe = capsys.readouterr().out
    assert field is None or field in recipe
    assert ("lr = 0.003" in recipe) == (name != "a model of one's own")
    assert ("num_prompts = 8192" in recipe) == (name != "a file of one's own")


def test_an_evaluation_that_cuts_its_responses_says_so():
    def row(share):
        return {"temperature": 1.0, "truncation": Estimate(share, 0.0, 1.0)}

    (line,) = cut_short([Entry(name="teacher", path=Path("t"), evals=[row(0.98), row(0.4)])], 64)
    assert line == (
        "teacher at T=1: 98% of the responses were cut at 64 tokens, most of them before an "
        "answer: raise --max-tokens"
    )


def test_slips_in_python_are_one_line(tmp_path):
    recipe = chat_recipe(tmp_path / "run")
    tokenizer = chat_tokenizer()
    model, other = chat_model(tokenizer, 0), chat_model(tokenizer, 1)
    for error, says, objects in (
        (ModelError, "without its tokenizer; give tokenizer=", {"student": model.model}),
        (ModelError, "'gpt2' is no folder here", {"student": "gpt2"}),
        (DataError, "give a list of strings", {"student": model, "prompts": "Is it?"}),
    ):
        with pytest.raises(error, match=says) as raised:
            train(recipe, **({"teacher": other, "prompts": MESSAGES} | objects))
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(RecipeError, match="give a Recipe, such as load_recipe"):
        train({"out": "runs/x"})
    assert not (tmp_path / "run").exists()


def test_a_run_is_a_student_to_go_on_from(yard, tmp_path, monkeypatch, capsys):
    """And the same command with another rate names both rates, and what to do."""
    monkeypatch.chdir(yard)
    words = "--student.model student --teacher.model teacher --data.source prompts.jsonl"
    fields = "--window.tokens 4 --train.steps 1 --train.prompts_per_step 2"
    given = [*words.split(), *fields.split()]
    recipe = tmp_path / "own.toml"
    recipe.write_text("")
    out = ["--out", str(tmp_path / "first")]
    main(["train", str(recipe), *given, *out])
    with pytest.raises(SystemExit):
        main(["train", str(recipe), *given, *out, "--train.lr", "1e-6"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "train.lr" in error and "choose another --out" in error
    given[1] = str(tmp_path / "first")
    main(["train", str(recipe), *given, "--out", str(tmp_path / "second")])
    assert json.loads((tmp_path / "second/metrics.jsonl").read_text())["step"] == 1
