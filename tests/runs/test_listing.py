"""The list of runs: every state, hostile names and damaged files, as a table and as JSON."""

import json
import subprocess
import sys

import pytest
from synthetic_runs import evaluate, rewarded, write_run

from potstill.cli.app import main
from potstill.config import RecipeError
from potstill.files import write_rows
from potstill.runs.listing import list_runs
from potstill.runs.results import read_entry
from potstill.runs.run_folder import locked


def table(capsys, *arguments):
    main(["runs", *map(str, arguments)])
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    """A folder with a run in every state, two of them deeper down."""
    root = tmp_path / "runs"
    write_run(root / "done", evaluate(0, 0.5), num_steps=120)
    stopped = write_run(root / "deep" / "er" / "stopped", [], num_steps=7)
    (stopped / "DONE").unlink()
    (stopped / "evals.jsonl").unlink()
    old = write_run(root / "old", [])
    (old / "recipe.toml").write_text('model = "potstill:base"\n[grpo]\nsteps = 2\n')
    torn = write_run(root / "torn", [])
    (torn / "metrics.jsonl").write_text('{"step": 1\n')
    crashed = write_run(root / "study" / "crashed", [], num_steps=3)
    (crashed / "DONE").unlink()
    planned = {"title": "", "note": "", "is_sweep": False}
    planned["runs"] = [
        {"folder": "crashed", "name": "c", "state": "crashed: there is\x1b[2J not enough memory"}
    ]
    (root / "study" / "plan.json").write_text(json.dumps({"panels": [planned]}))
    write_run(root / "going", [], num_steps=5, **rewarded("m", steps=9))
    # Not runs: files of a run's model, and what is hidden.
    write_run(root / "done" / "model" / "inner", [])
    write_run(root / ".trash" / "old", [])
    return root


def test_each_run_is_listed_with_its_state_and_numbers(folder):
    with locked(folder / "going", "run folder"):
        found = {run.name: run for run in list_runs(folder)}
    states = {name: run.state for name, run in found.items()}
    assert states == {
        "stopped": "stopped",
        "done": "finished",
        "going": "running",
        "crashed": "failed",
        "torn": "unreadable",
        "old": "unreadable",
    }
    assert "has a section [grpo], which is no recipe's" in found["old"].trouble
    with pytest.raises(RecipeError, match=r"has a section \[grpo\], which is no recipe's"):
        read_entry(folder / "old")
    assert {run.name: run.state for run in list_runs(folder)}["going"] == "finished"
    done, stopped, going = (found[name] for name in ("done", "stopped", "going"))
    assert (done.step, done.num_steps, done.seconds, done.method) == (120, 120, 60.0, "SFT")
    rows = [json.loads(line) for line in (folder / "done" / "evals.jsonl").read_text().splitlines()]
    assert done.avgs == tuple((row["temperature"], row["avg"][0]) for row in rows)
    assert (stopped.step, stopped.num_steps, stopped.avgs) == (7, 120, ())
    assert (going.method, going.num_steps) == ("GRPO", 9)
    assert "metrics.jsonl', line 1 is not JSON" in found["torn"].trouble


def test_only_the_evaluation_of_the_student_as_it_is_counts(folder):
    path = folder / "done" / "evals.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    older, newer = (
        [row | {"step": step, "avg": [avg] * 3} for row in rows]
        for step, avg in ((60, 0.9), (120, 0.25))
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *newer, *older]))
    assert list_runs(folder / "done")[0].avgs == ((1.0, 0.25), (0.6, 0.25))


def test_the_table_fits_and_steers_nothing(folder, capsys):
    write_run(folder / "\x1b[31mred\u202e\nname", [], num_steps=1)
    long = folder / "a-folder-with-a-long-name" / "and-one-in-it-that-is-longer-still"
    write_run(long, [], objective={"prefix": "mixed", "kl": "mixed"})
    text = table(capsys, folder)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert not {"\x1b", "\u202e"} & set(text)
    assert "\\u001b[31mred\\u202e name" in text and "there is\\u001b[2J not enough memory" in text
    assert lines[0].startswith("8 runs in ")
    row = next(line.split() for line in lines if line.startswith("done"))
    assert row[:4] == ["done", "SFT", "120/120", "finished"] and row[-1] == "1:00"
    # A long name is whole, on a line of its own.
    assert str(long.relative_to(folder)) in lines


def test_json_has_the_same(folder, capsys):
    path = folder / "done" / "metrics.jsonl"
    rows = [json.loads(line) | {"loss": float("nan")} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = json.loads(table(capsys, folder, "--json"), parse_constant=pytest.fail)
    done = next(run for run in found if run["name"] == "done")
    assert done["folder"] == str(folder / "done") and done["loss"] is None
    assert [each["temperature"] for each in done["evaluations"]] == [1.0, 0.6]


@pytest.mark.parametrize(
    ("goal", "values", "shown"),
    [
        ("student_prefix_reverse_kl", (0.5, 0.25, 0.25), "(nats): 0.2500"),
        ("score", (0.5, 0.75, 0.25), "(%): 75.0"),
    ],
)
def test_the_best_validation_is_the_one_that_is_kept(tmp_path, capsys, goal, values, shown):
    run = write_run(tmp_path / "run", [], validation={"keep_best": goal})
    rows = [{"step": 20 * i, goal: [value] * 3} for i, value in enumerate(values)]
    write_rows(run / "validation.jsonl", rows)
    assert list_runs(tmp_path)[0].best == (goal, 20, values[1])
    line = next(line for line in table(capsys, tmp_path).splitlines() if "best validation" in line)
    assert "after step 20" in line and line.endswith(shown)
    (found,) = json.loads(table(capsys, tmp_path, "--json"))
    assert found["best_validation"] == {"quantity": goal, "step": 20, "value": values[1]}
    write_rows(run / "validation.jsonl", [{"step": 20}])
    assert f"has no '{goal}'" in list_runs(tmp_path)[0].trouble


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": 1, "seconds": "\x1b[2J"}, "where a number belongs"),
        ({"step": [1], "seconds": 1}, "where a number belongs"),
        ({"step": 1}, "has no 'seconds'"),
    ],
)
def test_what_is_no_number_is_said(folder, row, message):
    (folder / "done" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run,) = list_runs(folder / "done")
    assert run.state == "unreadable" and message in run.trouble


def test_a_folder_without_runs_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, "has no runs in it"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "n", "exist"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["runs", str(path)])
        said = capsys.readouterr()
        assert (
            stop.value.code == 2
            and said.out == ""
            and said.err.count("\n") == 1
            and message in said.err
        )


def test_it_loads_no_torch(folder):
    program = (
        "import sys; from potstill.cli.app import main; main(sys.argv[1:]); print('torch' "
        "in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "runs", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"
