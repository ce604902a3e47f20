"""The loop: each cell learns, a stopped run goes on as if it was not, bad input leaves nothing."""

import itertools
import json

import pytest
import torch
from conftest import make_model, tiny_recipe
from sampled import some

import potstill
from potstill.config import METHODS, RecipeError
from potstill.models.language_model import ModelError
from potstill.models.probe import ready
from potstill.runs import run_folder
from potstill.seeds import step_indices
from potstill.training import step
from potstill.training.rates import learning_rate
from potstill.types import DataError, NonFiniteError

TIMES = [
    f"{part}seconds" for part in ("", "rollout_", "teacher_", "student_", "probe_", "samples_")
]


def logged(folder):
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in run_folder.read_rows(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    "method", some([("sft",), ("dagger",), ("opd",), ("offline-rl",)], every=2)
)
def test_each_cell_learns(tmp_path, method):
    corner = {"prefix": METHODS[method].prefix, "kl": METHODS[method].kl}
    train = {"steps": 12, "lr": 1e-2, "checkpoint_every": 12, "prompts_per_step": 24}
    recipe = tiny_recipe(tmp_path / "run", objective=corner, train=train, window={"tokens": 48})
    result = potstill.train(recipe, quiet=True)
    losses = [row["loss"] for row in logged(result.folder)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert result.metrics["prefix"] == METHODS[method].prefix
    assert run_folder.is_done(result.folder, recipe)


def test_the_loss_is_the_kl_that_was_asked_for(tmp_path):
    for kl, weight in (("forward", 1.0), ("reverse", 0.0), ("mixed", 0.25)):
        objective = {"prefix": "teacher", "kl": kl} | (
            {"forward_weight": weight} if kl == "mixed" else {}
        )
        row = potstill.train(tiny_recipe(tmp_path / kl, objective=objective), quiet=True).metrics
        assert row["loss"] == pytest.approx(
            weight * row["forward_kl"] + (1 - weight) * row["reverse_kl"], rel=1e-5
        )


def test_dataset_prefix_with_labels_needs_no_teacher(tmp_path):
    recipe = tiny_recipe(
        tmp_path / "run",
        data={"source": "multiplication:persona"},
        objective={"prefix": "dataset", "signal": "labels"},
        window={"tokens": 16},
    )
    result = potstill.train(recipe, quiet=True)
    assert "teacher" not in json.loads((result.folder / "environment.json").read_text())["models"]
    assert "forward_kl" not in result.metrics
    # Traces are longer than the window, so some are cut, which is logged.
    assert result.metrics["truncation"] > 0


def test_run_folder_and_saved_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = tiny_recipe(
        tmp_path / "run",
        evaluation={"source": "multiplication", "num_problems": 3, "num_responses": 2},
    )
    result = potstill.train(recipe, quiet=True)
    names = {path.name for path in result.folder.iterdir() if not path.name.startswith(".")}
    files = {"recipe.toml", "environment.json", "metrics.jsonl", "evals.jsonl", "samples.jsonl"}
    assert names == files | {"checkpoint", "responses", "model", "DONE"}
    assert not [
        path for path in result.folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")
    ]
    assert potstill.load_recipe(result.folder / "recipe.toml").hash() == recipe.hash()
    model = AutoModelForCausalLM.from_pretrained(result.folder / "model")
    assert AutoTokenizer.from_pretrained(result.folder / "model").decode([5, 6]) == "12"
    for mine, saved in zip(result.student.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, saved)
    assert [row["temperature"] for row in run_folder.read_rows(result.folder / "evals.jsonl")] == [
        1.0,
        0.6,
    ]


def test_a_finished_run_is_not_repeated(tmp_path):
    recipe = tiny_recipe(tmp_path / "run")
    first = potstill.train(recipe, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    again = potstill.train(recipe, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before
    assert again.metrics["step"] == 4


def test_python_objects_take_the_place_of_names(tmp_path):
    student, teacher = make_model(seed=0), make_model(hidden_size=24, seed=1)
    recipe = tiny_recipe(tmp_path / "run")
    result = potstill.train(
        recipe,
        student=student.model,
        teacher=teacher.model,
        tokenizer=student.tokenizer,
        prompts=["__12*3=", "_123*4="],
        quiet=True,
    )
    assert result.student.model is student.model
    assert {row["prompt"] for row in run_folder.read_rows(result.folder / "samples.jsonl")} <= {
        "<bos>__12*3=",
        "<bos>_123*4=",
    }


def test_the_end_set_is_the_union_and_is_exported(tmp_path, capsys):
    student, teacher = make_model(seed=0), make_model(seed=1, eos_token_id=22)
    result = potstill.train(
        tiny_recipe(tmp_path / "run"),
        student=student,
        teacher=teacher,
        prompts=["__12*3="],
    )
    environment = json.loads((result.folder / "environment.json").read_text())
    assert environment["end_ids"] == [2, 22] and environment["end_class"] == [2, 22]
    assert "warning: the student ends on (2,), the teacher on (22,)" in capsys.readouterr().err
    exported = json.loads((result.folder / "model" / "generation_config.json").read_text())
    assert exported["eos_token_id"] == [2, 22]


@pytest.mark.parametrize("prefix", ["student", "teacher"])
def test_the_end_set_of_the_student_alone_ends_nothing_else(tmp_path, capsys, monkeypatch, prefix):
    """Both writers, both settings: what stands inside the rollouts, and what is stored and
    exported."""
    real, written = step.write_rollouts, {}

    def keep(*given):
        written[end_set] = real(*given)
        return written[end_set]

    monkeypatch.setattr(step, "write_rollouts", keep)
    train = {"steps": 1, "prompts_per_step": 48}
    for end_set, end_ids in (("union", [2, 22]), ("student", [2])):
        recipe = tiny_recipe(
            tmp_path / end_set,
            objective={"prefix": prefix},
            rollouts={"end_set": end_set},
            train=train,
            evaluation={
                "source": "multiplication",
                "num_problems": 3,
                "temperatures": (1.0,),
                "max_tokens": 16,
            },
        )
        result = potstill.train(
            recipe, student=make_model(seed=0), teacher=make_model(seed=1, eos_token_id=22)
        )
        environment = json.loads((result.folder / "environment.json").read_text())
        # Which ids are one class in the loss is another question.
        assert environment["end_ids"] == end_ids and environment["end_class"] == [2, 22]
        assert (
            run_folder.read_rows(result.folder / "evals.jsonl")[0]["settings"]["end_ids"] == end_ids
        )
        exported = json.loads((result.folder / "model" / "generation_config.json").read_text())[
            "eos_token_id"
        ]
        assert exported == (end_ids if len(end_ids) > 1 else end_ids[0])
        assert ('warning: rollouts.end_set is "student"' in capsys.readouterr().err) == (
            end_set == "student"
        )
        for rollout in written[end_set]:
            *inside, last = rollout.completion_ids
            assert not set(inside) & set(end_ids) and (rollout.stop == "end") == (last in end_ids)
            assert rollout.stop == "end" or len(rollout.completion_ids) == 24
    assert any(rollout.completion_ids[-1] == 22 for rollout in written["union"])
    assert any(22 in rollout.completion_ids[:-1] for rollout in written["student"])


def test_unknown_end_tokens_are_refused_before_any_work(tmp_path):
    evaluation = {"source": "multiplication", "end_tokens": ("<eos>", "<im_end>")}
    with pytest.raises(
        ModelError,
        match=r"end token '<im_end>' is not in .* special tokens are <pad>, <bos>, <eos>",
    ):
        potstill.train(tiny_recipe(tmp_path / "run", evaluation=evaluation), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_torn_line_and_an_unfinished_checkpoint_are_ignored(tmp_path):
    recipe = tiny_recipe(tmp_path / "run")
    whole = logged(potstill.train(tiny_recipe(tmp_path / "whole"), quiet=True).folder)
    potstill.train(recipe, quiet=True)
    (recipe.out / "DONE").unlink()
    (recipe.out / "checkpoint" / "unfinished-step-000099").mkdir()
    with (recipe.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    potstill.train(recipe, quiet=True)
    assert logged(recipe.out) == whole


@pytest.mark.parametrize(
    ("broken", "prefix", "what"),
    [
        ("teacher", "student", "the teacher's logits are NaN"),
        ("teacher", "teacher", "the logits of the model that writes"),
    ],
)
def test_what_is_not_finite_stops_before_the_update(tmp_path, broken, prefix, what):
    models = {"student": make_model(seed=0), "teacher": make_model(seed=1)}
    # It was whole when it was probed.
    ready(models[broken])
    with torch.no_grad():
        models[broken].model.model.norm.weight.fill_(float("nan"))
    before = [parameter.clone() for parameter in models["student"].parameters()]
    recipe = tiny_recipe(tmp_path / "run", objective={"prefix": prefix})
    with pytest.raises(
        NonFiniteError, match=rf"step 1: {what}.*; nothing was updated. The first prompts are \d"
    ):
        potstill.train(recipe, prompts=["__12*3="] * 9, quiet=True, **models)
    assert all(
        torch.equal(a, b) for a, b in zip(before, models["student"].parameters(), strict=True)
    )
    assert run_folder.read_rows(recipe.out / "metrics.jsonl") == []


def test_bad_input_writes_nothing(tmp_path):
    student = make_model(seed=0)
    cases = [
        (
            tiny_recipe(tmp_path / "run", student={"model": str(tmp_path / "nowhere")}),
            {},
            ModelError,
            "does not exist",
        ),
        (
            tiny_recipe(tmp_path / "run", window={"tokens": 4000}),
            {},
            DataError,
            "more than the context of 512",
        ),
        (
            tiny_recipe(tmp_path / "run"),
            {"student": student, "prompts": []},
            DataError,
            "prompt list is empty",
        ),
        (
            tiny_recipe(tmp_path / "run"),
            {"student": student, "prompts": ["1" * 200]},
            DataError,
            "more than the context",
        ),
        (
            tiny_recipe(tmp_path / "run", objective={"prefix": "dataset"}),
            {},
            DataError,
            "has no completion",
        ),
        (
            tiny_recipe(tmp_path / "run", evaluation={"source": "a.jsonl"}),
            {},
            RecipeError,
            "can be scored",
        ),
        (
            tiny_recipe(tmp_path / "run", evaluation={"source": "multiplication:x"}),
            {},
            DataError,
            "no writer 'x'",
        ),
    ]
    for recipe, objects, error, message in cases:
        with pytest.raises(error, match=message):
            potstill.train(recipe, quiet=True, **objects)
        assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_left_alone(tmp_path):
    recipe = tiny_recipe(tmp_path / "run")
    potstill.train(recipe, quiet=True)
    before = sorted((path, path.stat().st_mtime_ns) for path in recipe.out.rglob("*"))
    with pytest.raises(
        run_folder.RunError, match=r"holds another recipe \(train.steps is 4 there and 5 here\)"
    ):
        potstill.train(tiny_recipe(tmp_path / "run", train={"steps": 5}), quiet=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in recipe.out.rglob("*")) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(run_folder.RunError, match="holds no run"):
        potstill.train(tiny_recipe(tmp_path / "mine"), quiet=True)


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path):
    recipe = tiny_recipe(tmp_path / "run")
    given = {"teacher": make_model(seed=1), "quiet": True}
    potstill.train(recipe, student=make_model(seed=0), prompts=["__12*3="], **given)
    with pytest.raises(run_folder.RunError, match="begun with other models"):
        potstill.train(recipe, student=make_model(seed=7), prompts=["__12*3="], **given)
    with pytest.raises(run_folder.RunError, match="begun with other prompts"):
        potstill.train(recipe, student=make_model(seed=0), prompts=["__12*4="], **given)


def test_two_processes_cannot_share_a_run_folder(tmp_path):
    recipe = tiny_recipe(tmp_path / "run")
    with (
        run_folder.open_run(recipe, {"models": {}, "prompts": "", "date": None}),
        pytest.raises(run_folder.RunError, match="in use by another process"),
    ):
        potstill.train(recipe, quiet=True)


def test_epochs_visit_every_prompt_once_in_a_new_order():
    steps = [step_indices(10, 4, step, seed=3) for step in range(10)]
    places = [i for step in steps for i in step]
    epochs = [places[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert steps == [step_indices(10, 4, step, seed=3) for step in range(10)]
    assert steps != [step_indices(10, 4, step, seed=4) for step in range(10)]


def test_learning_rate_by_hand(tmp_path):
    config = tiny_recipe(
        tmp_path, train={"steps": 10, "warmup_steps": 2, "lr": 1.0, "schedule": "cosine"}
    ).train
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(rates[2:])) and rates[-1] > 0
    constant = config.model_copy(update={"schedule": "constant"})
    assert [learning_rate(constant, step) for step in range(10)] == [0.5] + [1.0] * 9


@pytest.mark.parametrize(
    "objective",
    [
        {"prefix": "teacher", "kl": "forward", "signal": "topk", "top_k": 4},
        {
            "prefix": "student",
            "kl": "reverse",
            "signal": "sampled",
            "estimator": "k1",
            "baseline": "exact",
        },
        {"prefix": "student", "kl": "reverse", "signal": "sampled", "estimator": "k2"},
        {"prefix": "student", "kl": "forward", "signal": "sampled", "estimator": "k3"},
    ],
)
def test_signals_of_less_than_the_whole_vocabulary_train(tmp_path, objective, capsys):
    result = potstill.train(tiny_recipe(tmp_path / "run", objective=objective))
    rows = run_folder.read_rows(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 4 and all(row["grad_norm"] > 0 for row in rows)
    assert (result.folder / "DONE").exists() and result.metrics["loss"] == rows[-1]["loss"]
    assert "step 4/4" in capsys.readouterr().err
