"""Several teachers: the loss is that of their mixtures by definition, each prompt is taught by its
own, and two ways to say one thing give one run."""

import dataclasses
import json

import pytest
import torch
from conftest import interrupted_at, make_model, tiny_recipe
from small_runs import assert_same_run, rows_of

import potstill
from potstill.config import Objective
from potstill.objectives.lessons import further_losses, kinds_of, lesson_of
from potstill.objectives.loss import Loss, batch_loss, student_rows, teacher_signal
from potstill.rollouts.batching import batch_places, make_batch
from potstill.runs.run_folder import RunError
from potstill.teachers.load import refuse_untaught
from potstill.teachers.protocol import Teaching
from potstill.types import DataError, Example, Prompt, Rollout

LEVELS = (["2 digits"], ["3 digits", "4 digits"])


def rollout(level: str = "", length: int = 5) -> Rollout:
    ids = tuple(range(3, 3 + length))
    return Rollout(
        prompt=Prompt(example=Example(id=level, prompt="", level=level), token_ids=(1, 5)),
        completion_ids=ids,
        trained=(True,) * length,
        writers=("student",) * length,
        stop="length",
    )


def teaching(name: str, teacher, weight: float = 1.0, only=None) -> Teaching:
    return Teaching(name=name, teacher=teacher, flops=teacher.flops, weight=weight, only=only)


def mixture(log_probs_KNV, weights_K, kl: str):
    """The arithmetic mixture of distributions, or their normalised geometric one, in logs."""
    shares_K = weights_K / weights_K.sum()
    if kl == "forward":
        return (log_probs_KNV + shares_K.log()[:, None, None]).logsumexp(0)
    return (shares_K[:, None, None] * log_probs_KNV).sum(0).log_softmax(-1)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_the_gradient_is_that_of_the_mixture(kl):
    student, *teachers = (make_model(seed=seed).double() for seed in range(4))
    weights = torch.tensor([0.7, 1.5, 0.4], dtype=torch.float64)
    teachings = [
        teaching(str(number), teacher.requires_grad_(False), weight)
        for number, (teacher, weight) in enumerate(zip(teachers, weights.tolist(), strict=True))
    ]
    batch = make_batch([rollout(), rollout(length=3)])
    loss = Loss(objective=Objective(prefix="student", kl=kl), normalize="token")
    lesson = lesson_of(teachings, teachers[0], batch)
    hidden_ND = student_rows(student, batch, loss)
    weighted = dataclasses.replace(loss, teacher_weight=lesson.weight)
    signal = teacher_signal(lesson.teacher, lesson.heard, loss)
    loss_sum, _, _ = batch_loss(
        student, lesson.teacher, signal, batch, weighted, 8.0, hidden_ND=hidden_ND
    )
    beside, _ = further_losses(lesson, student, hidden_ND, loss, 8.0)
    (loss_sum + beside).backward()
    found = {name: weight.grad.clone() for name, weight in student.named_parameters()}

    student.zero_grad()
    mask_BT = batch.loss_mask_BT
    log_q_NV = student.model(batch.input_ids_BT).logits[mask_BT].log_softmax(-1)
    given = [teacher.model(batch.input_ids_BT).logits[mask_BT] for teacher in teachers]
    log_p_NV = mixture(torch.stack(given).log_softmax(-1), weights, kl)
    log_a, log_b = (log_p_NV, log_q_NV) if kl == "forward" else (log_q_NV, log_p_NV)
    (weights.sum() * (log_a.exp() * (log_a - log_b)).sum() / 8).backward()
    for name, weight in student.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-9, atol=1e-12)


def test_batches_have_one_kind_each():
    model = make_model()
    teachings = [teaching("a", model, only=("x", "y")), teaching("b", model, only=("y",))]
    rollouts = [rollout(level) for level in "xyxxy"]
    kinds = kinds_of(teachings, rollouts)
    assert kinds == [("a",), ("a", "b"), ("a",), ("a",), ("a", "b")]
    for num_batches in range(1, 6):
        groups = batch_places(rollouts, 1000, num_batches, kinds=kinds)
        assert len(groups) == max(2, num_batches)
        assert sorted(place for group in groups for place in group) == [0, 1, 2, 3, 4]
        assert all(len({kinds[place] for place in group}) == 1 for group in groups)


def assert_close_runs(one, other, keys=("loss", "grad_norm", "student_entropy")):
    for mine, theirs in zip(rows_of(one), rows_of(other), strict=True):
        for key in keys:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_one_teacher_by_two_names_is_one_teacher(tmp_path):
    """Split by levels, or by weights; and the KL to the start is a teacher as well."""
    same = {"name": "other", "model": "potstill:teacher"}
    by_level = {
        "teacher": {"only": LEVELS[0]},
        "teachers": [same | {"only": LEVELS[1]}],
    }
    by_weight = {"teacher": {"weight": 0.25}, "teachers": [same | {"weight": 0.75}]}
    runs = {"one": {}, "levels": by_level, "weights": by_weight}
    for name, sections in runs.items():
        potstill.train(tiny_recipe(tmp_path / name, **sections), quiet=True)
    assert_close_runs(tmp_path / "one", tmp_path / "levels", ["loss", "grad_norm", "reverse_kl"])
    # The logged KL is that of the first teacher, as it is of one.
    assert_close_runs(tmp_path / "one", tmp_path / "weights", ["loss", "grad_norm", "reverse_kl"])
    for row, of_one in zip(rows_of(tmp_path / "levels"), rows_of(tmp_path / "one"), strict=True):
        parts = row["by_teacher"].values()
        assert sum(part["num_loss_tokens"] for part in parts) == row["num_loss_tokens"]
        kls = [part["num_loss_tokens"] * part["reverse_kl"] for part in parts]
        assert sum(kls) / row["num_loss_tokens"] == pytest.approx(row["reverse_kl"])
        assert row["flops"] == pytest.approx(of_one["flops"])


def test_the_start_is_a_teacher_as_well(tmp_path):
    opd = {"objective": {"prefix": "student", "kl": "reverse"}}
    potstill.train(tiny_recipe(tmp_path / "reward", **opd, reward={"start_kl": 0.5}), quiet=True)
    start = [{"name": "anchor", "model": "start", "weight": 0.5}]
    potstill.train(tiny_recipe(tmp_path / "teachers", **opd, teachers=start), quiet=True)
    assert_close_runs(tmp_path / "reward", tmp_path / "teachers")
    assert "| teacher anchor | `start` |" in (tmp_path / "teachers/model/README.md").read_text()
    for mine, theirs in zip(
        rows_of(tmp_path / "teachers"), rows_of(tmp_path / "reward"), strict=True
    ):
        kl = mine["by_teacher"]["anchor"]["reverse_kl"]
        assert kl == pytest.approx(theirs["start_kl"], rel=1e-4, abs=1e-7)
        assert mine["flops"] == theirs["flops"]


def test_a_stopped_run_ends_in_the_same_bits(tmp_path):
    small = [{"name": "small", "model": "potstill:teacher-small", "only": LEVELS[1]}]
    whole, stopped = (tiny_recipe(tmp_path / name, teachers=small) for name in ("whole", "stopped"))
    potstill.train(whole, quiet=True)
    with interrupted_at(3):
        potstill.train(stopped, quiet=True)
    potstill.train(stopped, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_each_teacher_reads_its_own_prompts(tmp_path):
    """The first one a hint, the other what the student reads, as it does where it is the first."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}*3=", "hint": f"9{i}*3=", "level": "ab"[i % 2]} for i in range(2, 10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"data": {"source": str(data), "num_prompts": 8}, "train": {"steps": 1}}
    common["objective"] = {"prefix": "student", "kl": "reverse"}
    small, large = {"model": "potstill:teacher-small"}, {"model": "potstill:teacher"}
    hinted = {
        "teacher": large | {"only": ["a"], "prompt_column": "hint"},
        "teachers": [small | {"only": ["b"], "name": "other"}],
    }
    swapped = {
        "teacher": small | {"only": ["b"]},
        "teachers": [large | {"only": ["a"], "name": "other"}],
    }
    for name, sections in {"hinted": hinted, "swapped": swapped}.items():
        potstill.train(tiny_recipe(tmp_path / name, **common, **sections), quiet=True)
    (ours,), (theirs,) = (rows_of(tmp_path / name) for name in ("hinted", "swapped"))
    of_small, of_large = ours["by_teacher"]["other"], ours["by_teacher"]["teacher"]
    assert of_small == pytest.approx(theirs["by_teacher"]["teacher"], rel=1e-5)
    without_hint = theirs["by_teacher"]["other"]
    assert of_large["num_loss_tokens"] == without_hint["num_loss_tokens"]
    assert abs(of_large["reverse_kl"] - without_hint["reverse_kl"]) > 1e-3


def test_logged_samples_are_of_each_prompts_own_teacher(tmp_path):
    """With dropout as well, where they take passes of their own."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}*3=", "hint": f"9{i}*3=", "level": "ab"[i % 2]} for i in range(2, 10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(
        tmp_path / "run",
        data={"source": str(data), "num_prompts": 8},
        train={"steps": 3, "checkpoint_every": 1},
        objective={"prefix": "student", "kl": "reverse"},
        student={"dropout": True, "lora": {"rank": 2, "dropout": 0.5}},
        teacher={"only": ["a"], "prompt_column": "hint"},
        teachers=[{"name": "other", "model": "potstill:teacher-small", "only": ["b"]}],
    )
    potstill.train(recipe, quiet=True)
    samples = rows_of(recipe.out, "samples.jsonl")
    of_first = {sample["prompt"]: "teacher_prompt" in sample for sample in samples}
    levels = {f"<bos>{row['prompt']}": row["level"] == "a" for row in rows}
    assert set(of_first.values()) == {True, False}
    assert of_first == {prompt: levels[prompt] for prompt in of_first}


def test_a_prompt_that_a_teacher_cannot_read_is_refused():
    """Of those that it teaches; the first teacher's are looked at with the student's."""
    short = make_model()
    short.model.config.max_position_embeddings = 8
    teachings = [teaching("teacher", make_model()), teaching("b", short, only=("y",))]
    long, taught = (rollout(level).prompt for level in "xy")
    prompts = [dataclasses.replace(long, token_ids=(1, 5, 5, 5)), taught]
    refuse_untaught(prompts, teachings, 6)
    with pytest.raises(DataError, match=r"2 tokens, which with 7 .* context of teacher 'b', 8"):
        refuse_untaught(prompts, teachings, 7)


def test_a_prompt_that_nobody_teaches_is_refused(tmp_path):
    sections = {"teacher": {"only": ["x"]}}
    sections["teachers"] = [{"name": "a", "model": "start", "only": ["y"]}]
    with pytest.raises(DataError, match=r"of no teacher names it \(teacher: x; a: y\)"):
        potstill.train(tiny_recipe(tmp_path / "run", **sections), quiet=True)
    sections["teacher"] = {}
    with pytest.raises(DataError, match="'a' teaches no prompt: its `only` names y, and the "):
        potstill.train(tiny_recipe(tmp_path / "run", **sections), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_levels_that_it_began_with(tmp_path):
    """By them prompts have their teachers; where there is one teacher, they say nothing."""
    small = [{"name": "small", "model": "potstill:teacher-small", "only": ["b"]}]
    prompts = [{"prompt": f"{i}*3=", "level": "ab"[i % 2]} for i in range(2, 10)]
    others = [row | {"level": "b"} for row in prompts]
    for name, sections in {"several": {"teachers": small}, "one": {}}.items():
        recipe = tiny_recipe(tmp_path / name, train={"steps": 2}, **sections)
        with interrupted_at(1):
            potstill.train(recipe, prompts=prompts, quiet=True)
        if sections:
            with pytest.raises(RunError, match="begun with other prompts"):
                potstill.train(recipe, prompts=others, quiet=True)
        else:
            potstill.train(recipe, prompts=others, quiet=True)
