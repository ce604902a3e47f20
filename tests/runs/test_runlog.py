"""A run folder after kills, torn lines and damage: nothing is doubled, lost or taken without a
word."""

import json
import os
import shutil

import pytest
import torch
from conftest import interrupted_at, tiny_recipe
from safetensors.torch import load_file, save_file
from small_runs import EVALUATION, FAST, assert_same_run, kill, rows_of
from synthetic_runs import evaluate as evaluated
from synthetic_runs import write_run

import potstill
from potstill import files
from potstill.cli.app import main
from potstill.models.language_model import load_model
from potstill.runs import run_folder
from potstill.runs.results import read_entry, read_panels
from potstill.runs.run_folder import RunError
from potstill.training import checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    return potstill.train(
        tiny_recipe(tmp_path_factory.mktemp("whole") / "run", **FAST), quiet=True
    ).folder


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    recipe = tiny_recipe(tmp_path_factory.mktemp("stopped") / "run", **FAST)
    with interrupted_at(3):
        potstill.train(recipe, quiet=True)
    assert (recipe.out / "checkpoint/step-000002").is_dir() and len(rows_of(recipe.out)) == 3
    return recipe.out


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """The recipe of a run that was stopped in step 4, after the checkpoint of step 2."""
    return tiny_recipe(shutil.copytree(stopped_once, tmp_path / "run"), **FAST)


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def rename_a_tensor(path):
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({"other" if key == name else key: value for key, value in tensors.items()}, path)


FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
DAMAGES = {
    **{
        f"a bit at {where}": lambda path, where=where: flip(path, where)
        for where in (0, 0.001, 0.5, 1)
    },
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def student():
    return load_model("potstill:base")


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_refused_and_named(stopped, student, file):
    path = stopped.out / "checkpoint/step-000002"
    kept, weights = (path / file).read_bytes(), [p.clone() for p in student.parameters()]
    optimizer = torch.optim.AdamW(student.parameters())
    for name, damage in DAMAGES.items():
        damage(path / file)
        with pytest.raises(
            RunError, match=rf"'[^']*{file}' .*remove the folder '[^']*checkpoint' to begin again"
        ):
            checkpoint.load(path, student, optimizer)
            pytest.fail(name)
        (path / file).write_bytes(kept)
    # Nothing was loaded of it.
    assert all(torch.equal(a, b) for a, b in zip(weights, student.parameters(), strict=True))
    flip(path / file, 0.5)
    with pytest.raises(RunError, match=file):
        potstill.train(stopped, quiet=True)


def test_a_checkpoint_of_other_names_is_refused(stopped):
    """Also where its checksums are right: a tensor that is not there would keep the base model's
    weights."""
    path = stopped.out / "checkpoint/step-000002"
    rename_a_tensor(path / "model.safetensors")
    data = json.loads((path / "state.json").read_text())
    data["files"]["model.safetensors"] = checkpoint.file_digest(path / "model.safetensors")
    (path / "state.json").write_text(
        checkpoint.seal({key: data[key] for key in data if key != "checksum"})
    )
    with pytest.raises(RunError, match=r"model.safetensors' has the weights of another model"):
        potstill.train(stopped, quiet=True)


def test_removing_a_damaged_checkpoint_begins_again(stopped, whole):
    folder = stopped.out / "checkpoint"
    flip(folder / "step-000002/model.safetensors", 0.5)
    (folder / "step-000002").rename(stopped.out / "aside")
    folder.rmdir()
    potstill.train(stopped, quiet=True)
    assert_same_run(stopped.out, whole)


def test_what_is_not_ours_in_the_checkpoint_folder_stays(stopped, whole, tmp_path):
    folder = stopped.out / "checkpoint"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/step-000001").mkdir()
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "step-000009").write_text("a file")
    (folder / "step-000001").symlink_to(
        tmp_path / "elsewhere/step-000001", target_is_directory=True
    )
    (folder / "step-000002 copy").mkdir()
    (folder / "step-000002 copy/model.safetensors").write_bytes(b"precious")
    theirs = {path.name for path in folder.iterdir()} - {"step-000002"}
    # Left by kills: before a rename, and after one.
    for ours in ("unfinished-step-000004", "step-000000"):
        (folder / ours).mkdir()
        (folder / ours / "model.safetensors").write_bytes(b"")
    potstill.train(stopped, quiet=True)
    assert {path.name for path in folder.iterdir()} == theirs | {"step-000004"}
    assert (tmp_path / "elsewhere/step-000001").is_dir()
    assert_same_run(stopped.out, whole)


def test_an_older_checkpoint_that_a_kill_left_is_removed_on_resume(stopped):
    folder = stopped.out / "checkpoint"
    (folder / "step-000001").mkdir()
    with interrupted_at(3):
        potstill.train(stopped, quiet=True)
    assert [path.name for path in folder.iterdir()] == ["step-000002"]


def test_the_newest_checkpoint_is_so_by_number(tmp_path):
    for step in ("step-999999", "step-1000000"):
        (tmp_path / "checkpoint" / step).mkdir(parents=True)
    assert checkpoint.latest(tmp_path).name == "step-1000000"


def drop_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize(
    "damage", [drop_line, os.remove, lambda path: flip(path, 0.1), lambda path: path.write_text("")]
)
def test_rows_that_are_missing_up_to_the_checkpoint_are_noticed(stopped, name, damage):
    damage(stopped.out / name)
    with pytest.raises(RunError, match=rf"{name}' .* up to step 2, .*; restore it, or remove"):
        potstill.train(stopped, quiet=True)


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b"\0" * 300, b"\xff\n{}\nnothing\n"])
def test_whatever_follows_the_checkpoint_in_a_log_is_written_again(stopped, whole, tail):
    with (stopped.out / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    potstill.train(stopped, quiet=True)
    assert_same_run(stopped.out, whole)


def test_append_cuts_a_torn_row_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    for before, kept in (
        (b"", []),
        (b'{"a": 1}\n', [{"a": 1}]),
        (b'{"a": 1}\n{"a":', [{"a": 1}]),
        (b'{"a"', []),
    ):
        path.write_bytes(before)
        files.append(path, {"a": "é\u2028"})
        assert run_folder.read_rows(path) == [*kept, {"a": "é\u2028"}]
        assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"step": 1}\n{"st\n{"step": 3}\n', r"rows.jsonl', line 2 is not JSON .*; restore it"),
        (b'{"step": 1}\n\xff\xfe\n', r"line 2 is not UTF-8"),
        (b'{"step": 1}\n[2]\n', r"line 2 is not a JSON object"),
        (b'{"steps": 1}\n', r"line 1 has no 'step'"),
        (b"[" * 100_000 + b"\n", r"line 1 is not JSON"),
    ],
)
def test_broken_rows_are_named_by_file_and_line(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_bytes(text)
    with pytest.raises(RunError, match=message):
        run_folder.read_rows(tmp_path / "rows.jsonl", ("step",))


GARBAGE = {
    "broken": b'{"a": \n',
    "no keys": b"{}\n",
    "a list": b"[]\n",
    "not UTF-8": b"\xff\xfe\x00\n",
}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("name", ["metrics", "samples", "window", "evals"])
def test_a_damaged_run_is_refused_by_the_report_with_the_file(tmp_path, capsys, name, garbage):
    folder = write_run(tmp_path / "run", evaluated(0, 0.5))
    (folder / f"{name}.jsonl").write_bytes(GARBAGE[garbage])
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(folder), "--out", str(tmp_path / "report.html")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and f"{name}.jsonl', line 1" in said
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("garbage", [*GARBAGE, "empty"])
def test_a_damaged_evaluation_file_or_plan_is_refused(tmp_path, garbage):
    data = GARBAGE.get(garbage, b"")
    (tmp_path / "evaluation.json").write_bytes(data)
    (tmp_path / "study").mkdir()
    (tmp_path / "study/plan.json").write_bytes(data)
    for path, name in ((tmp_path / "evaluation.json", "evaluation"), (tmp_path / "study", "plan")):
        with pytest.raises(RunError, match=rf"{name}.json'.*; restore it, or remove it"):
            read_panels([path])


def test_a_damaged_environment_is_refused_before_any_step(stopped):
    for garbage in (*GARBAGE.values(), b""):
        (stopped.out / "environment.json").write_bytes(garbage)
        with pytest.raises(RunError, match=r"environment.json'.*restore it, or remove it"):
            potstill.train(stopped, quiet=True)
    (stopped.out / "environment.json").unlink()
    assert potstill.train(stopped, quiet=True).metrics["step"] == 4


def train_and_be_killed_before_done(out):
    run_folder.mark_done = kill
    potstill.train(tiny_recipe(out, evaluation=EVALUATION, **FAST), quiet=True)


def test_a_kill_between_evaluation_and_done_doubles_no_rows(tmp_path, forks):
    """SIGKILL of a real process when the rows are there and DONE is not."""
    recipe = tiny_recipe(tmp_path / "run", evaluation=EVALUATION, **FAST)
    assert forks.call(tmp_path, train_and_be_killed_before_done, str(recipe.out)).is_killed
    before = rows_of(recipe.out, "evals.jsonl")
    assert len(before) == 2 and not (recipe.out / "DONE").exists()
    potstill.train(recipe, quiet=True)
    assert rows_of(recipe.out, "evals.jsonl") == before
    # A finished run that is evaluated again in other settings keeps both, and a torn row is no
    # obstacle.
    with (recipe.out / "evals.jsonl").open("a") as file:
        file.write('{"step": 4, "mo')
    for _ in range(2):
        main(
            [
                "evaluate",
                str(recipe.out),
                "--num-problems",
                "3",
                "--num-responses",
                "2",
                "--temperatures",
                "1.0",
            ]
        )
    assert [row["num_problems"] for row in rows_of(recipe.out, "evals.jsonl")] == [4, 4, 3]
    assert len(read_entry(recipe.out).evals) == 2


def test_logs_reach_the_disk_before_what_makes_them_unrepeatable(tmp_path, monkeypatch):
    """The order of flushes and renames: logs, then the checkpoint's name; the model, then DONE."""
    events = []
    fsync, rename, replace = os.fsync, run_folder.Path.rename, run_folder.Path.replace

    def note_fsync(descriptor):
        events.append(
            ("fsync", os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path)))
        )
        fsync(descriptor)

    def note(real):
        def renamed(self, target):
            events.append(("name", str(target).removeprefix(str(tmp_path))))
            return real(self, target)

        return renamed

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(run_folder.Path, "rename", note(rename))
    monkeypatch.setattr(run_folder.Path, "replace", note(replace))
    potstill.train(tiny_recipe(tmp_path / "run", **FAST), quiet=True)
    named = events.index(("name", "/run/checkpoint/step-000004"))
    last = events.index(("name", "/run/checkpoint/step-000002"))
    for log in ("metrics", "samples"):
        assert ("fsync", f"/run/{log}.jsonl") in events[last:named]
    for file in FILES:
        assert ("fsync", f"/run/checkpoint/unfinished-step-000004/{file}") in events[last:named]
    done = events.index(("name", "/run/DONE"))
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert ("fsync", f"/run/model/{file}") in events[named:done]
    assert ("fsync", "/run") in events[done:]


def train_and_be_killed_in_a_checkpoint(out, kill_at):
    left = kill_at

    def counted(real):
        def call(*given, **options):
            nonlocal left
            left -= 1
            return real(*given, **options) if left else kill()

        return call

    for owner, name in ((run_folder.Path, "rename"), (shutil, "rmtree")):
        setattr(owner, name, counted(getattr(owner, name)))
    for owner in (checkpoint, run_folder, files):
        owner.flush = counted(owner.flush)
    potstill.train(tiny_recipe(out, **FAST), quiet=True)


@pytest.mark.parametrize(
    "kill_at", [5, 11, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 7, 8, 13, 14))]
)
def test_a_kill_at_any_moment_of_a_checkpoint_resumes_to_the_same_bits(
    tmp_path, forks, whole, kill_at
):
    """SIGKILL before one of the renames, removals and flushes of a run with two checkpoints."""
    recipe = tiny_recipe(tmp_path / "run", **FAST)
    assert forks.call(
        tmp_path, train_and_be_killed_in_a_checkpoint, str(recipe.out), kill_at
    ).is_killed
    potstill.train(recipe, quiet=True)
    assert_same_run(recipe.out, whole)
    assert [path.name for path in (recipe.out / "checkpoint").iterdir()] == ["step-000004"]
