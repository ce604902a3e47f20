"""Runs with a reward: groups, resumes, windows, counts by hand, and scores of one's own."""

import dataclasses
import json

import pytest
from conftest import interrupted_at, tiny_recipe
from small_runs import assert_same_run, rows_of

import potstill
from potstill.config import RecipeError
from potstill.models.language_model import load_model
from potstill.runs import run_folder
from potstill.training import checkpoint
from potstill.training import step as step_parts
from potstill.types import DataError

# Scores that differ in most groups.
OWN = '''
def digits(examples, responses):
    """The share of digits in a response."""
    return [sum(c.isdigit() for c in response) / (1 + len(response)) for response in responses]

def one(examples, responses):
    return [1.0]

def infinite(examples, responses):
    return [float("inf")] * len(responses)

def broken(examples, responses):
    return [response.no_such for response in responses]
'''
RL = {
    "objective": {"prefix": "student", "kl": "none"},
    "reward": {"weight": 1.0, "group_size": 2},
    "train": {"prompts_per_step": 4},
    "data": {"num_prompts": 16},
}


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(OWN)
    return str(path)


def recipe_of(out, **sections):
    names = {**RL, **sections}
    return tiny_recipe(out, **{name: RL.get(name, {}) | sections.get(name, {}) for name in names})


@pytest.fixture
def written(monkeypatch):
    """The rollouts of each step that were written, with nothing changed."""
    found, real = [], step_parts.write_rollouts

    def write(*given):
        found.append(real(*given))
        return found[-1]

    monkeypatch.setattr(step_parts, "write_rollouts", write)
    return found


def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, own):
    """Between two steps on the same rollouts, whose scores and log-probabilities are kept; with a
    KL to the start, and a teacher that is the student as it was and follows it."""
    sections = {
        "objective": {"prefix": "student", "kl": "reverse"},
        "teacher": {"model": "self", "refresh_steps": 3},
        "reward": {"start_kl": 0.1, "source": f"{own}:digits", "clip": [0.01, 0.01]},
        "rollouts": {"reuse": 2},
        "train": {"checkpoint_every": 1, "normalize": "sequence"},
    }
    whole = potstill.train(recipe_of(tmp_path / "whole", **sections), quiet=True).folder
    stopped = tmp_path / "stopped"
    with interrupted_at(3):
        potstill.train(recipe_of(stopped, **sections), quiet=True)
    path = checkpoint.latest(stopped)
    assert path is not None and checkpoint.step_of(path) == 3
    rollouts = json.loads((path / "state.json").read_text())["rollouts"]
    assert len(rollouts) == 8
    assert any(credit["advantage"] for *_, credit in rollouts)
    for completion_ids, trained, _, _, _, log_probs, _ in rollouts:
        assert len(log_probs) == sum(trained) == len(completion_ids)
    potstill.train(recipe_of(stopped, **sections), quiet=True)
    assert_same_run(stopped, whole)
    rows = rows_of(whole)
    assert [row["rollout_age"] for row in rows] == [0, 1, 0, 1]
    assert rows[3]["clipped"] > 0 and rows[3]["start_kl"] > 0
    # Of new rollouts nothing is clipped, and the same rollouts have the same scores.
    assert "clipped" not in rows[2] and rows[2]["reward"] == rows[3]["reward"]


def test_operations_of_groups_by_hand(tmp_path, written):
    recipe = recipe_of(tmp_path / "run", reward={"start_kl": 0.1}, train={"steps": 1})
    potstill.train(recipe, quiet=True)
    ((rollouts,), (row,)) = written, rows_of(tmp_path / "run")
    prompts = [rollout.prompt for rollout in rollouts]
    assert len(rollouts) == 8 and prompts[::2] == prompts[1::2] and len(set(prompts)) == 4
    flops = load_model(str(tmp_path / "run/model")).flops
    num_in = [len(r.prompt.token_ids) + len(r.completion_ids) - 1 for r in rollouts]
    forward, num = sum(map(flops.backbone, num_in)), row["num_loss_tokens"]
    assert num == sum(len(rollout.completion_ids) for rollout in rollouts)
    # The start's body passes forward. Of the heads there are three products of the student for its
    # own loss, and for the KL one of the start and three more of the student.
    assert row["flops"] == {
        "rollout": forward + num * flops.head,
        "probe": 0,
        "teacher": forward,
        "student_forward": forward,
        "student_backward": 2 * forward,
        "head": (3 + 1 + 3) * num * flops.head,
    }


def test_golds_score_1_and_only_groups_that_differ_have_a_signal(tmp_path, monkeypatch):
    """The first of four groups has two right responses, the second one, the others none."""
    real = step_parts.write_rollouts
    encode = load_model("potstill:base").tokenizer.encode

    def write(writing, prompts, seeds):
        answers = [
            f"#{prompt.example.answer}." if place in (0, 1, 2) else "#."
            for place, prompt in enumerate(prompts)
        ]
        found = []
        for rollout, answer in zip(real(writing, prompts, seeds), answers, strict=True):
            ids = (*encode(answer, add_special_tokens=False), 2)
            whole = {"completion_ids": ids, "trained": (True,) * len(ids), "stop": "end"}
            whole["writers"] = ("student",) * len(ids)
            found.append(dataclasses.replace(rollout, **whole))
        return found

    monkeypatch.setattr(step_parts, "write_rollouts", write)
    recipe = recipe_of(tmp_path / "run", reward={"advantage": "mean"}, train={"steps": 1})
    folder = potstill.train(recipe, quiet=True).folder
    (row,) = rows_of(folder)
    assert row["reward"] == 3 / 8 and row["groups_with_signal"] == 1 / 4
    assert row["reward_std"] == pytest.approx((3 / 8 * 5 / 8) ** 0.5)
    samples = run_folder.read_rows(folder / "samples.jsonl")
    assert [(each["score"], each["advantage"]) for each in samples] == [(1, 0), (1, 0)]


@pytest.mark.parametrize("schedule", ["linear", "entropy-gated"])
def test_windows_without_a_teacher(tmp_path, written, schedule):
    window = {"schedule": schedule, "tokens": 16, "start": 4}
    if schedule == "entropy-gated":
        window |= {"check_every": 1, "num_probes": 2, "patience": 1, "max_truncation": 1.0}
    folder = potstill.train(recipe_of(tmp_path / "run", window=window), quiet=True).folder
    windows = [row["window"] for row in rows_of(folder)]
    assert windows == {"linear": [4, 8, 12, 16], "entropy-gated": [4, 8, 16, 16]}[schedule]
    longest = [max(len(each.completion_ids) for each in rollouts) for rollouts in written]
    assert longest == windows
    if schedule == "entropy-gated":
        probes = rows_of(folder, "window.jsonl")
        assert {row["teacher_entropy"] for row in probes} == {None}


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("one", r"one returned \[1.0\]; return a list of 16 numbers, one a response"),
        ("infinite", "infinite returned inf; return a number a response"),
        ("broken", "broken: line 13 raised AttributeError: 'str' object has no attribute"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_a_function_that_scores_wrongly_is_refused_before_anything_is_written(
    tmp_path, own, function, says
):
    sections = {"reward": {"source": f"{own}:{function}"}, "data": {"num_prompts": 8}}
    with pytest.raises(DataError, match=says) as refused:
        potstill.train(recipe_of(tmp_path / "run", **sections), quiet=True)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_prompts_from_python_are_scored_by_a_function_alone(tmp_path, own):
    prompts = ["__12*7=", "__31*4=", "_123*4=", "__55*6="]
    with pytest.raises(DataError, match=r"nothing scores their responses; name a function of"):
        potstill.train(recipe_of(tmp_path / "run"), prompts=prompts, quiet=True)
    assert not (tmp_path / "run").exists()
    recipe = recipe_of(tmp_path / "run", reward={"source": f"{own}:digits"}, train={"steps": 1})
    folder = potstill.train(recipe, prompts=prompts, quiet=True).folder
    (row,) = rows_of(folder)
    assert row["groups_with_signal"] > 0 and row["grad_norm"] > 0
    files = json.loads((folder / "environment.json").read_text())["task_files"]
    assert list(files) == [own]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"student": {"dropout": True}, "rollouts": {"reuse": 2}},
            "chance would be in the ratio to the student that wrote",
        ),
        (
            {"window": {"schedule": "entropy-gated", "start": 8, "reference": "teacher"}},
            'window.reference is "teacher": the recipe has none',
        ),
    ],
)
def test_what_no_reward_can_be_learnt_from_is_refused(sections, says):
    fields = {
        f"{name}.{field}": value
        for name, section in (RL | sections).items()
        for field, value in section.items()
    }
    with pytest.raises(RecipeError, match=says):
        potstill.load_recipe("rl", fields)
