"""Going on with a run: what may change, what makes it another run, and steps past its end."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import interrupted_at, tiny_recipe
from safetensors.torch import load_file
from small_runs import EVALUATION, FAST, assert_same_run, kill, rows_of, weights_of

import potstill
from potstill import files
from potstill.cli.app import main
from potstill.config import load_recipe, to_toml
from potstill.engines import native
from potstill.evaluation import scores
from potstill.models.language_model import ModelError, load_model
from potstill.runs import run_folder
from potstill.runs.results import EVAL_COLUMNS, read_entry
from potstill.runs.run_folder import RunError
from potstill.training import checkpoint
from potstill.training.rates import learning_rate


def recipe_of(out, **sections):
    return tiny_recipe(
        out, **{name: FAST.get(name, {}) | sections.get(name, {}) for name in {**FAST, **sections}}
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return potstill.train(recipe_of(tmp_path_factory.mktemp("whole") / "run"), quiet=True).folder


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a finished run that may be changed."""
    return shutil.copytree(whole, tmp_path / "run")


def stop(out, **sections):
    with interrupted_at(3):
        potstill.train(recipe_of(out, **sections), quiet=True)


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop(folder)
    return folder


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"checkpoint_every": 1}},
        {"train": {"loss_memory": 0, "activation_checkpointing": True}},
        {"evaluation": EVALUATION, "train": {"checkpoint_every": 3}},
    ],
)
def test_what_changes_no_result_may_change(tmp_path, whole, stopped_once, sections):
    shutil.copytree(stopped_once, tmp_path / "run")
    changed = recipe_of(tmp_path / "run", **sections)
    potstill.train(changed, quiet=True)
    assert all(
        torch.equal(tensor, weights_of(whole)[name])
        for name, tensor in weights_of(tmp_path / "run").items()
    )
    assert rows_of(tmp_path / "run") == rows_of(whole)
    assert len(rows_of(tmp_path / "run", "evals.jsonl")) == 2 * ("evaluation" in sections)
    # The folder says what its run now is, and what it was.
    assert load_recipe(tmp_path / "run/recipe.toml").hash() == changed.hash()
    (change,) = json.loads((tmp_path / "run/environment.json").read_text())["changes"]
    assert change["num_steps"] == 3
    for name, (before, now) in change["fields"].items():
        section, _, field = name.partition(".")
        assert now == json.loads(changed.model_dump_json())[section][field] != before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.tokens_per_batch", 64),
        pytest.param("sampling.batch_size", 3, marks=pytest.mark.slow),
    ],
)
def test_what_changes_rounding_may_change_and_is_said(tmp_path, capsys, name, value):
    sections = {"objective": {"prefix": "student"}, "data": {"source": "multiplication"}}
    stop(tmp_path / "run", **sections)
    section, _, field = name.partition(".")
    changed = recipe_of(tmp_path / "run", **{**sections, section: {field: value}})
    potstill.train(changed)
    said = capsys.readouterr().err
    assert f"{name} is {value} and was " in said and "differs by rounding" in said
    assert (tmp_path / "run/DONE").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"steps": 5}},
            r"train.steps is 4 there and 5 here\); go on with --extend-to 5, or choose another",
        ),
        (
            {"train": {"steps": 3, "warmup_steps": 1}},
            r"train.steps is 4 there and 3 here\); choose another --out",
        ),
        ({"train": {"lr": 0.5}}, "train.lr is "),
        ({"train": {"seed": 1}}, "train.seed is 0 there and 1 here"),
        ({"train": {"extended": [[1, 2]]}}, "train.extended is "),
        ({"data": {"num_prompts": 32}}, "data.num_prompts is 64 there and 32 here"),
        (
            {"train": {"loss_backend": "plain"}},
            'train.loss_backend is "auto" there and "plain" here',
        ),
    ],
)
def test_what_makes_another_run_is_refused(finished, sections, message):
    changed = recipe_of(finished, **sections)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=message) as refused:
        potstill.train(changed, quiet=True)
    # Hours of work may be in it.
    assert "remove" not in str(refused.value) and "this run is finished" in str(refused.value)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    (finished / "DONE").unlink()
    with pytest.raises(RunError, match="choose another --out or remove the folder"):
        potstill.train(changed, quiet=True)


def evaluate_and_be_killed(out):
    scores.write_atomically = kill
    potstill.train(recipe_of(out, evaluation=EVALUATION), quiet=True)


def test_a_finished_run_is_evaluated_anew(finished, whole, forks):
    """In other settings, without its checkpoint, and by a process that is killed in the middle."""
    shutil.rmtree(finished / "checkpoint")
    first = recipe_of(finished, evaluation=EVALUATION)
    assert not run_folder.is_done(finished, first) and run_folder.is_trained(finished, first)
    assert forks.call(finished, evaluate_and_be_killed, str(finished)).is_killed
    assert len(rows_of(finished, "evals.jsonl")) == 2
    assert not run_folder.is_done(finished, first)
    result = potstill.train(first, quiet=True)
    assert run_folder.is_done(finished, first) and result.metrics["step"] == 4
    assert [row["temperature"] for row in rows_of(finished, "evals.jsonl")] == [1.0, 0.6]
    second = recipe_of(finished, evaluation=EVALUATION | {"temperatures": [0.3]})
    potstill.train(second, quiet=True)
    assert [row["temperature"] for row in rows_of(finished, "evals.jsonl")] == [1.0, 0.6, 0.3]
    # As a run that had this evaluation from the start, to the bit.
    assert all(
        torch.equal(tensor, weights_of(whole)[name])
        for name, tensor in weights_of(finished).items()
    )
    straight = potstill.train(
        recipe_of(finished.parent / "straight", evaluation=EVALUATION), quiet=True
    ).folder
    assert rows_of(straight, "metrics.jsonl") == rows_of(finished, "metrics.jsonl")
    for a, b in zip(
        rows_of(straight, "evals.jsonl"), rows_of(finished, "evals.jsonl"), strict=False
    ):
        assert a | {"model": ""} == b | {"model": ""}


def test_a_finished_run_whose_checkpoint_is_gone_is_not_begun_again(finished):
    shutil.rmtree(finished / "checkpoint")
    longer = recipe_of(finished, train={"steps": 4})
    model = load_model("potstill:base")
    with pytest.raises(
        RunError, match=r"is finished and its checkpoint was removed; its student is in '.*model'"
    ):
        potstill.train(longer, student=model, quiet=True)
    assert len(rows_of(finished)) == 4 and (finished / "DONE").exists()
    with pytest.raises(RunError, match=r"no checkpoint to go on from"):
        potstill.train(longer, extend_to=8, quiet=True)


# -- past the end ----------------------------------------------------------------------------------


def test_a_finished_run_is_extended(finished, whole, tmp_path):
    """Its steps stay, the rest is that of a longer run; the recipe that it then has gives the same
    from the start."""
    given = recipe_of(finished)
    potstill.train(given, extend_to=8, quiet=True)
    now = load_recipe(finished / "recipe.toml")
    assert now.train.steps == 8 and now.train.extended == ((4, 4),)
    assert rows_of(finished)[:4] == rows_of(whole) and [
        row["step"] for row in rows_of(finished)
    ] == list(range(1, 9))
    assert run_folder.is_done(finished, now)
    afresh = recipe_of(tmp_path / "afresh", train={"steps": 8, "extended": [[4, 4]]})
    potstill.train(afresh, quiet=True)
    assert_same_run(finished, tmp_path / "afresh")
    # By hand: the old cosine to its end, then the new one.
    rates = [row["lr"] for row in rows_of(finished)]
    straight = [recipe_of(tmp_path, train={"steps": steps}).train for steps in (4, 8)]
    straight = [train.model_copy(update={"lr": now.train.lr or max(rates)}) for train in straight]
    assert (
        rates == [learning_rate(straight[step >= 4], step) for step in range(8)]
        and rates[4] > rates[3]
    )
    # The recipe alone is no longer that of the run, and the line says how it is.
    for steps in (4, 8):
        shorter = given.model_copy(
            update={"train": given.train.model_copy(update={"steps": steps})}
        )
        with pytest.raises(
            RunError, match=r"\); the run was extended: add --extend-to 8, or choose another --out"
        ):
            potstill.train(shorter, quiet=True)
    # Again: nothing is left to do; and in two moves.
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    potstill.train(given, extend_to=8, quiet=True)
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before
    # Its evaluation was of the student that went on, which no longer is the run's.
    files.append(
        finished / "evals.jsonl", dict.fromkeys(EVAL_COLUMNS) | {"step": 8, "temperature": 1.0}
    )
    assert [row["step"] for row in read_entry(finished).evals] == [8]
    potstill.train(given, extend_to=10, quiet=True)
    assert not read_entry(finished).evals
    assert load_recipe(finished / "recipe.toml").train.extended == ((4, 4), (8, 8))


TO_EXTEND = {
    "weight_schedule": {"schedule": "linear"},
    "objective": {"prefix": "dataset", "kl": "mixed"},
}


def extend_and_be_killed(out):
    run_folder.mark_done = kill
    potstill.train(recipe_of(out, **TO_EXTEND), extend_to=7, quiet=True)


def test_an_unfinished_run_is_extended_and_killed_and_resumed(tmp_path, forks):
    stop(tmp_path / "run", **TO_EXTEND)
    assert forks.call(tmp_path, extend_and_be_killed, str(tmp_path / "run")).is_killed
    # From the folder's own recipe, as an unfinished run says. No step is left, and what the last
    # one gave is there.
    resumed = potstill.train(load_recipe(tmp_path / "run/recipe.toml"), quiet=True)
    assert resumed.metrics["step"] == 7 and "loss" in resumed.metrics
    afresh = recipe_of(tmp_path / "afresh", **TO_EXTEND, train={"steps": 7, "extended": [[2, 4]]})
    potstill.train(afresh, quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "afresh")


@pytest.mark.slow
def test_evaluations_of_both_ends_are_kept(tmp_path):
    recipe = recipe_of(tmp_path / "run", evaluation=EVALUATION | {"temperatures": [1.0]})
    potstill.train(recipe, quiet=True)
    (tmp_path / "recipe.toml").write_text(to_toml(recipe.resolved()))
    main(["train", str(tmp_path / "recipe.toml"), "--extend-to", "6"])
    assert [
        (row["step"], row["temperature"]) for row in rows_of(tmp_path / "run", "evals.jsonl")
    ] == [(4, 1), (6, 1)]


def test_what_cannot_be_extended(tmp_path, finished):
    with pytest.raises(
        RunError, match=r"there is no run in '.*nowhere' yet; train it with --train.steps 9 instead"
    ):
        potstill.train(recipe_of(tmp_path / "nowhere"), extend_to=9, quiet=True)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(
        RunError, match=r"--extend-to is 3 and the run in .* goes to step 4; give more"
    ):
        potstill.train(recipe_of(finished), extend_to=3, quiet=True)
    with pytest.raises(RunError, match=r"train.lr is "):
        potstill.train(recipe_of(finished, train={"lr": 0.1}), extend_to=9, quiet=True)
    assert run_folder.is_done(finished, recipe_of(finished))
    potstill.train(recipe_of(tmp_path / "spent", train={"flops": 1e6}), quiet=True)
    with pytest.raises(RunError, match=r"ends by train.flops"):
        potstill.train(recipe_of(tmp_path / "spent", train={"flops": 1e6}), extend_to=9, quiet=True)


@pytest.mark.parametrize(
    "pairs", [[[3, 2]], [[2, 4]], [[0, 2]], [[1, 2], [1, 3]], [[1, 3], [2, 3]]]
)
def test_extensions_that_cannot_have_been(tmp_path, pairs):
    with pytest.raises(ValueError, match=r"train.extended is .*; give pairs"):
        recipe_of(tmp_path, train={"extended": pairs})


# -- what is said ----------------------------------------------------------------------------------


def test_ctrl_c_says_what_is_saved(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.toml").write_text(
        to_toml(recipe_of(tmp_path / "run", evaluation=EVALUATION).resolved())
    )

    def interrupted(*given, **options):
        raise KeyboardInterrupt

    for where, said in (
        ("potstill.training.setup.ready", "nothing was saved yet: the same command begins again"),
        (
            "potstill.training.loop.accumulate_gradients",
            "nothing was saved yet: the same command begins again",
        ),
        (
            "potstill.training.loop.evaluate_run",
            "step 4 was saved last, and the same command goes on from there",
        ),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(where, interrupted)
            main(["train", str(tmp_path / "recipe.toml")])
        assert stopped.value.code == 130 and capsys.readouterr().err.endswith(
            f"potstill: stopped; {said}\n"
        )


@pytest.mark.parametrize("at_step", [3, 4])
def test_ctrl_c_while_a_step_is_saved_ends_after_a_saved_one(
    tmp_path, monkeypatch, capsys, at_step
):
    """Also after the last step, where only the evaluation is left: it goes on from there."""
    sections = {"train": {"checkpoint_every": 1}, "evaluation": EVALUATION}
    recipe = recipe_of(tmp_path / "run", **sections)
    (tmp_path / "recipe.toml").write_text(to_toml(recipe.resolved()))
    real = checkpoint.save

    def save_and_interrupt(folder, step, *given, **options):
        real(folder, step, *given, **options)
        if step == at_step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(checkpoint, "save", save_and_interrupt)
        main(["train", str(tmp_path / "recipe.toml")])
    num_done = min(at_step + 1, 4)
    said = f"stopped after step {num_done}, which is saved; the same command goes on from there"
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"potstill: {said}"
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "run")) == num_done
    assert not (tmp_path / "run/evals.jsonl").exists()
    potstill.train(recipe, quiet=True)
    potstill.train(recipe_of(tmp_path / "alone", **sections), quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def test_ctrl_c_in_an_evaluation_that_saves_nothing_says_so(monkeypatch, capsys):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "sample", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "potstill:base"])
    said = "potstill: stopped; nothing was saved: with --responses FOLDER an evaluation can go on\n"
    assert stopped.value.code == 130 and capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("doctor demo", "potstill.doctor.examine.prepare"),
        (
            "init x.toml --student a --teacher b --data c --method sft",
            "potstill.doctor.draft.draft",
        ),
        ("chat potstill:base", "potstill.cli.chat.converse"),
        ("sample potstill:base", "potstill.cli.show.show_responses"),
        ("runs .", "potstill.cli.run_commands.list_runs"),
    ],
)
def test_ctrl_c_in_a_command_that_saves_nothing_says_so(monkeypatch, capsys, line, where):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 130 and capsys.readouterr().err.endswith("potstill: stopped\n")


# -- a run is a model ------------------------------------------------------------------------------


def test_a_run_folder_is_a_model_wherever_one_is_named(finished, tmp_path):
    recipe = recipe_of(
        tmp_path / "next", student={"model": str(finished)}, teacher={"model": str(finished)}
    )
    potstill.train(recipe, quiet=True)
    # The student begins as its own teacher.
    assert abs(rows_of(tmp_path / "next")[0]["forward_kl"]) < 1e-6
    begun = json.loads((tmp_path / "next/environment.json").read_text())["models"]
    assert begun["student"]["weights"] == begun["teacher"]["weights"]
    assert (
        load_file(finished / "model/model.safetensors").keys()
        == weights_of(tmp_path / "next").keys()
    )
    (newest,) = (finished / "checkpoint").iterdir()
    with pytest.raises(ModelError, match=r"is a checkpoint, .* and no model; name the run '.*run'"):
        load_model(str(newest))
    os.remove(finished / "DONE")
    with pytest.raises(
        ModelError, match=r"run '.*run' is not finished; run `potstill train .*` to finish it"
    ):
        potstill.train(recipe_of(tmp_path / "other", student={"model": str(finished)}), quiet=True)
