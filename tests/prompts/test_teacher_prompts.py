"""A teacher that reads other prompts than the student: aligned rows, own prompts for writing,
self-distillation."""

import dataclasses
import json

import pytest
import torch
from conftest import interrupted_at, make_rollout, tiny_recipe
from safetensors.torch import load_file

import potstill
from potstill.config import Objective, RecipeError, Sampling, make_recipe
from potstill.engines.native import NativeEngine
from potstill.models.sampling import sample
from potstill.objectives.loss import Loss, teacher_signal
from potstill.rollouts.batching import make_batches
from potstill.rollouts.prefixes import Writing, write_rollouts
from potstill.runs import run_folder
from potstill.types import DataError


def with_hint(rollout, hint):
    return dataclasses.replace(
        rollout, prompt=dataclasses.replace(rollout.prompt, teacher_ids=hint)
    )


ROLLOUTS = [
    with_hint(make_rollout([1, 5, 6], [9, 5, 2]), (1, 7, 7, 8, 5, 6)),
    with_hint(
        make_rollout(
            [1, 7, 4, 4], [4, 4, 8, 9, 6, 2], trained=[True, False, False, True, True, True]
        ),
        (3,),
    ),
    make_rollout([1, 5], [3] * 7, stop="length"),
    with_hint(make_rollout([1], [2]), (1, 1, 1, 1, 1, 1, 1, 9)),
]


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 1000])
def test_rows_align_with_prompts_of_different_lengths(student, teacher, tokens_per_batch):
    """Each row against the model's own logits on its own prompt and the shared completion, one
    sequence at a time."""
    loss = Loss(objective=Objective(), normalize="token", vocab_size=23)
    for batch in make_batches(ROLLOUTS, tokens_per_batch):
        of_student = student(batch.input_ids_BT)[batch.loss_mask_BT]
        labels = batch.target_ids_BT[batch.loss_mask_BT].tolist()
        for who, model, rows in (
            ("teacher", teacher, teacher_signal(teacher, batch, loss)),
            ("student", student, of_student),
        ):
            expected, written = [], []
            for rollout in batch.rollouts:
                prompt = rollout.prompt.ids_of(who)
                logits = model.model(
                    input_ids=torch.tensor([prompt + rollout.completion_ids])
                ).logits[0]
                for i, is_trained in enumerate(rollout.trained):
                    if is_trained:
                        expected.append(logits[len(prompt) + i - 1])
                        written.append(rollout.completion_ids[i])
            torch.testing.assert_close(
                model.head(rows), torch.stack(expected), rtol=1e-4, atol=1e-4
            )
            assert written == labels


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_each_writer_reads_its_own_prompt(student, teacher, unit, share):
    prompts = [rollout.prompt for rollout in ROLLOUTS]
    seeds = [(7, 0, place) for place in range(len(prompts))]
    objective = Objective(prefix="mixed", prefix_mix=unit, student_share=share)
    engines = {"student": NativeEngine(student.model), "teacher": NativeEngine(teacher.model)}
    rollouts = write_rollouts(
        Writing(
            objective=objective,
            engines=engines,
            window=10,
            end_ids=(2,),
            sampling=Sampling(),
            rollouts_per_step=4,
        ),
        prompts,
        seeds,
    )
    who, model = ("student", student) if share else ("teacher", teacher)
    options = {"max_tokens": 10, "end_ids": (2,), "sampling": Sampling()}
    alone = sample(model.model, [prompt.ids_of(who) for prompt in prompts], seeds, **options)
    assert [rollout.completion_ids for rollout in rollouts] == [
        completion.token_ids for completion in alone
    ]


def write_data(path, **extra):
    rows = [
        {"prompt": f"{a}*{b}=", "hint": f"{a}*{b}={a * b}, {a}*{b}="} | extra
        for a in range(2, 9)
        for b in (3, 7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": str(path), "num_prompts": None}


@pytest.mark.parametrize("prefix", ["student", "teacher"])
def test_a_student_learns_from_itself_with_a_hint_and_resumes(tmp_path, capsys, prefix):
    data = write_data(tmp_path / "rows.jsonl")

    def recipe(name, **teacher):
        sections = {"data": data, "teacher": {"model": "self", **teacher}}
        return tiny_recipe(
            tmp_path / name, objective={"prefix": prefix, "kl": "reverse"}, **sections
        )

    whole = potstill.train(recipe("whole", prompt_column="hint"))
    said = capsys.readouterr().err
    assert "the teacher reads: " in said and "nothing to learn" not in said
    rows = run_folder.read_rows(tmp_path / "whole/metrics.jsonl")
    # The same model with the same prompt has nothing to say.
    potstill.train(recipe("nothing"))
    assert "reads the same prompts, so that there is nothing to learn" in capsys.readouterr().err
    nothing = run_folder.read_rows(tmp_path / "nothing/metrics.jsonl")
    assert rows[0]["loss"] > 1e-3 and abs(nothing[0]["loss"]) < 1e-6
    environment = json.loads((tmp_path / "whole/environment.json").read_text())
    assert (
        environment["models"]["teacher"]["weights"] == environment["models"]["student"]["weights"]
    )

    with interrupted_at(3):
        potstill.train(recipe("stopped", prompt_column="hint"), quiet=True)
    resumed = potstill.train(recipe("stopped", prompt_column="hint"), quiet=True)
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_teacher_that_follows_the_student_resumes(tmp_path, stop_at):
    """After step 2 the teacher is the student of a run that ended there."""
    data = write_data(tmp_path / "rows.jsonl")

    def recipe(name, steps):
        train = {"steps": steps, "schedule": "constant", "checkpoint_every": 1, "lr": 1e-2}
        teacher = {"model": "self", "prompt_column": "hint", "refresh_steps": 2}
        return tiny_recipe(
            tmp_path / name, data=data, teacher=teacher, train=train, objective={"kl": "reverse"}
        )

    with interrupted_at(stop_at):
        potstill.train(recipe("stopped", 4), quiet=True)
    resumed, whole = (potstill.train(recipe(name, 4), quiet=True) for name in ("stopped", "whole"))
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)
    half = potstill.train(recipe("half", 2), quiet=True).student
    copied = load_file(resumed.folder / "checkpoint/step-000004/teacher.safetensors")
    for name, parameter in half.named_parameters():
        assert torch.equal(copied[name], parameter)
        assert not torch.equal(copied[name], dict(whole.student.named_parameters())[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_that_follows_as_a_moving_average(tmp_path, dtype):
    """By its definition in float64, from the students of all steps; in bfloat16 steps this small
    would be lost. A run that was stopped ends in the same bits."""
    data = write_data(tmp_path / "rows.jsonl")

    def recipe(name):
        train = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 9, "lr": 1e-3}
        teacher = {"model": "self", "prompt_column": "hint", "ema": 0.9}
        sections = {"teacher": teacher, "train": train, "student": {"dtype": dtype}}
        return tiny_recipe(tmp_path / name, data=data, objective={"kl": "reverse"}, **sections)

    def weights(name, step):
        return load_file(tmp_path / f"whole/checkpoint/step-{step:06d}/{name}.safetensors")

    potstill.train(recipe("whole"), quiet=True)
    expected = {name: value.double() for name, value in weights("teacher", 1).items()}
    for step in (1, 2, 3):
        for name, value in weights("model", step).items():
            expected[name].mul_(0.9).add_(value.double(), alpha=0.1)
    last = weights("teacher", 4)
    for name, value in last.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
    first = weights("teacher", 1)
    assert any(not torch.equal(last[name], first[name]) for name in last)
    with interrupted_at(3):
        potstill.train(recipe("stopped"), quiet=True)
    potstill.train(recipe("stopped"), quiet=True)
    path = tmp_path / "stopped/checkpoint/step-000004/teacher.safetensors"
    assert all(torch.equal(value, last[name]) for name, value in load_file(path).items())


def test_bad_columns_and_settings(tmp_path):
    data = write_data(tmp_path / "rows.jsonl")
    with pytest.raises(
        DataError, match=r"'context' is None; teacher\.prompt_column must name a column"
    ):
        potstill.train(
            tiny_recipe(tmp_path / "run", data=data, teacher={"prompt_column": "context"}),
            quiet=True,
        )
    assert not (tmp_path / "run").exists()
    long = write_data(tmp_path / "long.jsonl", hint="1" * 2000)
    with pytest.raises(DataError, match="more than the context"):
        potstill.train(
            tiny_recipe(tmp_path / "run", data=long, teacher={"prompt_column": "hint"}), quiet=True
        )
    with pytest.raises(RecipeError, match=r"teacher\.prompt_column is set but not read"):
        make_recipe({"teacher": {"prompt_column": "hint"}})
    with pytest.raises(RecipeError, match=r"teacher\.refresh_steps is set but not read"):
        make_recipe({"teacher": {"refresh_steps": 3}})
    with pytest.raises(RecipeError, match=r"teacher\.dtype is set but not read"):
        make_recipe({"teacher": {"model": "self", "dtype": "bfloat16"}})
