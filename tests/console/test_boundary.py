"""Errors that are not ours, signals, and text that would steer the terminal."""

import ast
import errno
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from conftest import tiny_recipe
from synthetic_runs import evaluate, write_run
from waiting import SECONDS, wait_until

import potstill
from potstill.config import RecipeError, make_recipe, to_toml
from potstill.console import boundary as limits
from potstill.console.boundary import Stopped, boundary, describe_error, naming, stop_asked_for
from potstill.console.printable import one_line, printable, say
from potstill.report.terminal import print_table
from potstill.runs.results import read_entry
from potstill.runs.run_folder import read_rows
from potstill.study.file import Study
from potstill.study.planning import plan
from potstill.study.run import print_plan
from potstill.training import step as step_parts
from potstill.training.loop import train


def raised(error):
    """Exit code of an error behind the boundary."""
    with pytest.raises(SystemExit) as stop, boundary():
        raise error
    return stop.value.code


def safetensors_error(tmp_path):
    from safetensors import safe_open

    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(Exception) as error, naming(tmp_path / "cut.safetensors"):
        safe_open(tmp_path / "cut.safetensors", "pt").__enter__()
    return error.value


def template_error(tmp_path):
    import jinja2

    with pytest.raises(jinja2.TemplateError) as error:
        jinja2.Template(
            "{{ raise_exception('no system role') }}", undefined=jinja2.StrictUndefined
        ).render()
    return error.value


def json_error(tmp_path):
    with pytest.raises(ValueError) as error, naming("plan.json"):
        json.loads("{")
    return error.value


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a"),
            "'runs/a': no space left on device; free some",
        ),
        (OSError(errno.EFBIG, "File too large", "runs/a"), "ulimit -f"),
        (
            OSError(errno.EROFS, "Read-only file system", b"runs/b"),
            "'runs/b': read-only file system; choose a place",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x"),
            "'x': file name too long; choose a shorter name",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/r"),
            "'/r': permission denied; choose another place",
        ),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "d"),
            "'d': is a directory; a file is needed",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "f/x"),
            "a part of the path is a file",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "f"), "'f': file exists"),
        (OSError(errno.EMFILE, "Too many open files", "f"), "ulimit -n"),
        (MemoryError(), "there is not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "there is not enough memory",
        ),
        (RecursionError("maximum recursion depth"), "the input is nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"), "a file is no UTF-8 text"),
        (RecipeError("recipe 'x'\x1b[31m\nis bad"), "recipe 'x'\\u001b[31m is bad"),
        (safetensors_error, "cut.safetensors': the file of weights is damaged"),
        (template_error, "a chat template refuses the messages"),
        (json_error, "'plan.json': a file is no JSON"),
    ],
)
def test_errors_that_are_not_bugs_are_one_line(tmp_path, capsys, error, says):
    assert (
        raised(error(tmp_path) if callable(error) and not isinstance(error, Exception) else error)
        == 2
    )
    err = capsys.readouterr().err
    assert (
        err.startswith("potstill: ") and err.count("\n") == 1 and err.endswith("\n") and says in err
    )


@pytest.mark.parametrize(
    "error",
    [KeyError("step"), TypeError("x"), AttributeError("x"), RuntimeError("x"), ValueError("x")],
)
def test_bugs_keep_their_traceback(error):
    assert describe_error(error) is None
    with pytest.raises(type(error)), boundary():
        raise error


def test_signals_have_their_exit_codes(capsys):
    assert raised(KeyboardInterrupt()) == 130
    assert raised(Stopped(signal.SIGTERM)) == 143
    assert raised(Stopped(signal.SIGHUP, "stopped after step 3")) == 129
    assert capsys.readouterr().err.splitlines()[-1] == "potstill: stopped after step 3"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        with pytest.raises(SystemExit) as stop, boundary():
            os.kill(os.getpid(), number)
            time.sleep(1)
        assert stop.value.code == code
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_does_not_wait(monkeypatch):
    """One that comes with the first is the same, as where a terminal tells a study's processes and
    then the study."""
    # However long this process is kept from its second call.
    monkeypatch.setattr(limits, "AT_ONCE", float("inf"))
    with stop_asked_for() as asked:
        assert asked() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() == signal.SIGTERM
        monkeypatch.setattr(limits, "AT_ONCE", 0.0)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def command(*arguments, **options):
    """A command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "potstill", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["methods"], 1), (["train", "demo", "--dry-run"], 141), (["--help"], 141)],
)
def test_a_reader_that_has_gone_is_no_error(arguments, code):
    """As after `| head`; rich has its own exit code for it."""
    reader, writer = os.pipe()
    os.close(reader)
    process = command(*arguments, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code and err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_output_is_one_line():
    with open("/dev/full", "w") as full:
        process = command("train", "demo", "--dry-run", stdout=full)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 2 and err.count("\n") == 1 and "no space left on device" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_importing_is_no_traceback(number):
    code = (
        "import os, sys, builtins\n"
        "from potstill.__main__ import main\n"
        "real = builtins.__import__\n"
        "def late(name, *rest):\n"
        "    if name == 'pydantic':\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = late\n"
        "sys.argv = ['potstill', 'methods']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 128 + number
        and "Traceback" not in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_training_saves_its_step_when_it_is_asked_to_end(tmp_path):
    """The step that a signal finds is finished and saved, whatever checkpoint_every is; the end is
    the same."""
    recipe = tiny_recipe(tmp_path / "run", train={"steps": 4000, "checkpoint_every": 10_000})
    (tmp_path / "recipe.toml").write_text(to_toml(recipe.resolved()))
    process = command("train", str(tmp_path / "recipe.toml"), stdout=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "run" / "metrics.jsonl").exists, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.communicate()
    num_steps = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert process.returncode == 143 and 1 <= num_steps < 4000
    assert f"stopped after step {num_steps}, which is saved" in err and "Traceback" not in err
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == [
        f"step-{num_steps:06}"
    ]


def test_a_stop_in_the_middle_of_a_round_changes_nothing(tmp_path, monkeypatch):
    """The second of three steps on the same rollouts is asked to end; the run that goes on equals
    the whole one."""
    sections = {"train": {"checkpoint_every": 1000}, "rollouts": {"reuse": 3}}
    train(tiny_recipe(tmp_path / "whole", **sections), quiet=True)
    real = step_parts.learning_rate

    def asked_in_step_2(config, step, flops):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(config, step, flops)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="SIGTERM"):
        patch.setattr(step_parts, "learning_rate", asked_in_step_2)
        train(tiny_recipe(tmp_path / "stopped", **sections), quiet=True)
    assert [row["step"] for row in read_rows(tmp_path / "stopped" / "metrics.jsonl")] == [1, 2]
    train(tiny_recipe(tmp_path / "stopped", **sections), quiet=True)
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped")]
    assert [[row["loss"], row["rollout_age"]] for row in rows[0]] == [
        [r["loss"], r["rollout_age"]] for r in rows[1]
    ]
    weights = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes()
        for name in ("whole", "stopped")
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 数 \u0645 \U0001f600", "plain ü 数 \u0645 \U0001f600"),
        ("a\x1b[31mb\x07\x00\x7f", "a\\u001b[31mb\\u0007\\u0000\\u007f"),
        ("a\x9b1mb\r", "a\\u009b1mb\\u000d"),
        ("a\u202eb\u2066c\u200fd", "a\\u202eb\\u2066c\\u200fd"),
        ("a\u2028b\ufeff\ue000", "a\\u2028b\\ufeff\\ue000"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        ("a\n\tb", "a\n\tb"),
    ],
)
def test_what_steers_a_terminal_is_written_out(text, shown):
    assert printable(text) == shown
    assert "\n" not in one_line(text + "\nmore")


def test_everything_is_printed_through_one_place():
    """No other module calls print, or gives rich a text that it would read for markup."""
    source = Path(potstill.__file__).parent
    # The worker of the grader answers its parent; the boundary prints one line of its own.
    printing = ("console/printable", "answers/grading", "console/boundary")
    for path in set(source.rglob("*.py")) - {source / f"{name}.py" for name in printing}:
        calls = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        ]
        assert not [
            call.lineno
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id == "print"
        ], path
        rows = [
            call
            for call in calls
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_row"
        ]
        texts = [
            argument
            for call in rows
            for argument in call.args
            if isinstance(argument, ast.Attribute)
        ]
        assert not [text.lineno for text in texts], path


def test_what_a_run_is_called_steers_nothing(tmp_path, capsys):
    """A title, a folder and a model's name with escapes, marks of direction and markup, in every
    table."""
    name = "[/x][red]a\x1b[31m\u202eb"
    recipe = tiny_recipe(tmp_path / name)
    assert "\x1b" not in to_toml(recipe.resolved()) and "\u202e" not in to_toml(recipe.resolved())
    assert str(make_recipe(tomllib.loads(to_toml(recipe.resolved()))).out).endswith(name)
    run = write_run(tmp_path / name, evaluate(0, 0.5))
    print_table([read_entry(run)])
    study = Study.model_validate(
        {
            "out": tmp_path / name,
            "panels": [{"title": name, "groups": [{"label": name, "axes": {"method": ["opd"]}}]}],
        }
    )
    study = study.model_copy(
        update={"panels": tuple(p.model_copy(update={"recipe": "demo"}) for p in study.panels)}
    )
    print_plan(study, plan(study, {}), {}, 1, True, list_all=True)
    say(name)
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert "\x1b" not in text and "\u202e" not in text
    assert "[/x][red]a\\u001b[31m\\u202eb" in captured.out.replace("\n", "")
