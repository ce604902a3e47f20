"""Steps told to a function of the user's and to trackers: each once, resumed or not, and saved when
one fails."""

import json
import sys
from pathlib import Path

import pytest
from conftest import interrupted_at, tiny_recipe
from small_runs import FAST, rows_of

import potstill
from potstill.cli.app import main
from potstill.config import RecipeError, to_toml
from potstill.runs import run_folder
from potstill.tracking.trackers import numbers, refuse_missing

# Each writes what it is called with, as a package of its own would be installed.
FAKES = {
    "wandb": """
class Run:
    def log(self, numbers, step): write("log", step, numbers)
    def finish(self): write("finish")
def init(**options):
    write("init", options)
    return Run()
""",
    "trackio": """
def init(**options): write("init", options)
def log(numbers, step): write("log", step, numbers)
def finish(): write("finish")
""",
}
COMMON = """
import json, os
def write(*call):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(json.dumps(call) + chr(10))
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The calls of the fakes, which stand where packages are found."""
    log = tmp_path / "calls.jsonl"
    for name, code in FAKES.items():
        (tmp_path / f"packages/{name}").mkdir(parents=True)
        (tmp_path / f"packages/{name}/__init__.py").write_text(COMMON + code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("FAKE_LOG", str(log))
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    yield lambda: [json.loads(line) for line in log.read_text().splitlines()]
    for name in FAKES:
        sys.modules.pop(name, None)


def recipe_of(out: Path, **train):
    return tiny_recipe(out, **FAST, train={"steps": 6, "checkpoint_every": 2, **train})


def test_a_function_is_told_of_each_step_and_changes_nothing(tmp_path):
    rows = []

    def on_step(row):
        rows.append(dict(row))
        row["flops"].clear()
        row.clear()

    potstill.train(recipe_of(tmp_path / "told"), on_step=on_step, quiet=True)
    potstill.train(recipe_of(tmp_path / "alone"), quiet=True)
    assert rows_of(tmp_path / "told") == rows_of(tmp_path / "alone")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    logged = run_folder.read_rows(tmp_path / "told/metrics.jsonl")
    assert [row["seconds"] for row in rows] == [row["seconds"] for row in logged]
    # A finished run takes no step.
    potstill.train(recipe_of(tmp_path / "told"), on_step=on_step, quiet=True)
    assert len(rows) == 6


def test_what_the_function_raises_ends_the_run_with_the_step_saved(tmp_path, capsys):
    class Pruned(Exception):
        pass

    def prune(row):
        if row["step"] == 3:
            raise Pruned("enough")

    recipe = recipe_of(tmp_path / "run")
    with pytest.raises(Pruned, match="enough") as raised:
        potstill.train(recipe, on_step=prune)
    assert raised.value.__notes__ == ["step 3 is saved, and the same command goes on from there"]
    assert "ended by Pruned after a step: step 3 is saved" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run/checkpoint").iterdir()] == ["step-000003"]
    seen = []
    potstill.train(recipe, on_step=lambda row: seen.append(row["step"]), quiet=True)
    assert seen == [4, 5, 6]
    potstill.train(recipe_of(tmp_path / "alone"), quiet=True)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "alone")


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_the_same_tracker_run(tmp_path, calls, tracker):
    recipe = recipe_of(tmp_path / "run", tracker=tracker)
    with interrupted_at(5):
        potstill.train(recipe, quiet=True)
    # The last checkpoint is after step 4; the fifth was told and is done again.
    potstill.train(recipe, quiet=True)
    found = calls()
    assert [call[0] for call in found].count("init") == 2
    assert [call[1] for call in found if call[0] == "log"] == [1, 2, 3, 4, 5, 6]
    begun, again = (call[1] for call in found if call[0] == "init")
    assert begun == again and begun["resume"] == "allow" and begun["project"] == "potstill"
    assert begun["config"]["train"]["steps"] == 6
    if tracker == "wandb":
        assert begun["mode"] == "offline" and begun["id"]
    told = [call[2] for call in found if call[0] == "log"]
    rows = rows_of(tmp_path / "run")
    assert [row["loss"] for row in told] == [row["loss"] for row in rows]
    assert [row["flops/head"] for row in told] == [row["flops"]["head"] for row in rows]
    assert [call[0] for call in found][-1] == "finish"
    # No step depends on it.
    potstill.train(recipe_of(tmp_path / "alone"), quiet=True)
    assert rows == rows_of(tmp_path / "alone")


def test_a_tracker_that_comes_late_is_told_of_the_steps_before(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with interrupted_at(5):
        potstill.train(recipe_of(tmp_path / "run"), quiet=True)
    potstill.train(recipe_of(tmp_path / "run", tracker="wandb"), quiet=True)
    found = calls()
    assert [call[1] for call in found if call[0] == "log"] == [1, 2, 3, 4, 5, 6]
    assert (found[0][1]["mode"], found[0][1]["project"]) == ("online", "mine")


def test_a_tracker_that_fails_is_one_line_and_the_step_is_saved(
    tmp_path, calls, monkeypatch, capsys
):
    (tmp_path / "packages/wandb/__init__.py").write_text(
        COMMON + FAKES["wandb"].replace('write("log", step', "assert step < 3, 'no disk'; (step")
    )
    recipe = recipe_of(tmp_path / "run", tracker="wandb")
    (tmp_path / "recipe.toml").write_text(to_toml(recipe.resolved()))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "recipe.toml")])
    *_, before, last = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and before.endswith(
        "step 3 is saved, and the same command goes on from there"
    )
    assert last == (
        'potstill: train.tracker = "wandb" failed: no disk; mend that, or remove train.tracker to '
        "go on without"
    )
    potstill.train(recipe_of(tmp_path / "run"), quiet=True)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(tmp_path, monkeypatch):
    # Where it was used it leaves a folder of its name, which is no package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    if "wandb" in sys.modules or (Path(sys.prefix) / "bin/wandb").exists():
        pytest.skip("it is installed here")
    with pytest.raises(RecipeError, match=r"not installed: pip install wandb$"):
        potstill.train(recipe_of(tmp_path / "run", tracker="wandb"), quiet=True)
    assert not (tmp_path / "run").exists()
    refuse_missing(None)


def test_numbers_of_a_row_are_the_finite_ones_by_name():
    row = {
        "step": 3,
        "loss": 0.5,
        "prefix": "student",
        "reverse_kl": None,
        "grad_norm": float("nan"),
        "flops": {"head": 2},
        "by_writer": {"teacher": {"length": 1.5}},
        "end_habits": {"student": {"<eos>": 0.5}},
    }
    assert numbers(row) == {"loss": 0.5, "flops/head": 2, "by_writer/teacher/length": 1.5}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_what_was_written(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = recipe_of(tmp_path / "run", tracker="tensorboard")
    with interrupted_at(5):
        potstill.train(recipe, quiet=True)
    potstill.train(recipe, quiet=True)
    events = reader.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    rows = rows_of(tmp_path / "run")
    points = events.Scalars("loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
    assert [point.value for point in points] == pytest.approx([row["loss"] for row in rows])
