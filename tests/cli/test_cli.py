"""The command line as a user meets it: exit codes, one line for bad input, nothing written."""

import re
import subprocess
import sys
import textwrap
from importlib import import_module

import pytest
from conftest import tiny_recipe

from potstill.cli.app import COMMANDS, main
from potstill.cli.field_help import EXAMPLES
from potstill.cli.overrides import split_overrides
from potstill.config import WEIGHTINGS, RecipeFields, field_names, to_toml

CONSOLE = ("console", "console.boundary", "console.printable")


def run(capsys, *argv):
    """Exit code, standard output and standard error of a command in this process."""
    try:
        main(list(argv))
        code = 0
    except SystemExit as error:
        code = error.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def loaded_by(*arguments):
    """The modules that Python has loaded at the end of a help text, and the text."""
    program = "import sys; from potstill.__main__ import main\n"
    program += "try: main()\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stderr.split()), done.stdout


def test_every_command_is_a_function_and_has_a_line(capsys):
    _, text, _ = run(capsys, "--help")
    for command, module in COMMANDS.items():
        function = getattr(import_module(f"potstill.cli.{module}"), command.split()[-1])
        summary = function.__doc__.partition("\n")[0]
        assert f"  {command}  {summary}" in re.sub(r" {2,}", "  ", text) and summary.endswith(".")


def test_help_says_what_each_option_is(capsys):
    """A docstring whose continued lines are not indented would be printed as it is."""
    for command in COMMANDS:
        code, text, _ = run(capsys, *command.split(), "--help")
        assert code == 0 and "Args:" not in text and "A section from Python" not in text


def test_the_list_of_commands_loads_nothing_but_what_prints_it():
    before = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    for arguments in (["--help"], ["cache", "--help"]):
        loaded, text = loaded_by(*arguments)
        ours = {name for name in loaded if name.startswith("potstill.")}
        assert ours == {f"potstill.{name}" for name in ("__main__", "cli", "cli.app", *CONSOLE)}
        others = {name.partition(".")[0] for name in loaded - ours - set(before.stdout.split())} - {
            "potstill"
        }
        assert others <= sys.stdlib_module_names
        assert text.startswith("usage: potstill") and max(map(len, text.splitlines())) <= 100


def test_help_of_a_command_loads_no_models():
    for command in ("train", "evaluate", "study"):
        loaded, text = loaded_by(*command.split(), "--help")
        assert f"usage: potstill {command}" in text
        assert not {"torch", "transformers", "datasets", "scipy", "plotly"} & loaded


def test_help_shows_the_fields_that_everyone_sets_and_help_all_every_field(capsys, monkeypatch):
    command, schema = "train", RecipeFields
    monkeypatch.setenv("COLUMNS", "100")
    code, few, _ = run(capsys, command, "--help")
    code_all, everything, _ = run(capsys, command, "demo", "--help-all")
    assert code == code_all == 0
    # The marks by hand, as a reader would look for them in the source.
    first = {name for name in field_names(schema) if f"--{name.replace('_', '-')} (" in few}
    assert {
        "out",
        "data.source",
        "window.tokens",
        f"{command}.steps",
        f"{command}.lr",
    } <= first and len(first) <= 12
    shown = [
        name
        for name in field_names(schema)
        if everything.count(f"  --{name.replace('_', '-')} (") == 1
    ]
    assert shown == field_names(schema)
    num_others = len(shown) - len(first)
    assert (
        few.splitlines()[-1]
        == f"potstill {command} --help-all also shows the other {num_others} fields."
    )
    assert all(len(line) <= 100 for line in everything.splitlines())


def test_examples_of_the_help_run(tmp_path, monkeypatch, capsys):
    """Each is printed as it stands, and resolves to a recipe."""
    monkeypatch.chdir(tmp_path)
    for command, examples in EXAMPLES.items():
        _, text, _ = run(capsys, command, "--help")
        for words, _, recipe in examples:
            (tmp_path / "my.toml").write_text(recipe)
            assert words in text and textwrap.indent(recipe, " " * 8) in text
            code, resolved, err = run(capsys, *words.split()[1:], "--dry-run")
            assert code == 0, err
            assert f'out = "{words.split()[-1]}"' in resolved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.toml"], "recipe 'none.toml' does not exist"),
        (["train", "demo", "--objective.prefx", "student"], "the nearest is objective.prefix"),
        (["train", "demo", "--train.steps", "x"], "train.steps is 'x'"),
        (["train", "demo", "--train.steps"], "--train.steps has no value"),
        (
            ["train", "demo", "--method", "sft", "--objective.kl", "reverse"],
            "both set objective.kl",
        ),
        (["train", "demo", "--student.model", "no/such/folder"], "'no/such/folder' does not exist"),
        (["train", "demo", "--data.source", "none.jsonl"], "data.split is set but not read"),
        (["train", "demo", "--data.source", "multiplication:genius"], "no writer 'genius'"),
        (["evaluate", "potstill:nobody"], "is not a shipped model"),
        (["evaluate", "potstill:base", "--source", "table.jsonl"], "can be scored"),
        (["evaluate", "potstill:base", "--num-problems", "391"], "at most 390 are distinct"),
        (["sample", "potstill:base", "--source", "nothing"], "can be scored"),
        (["evaluate", "potstill:base", "--train.lr", "1"], "--train.lr is a field of a recipe"),
        (["train", "rl", "--student.model", "no/such/it"], "'no/such/it' does not exist"),
        (["study", "none"], "study 'none' does not exist"),
        (["report", "none"], "is no run folder, study folder or evaluation file"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "train":
        (tmp_path / "demo").write_text('[data]\nsource = "multiplication"\nsplit = "train"\n')
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert message in err and err.startswith("potstill: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_prints_a_recipe_that_runs_the_same(tmp_path, capsys):
    code, out, _ = run(
        capsys, "train", "demo", "--method", "dagger", "--train.lr", "1e-3", "--dry-run"
    )
    assert code == 0
    (tmp_path / "printed.toml").write_text(out)
    code, again, _ = run(capsys, "train", str(tmp_path / "printed.toml"), "--dry-run")
    assert again == out and 'prefix = "student"\nkl = "forward"' in out and "lr = 0.001" in out


def test_overrides_are_read_as_toml_would():
    line = "r.toml --train.lr 1e-3 --dry-run --objective.kl=mixed --evaluation.temperatures 1.0 0.5"
    rest, overrides = split_overrides(
        "train", f"{line} --train.checkpoint-every 5 --out runs/x".split()
    )
    assert rest == ["r.toml", "--dry-run"]
    assert overrides == {
        "train.lr": 1e-3,
        "objective.kl": "mixed",
        "evaluation.temperatures": [1.0, 0.5],
        "train.checkpoint_every": 5,
        "out": "runs/x",
    }


def test_methods_prints_the_grid_and_the_weightings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run(capsys, "methods")
    assert code == 0 and all(
        name in out for name in ("sft", "dagger", "offline-rl", "opd", "teacher prefix")
    )
    words = out.split()
    for name, weighting in WEIGHTINGS.items():
        assert name in words and all(word in words for word in weighting.about.split()[:-1])
    assert " ".join(words).count("= 0.8); EOPD, arXiv 2603.07079") == 1
    assert max(map(len, out.splitlines())) <= 100
    assert "torch" not in loaded_by("methods")[0]


def test_train_evaluate_sample_report(tmp_path, capsys):
    """The whole way of a user through small numbers."""
    evaluation = {"source": "multiplication", "num_problems": 3, "num_responses": 2}
    recipe = tiny_recipe(tmp_path / "run", evaluation=evaluation)
    (tmp_path / "recipe.toml").write_text(to_toml(recipe.resolved()))
    code, out, err = run(capsys, "train", str(tmp_path / "recipe.toml"))
    assert code == 0 and "Avg@2 T=1" in out and "step 4/4" in err and "end set: <eos> (2)" in err
    few = ["--num-problems", "3", "--num-responses", "2"]
    code, out, _ = run(capsys, "evaluate", str(tmp_path / "run"), "potstill:base", *few)
    assert code == 0 and "base" in out
    code, out, _ = run(
        capsys, "evaluate", "potstill:base", *few, "--out", str(tmp_path / "base.json")
    )
    assert code == 0 and (tmp_path / "base.json").exists()
    code, out, _ = run(capsys, "sample", str(tmp_path / "run"), "--num", "2")
    assert code == 0 and out.count("stopped by") == 2 and "answer" in out
    code, out, _ = run(
        capsys,
        "sample",
        "potstill:teacher",
        "--prompt",
        "__12*3=",
        "--num",
        "1",
        "--temperature",
        "0",
    )
    assert code == 0 and "36" in out
    code, out, _ = run(
        capsys,
        "report",
        str(tmp_path / "run"),
        str(tmp_path / "base.json"),
        "--out",
        str(tmp_path / "r.html"),
    )
    assert code == 0 and (tmp_path / "r.html").stat().st_size > 1_000_000
