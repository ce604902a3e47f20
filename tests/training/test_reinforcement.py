"""Whole runs with a reward: their gradient is the policy gradient by hand, a stopped run ends in
the same bits, the start is judged, and the task that made the problems scores them."""

import json

import pytest
import torch
from conftest import interrupted_at, make_model, tiny_recipe
from row_faults import faults
from safetensors.torch import load_file
from small_runs import assert_same_run, rows_of

import potstill
from potstill.checks.exploration import verdict
from potstill.config import load_recipe
from potstill.models import distributed
from potstill.models.adapters import merged_weights
from potstill.models.language_model import load_model, save_model
from potstill.runs import run_folder
from potstill.runs.results import read_entry
from potstill.runs.schema import MetricsRow
from potstill.training import checkpoint, opening, setup, step

ALONE = {
    "objective": {"prefix": "student", "kl": "none"},
    "reward": {"weight": 1.0, "group_size": 4},
}
SMALL = {"prompts_per_step": 3, "lr": 5e-4}
GATE = {
    "tokens": 48,
    "schedule": "entropy-gated",
    "start": 16,
    "check_every": 1,
    "num_probes": 4,
    "patience": 1,
    "threshold": 0.1,
    "max_truncation": 1.0,
    "max_repetition": 1.0,
}


def recipe_of(out, **sections):
    given = {**ALONE, "train": SMALL, "window": {"tokens": 48}}
    merged = {name: given.get(name, {}) | sections.get(name, {}) for name in {**given, **sections}}
    return tiny_recipe(out, **merged)


def prepared(recipe):
    return setup.prepare(recipe, distributed.start())


@pytest.fixture
def written(monkeypatch):
    """The rollouts of each round, with their credits."""
    rounds, real = [], step.with_credit

    def with_credit(*given):
        rounds.append(real(*given))
        return rounds[-1]

    monkeypatch.setattr(step, "with_credit", with_credit)
    return rounds


@pytest.fixture
def two_ends(tmp_path):
    """The base model with the full stop after an answer as its second end token, and without a
    padding token."""
    model = load_model("potstill:base")
    full_stop = model.tokenizer.convert_tokens_to_ids(".")
    model.tokenizer.pad_token = None
    weights = merged_weights(model.model)
    save_model(model, weights, (*model.end_ids, full_stop), tmp_path / "two-ends")
    return str(tmp_path / "two-ends")


def test_a_run_from_a_run(tmp_path, capsys):
    begun = potstill.train(tiny_recipe(tmp_path / "opd", train={"steps": 1}), quiet=True)
    evaluation = {"source": "multiplication", "num_problems": 3, "num_responses": 2}
    recipe = recipe_of(tmp_path / "rl", student={"model": str(begun.folder)}, evaluation=evaluation)
    entry = read_entry(potstill.train(recipe).folder)
    assert entry.name == "GRPO" and entry.start == begun.folder and entry.cell is None
    assert [row["temperature"] for row in entry.evals] == [1.0, 0.6]
    assert [fault for row in entry.metrics for fault in faults(row, MetricsRow)] == []
    assert all(row["groups_with_signal"] <= 1 and "forward_kl" not in row for row in entry.metrics)
    said = capsys.readouterr().err
    assert "entropy before the answer" in said and "no validation: there is no teacher" in said
    assert json.loads((entry.path / "environment.json").read_text())["start"]["num_groups"] == 32
    front, _, body = (entry.path / "model" / "README.md").read_text()[4:].partition("---\n")
    assert "- reinforcement-learning" in front and "- distillation" not in front
    assert f"| started from | `{begun.folder}` |" in body and "| KL |" not in body


@pytest.mark.parametrize("model", ["potstill:base", "two ends"])
def test_one_step_is_the_policy_gradient_by_hand(tmp_path, model, two_ends, written):
    """Advantages in closed form, log-probabilities one unpadded response at a time, and Adam's
    first moment."""
    name = two_ends if model == "two ends" else model
    train = {"steps": 1, "prompts_per_step": 6, "lr": 1e-3, "max_grad_norm": 0.05}
    recipe = recipe_of(
        tmp_path / "run",
        student={"model": name},
        window={"tokens": 40},
        sampling={"temperature": 0.8},
        objective={"temperature": 0.8},
        train=train | {"warmup_steps": 0},
    )
    folder = potstill.train(recipe, quiet=True).folder
    student = load_model(name)
    ends = (2, student.tokenizer.convert_tokens_to_ids(".")) if model == "two ends" else (2,)
    (rollouts,) = written
    rewards = torch.tensor([rollout.credit.score for rollout in rollouts]).view(6, 4)
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    num_tokens, loss = 0, torch.zeros(())
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        prompt, completion = rollout.prompt.token_ids, rollout.completion_ids
        # Up to the first end token, which is learnt.
        stops = [i for i, token in enumerate(completion) if token in ends]
        assert stops == [len(completion) - 1] if rollout.stop == "end" else not stops
        logits = student.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        log_probs = (logits / 0.8).log_softmax(-1)[range(len(completion)), list(completion)]
        loss = loss - advantage * log_probs.sum()
        num_tokens += len(completion)
    (loss / num_tokens).backward()
    norm = torch.nn.utils.clip_grad_norm_(student.model.parameters(), 0.05)
    (row,) = rows_of(folder)
    expected = {
        "num_loss_tokens": num_tokens,
        "reward": rewards.mean().item(),
        "groups_with_signal": sum(len(set(group.tolist())) > 1 for group in rewards) / 6,
        "grad_norm": norm.item(),
        "length": num_tokens / 24,
        "truncation": sum(rollout.stop == "length" for rollout in rollouts) / 24,
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert norm > 0.05 and row["groups_with_signal"] > 0
    assert len({len(rollout.completion_ids) for rollout in rollouts}) > 3
    moments = load_file(checkpoint.latest(folder) / "optimizer.safetensors")
    for parameter, value in student.model.named_parameters():
        torch.testing.assert_close(
            moments[f"model.{parameter}.exp_avg"], 0.1 * value.grad, rtol=1e-3, atol=1e-7
        )
    saved = json.loads((folder / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == (list(ends) if len(ends) > 1 else ends[0])


def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    """With a decay, a gate and a start that is not measured again."""
    settings = {"window": GATE, "train": {"steps": 5, "checkpoint_every": 3}}
    recipes = {name: recipe_of(tmp_path / name, **settings) for name in ("whole", "stopped")}
    potstill.train(recipes["whole"], quiet=True)
    with interrupted_at(4):
        potstill.train(recipes["stopped"], quiet=True)
    assert not (tmp_path / "stopped" / "DONE").exists()
    monkeypatch.setattr(opening, "measure_start", lambda *args, **kwargs: pytest.fail("known"))
    potstill.train(recipes["stopped"], quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    decisions = [run_folder.read_rows(tmp_path / name / "window.jsonl") for name in recipes]
    assert decisions[0] == decisions[1]
    assert all(row["teacher_entropy"] is None for row in decisions[0])
    # The first probe sets the reference, each that passes then takes one step up the ladder.
    assert [row["window"] for row in decisions[0]] == [16, 32, 48]


def test_the_start_is_measured_and_judged(tmp_path):
    recipe = recipe_of(tmp_path / "unused")
    found = opening.scores_at_start(recipe, prepared(recipe))
    assert found is not None and (found["num_groups"], found["group_size"]) == (32, 4)
    assert 0.2 < found["groups_with_signal"] < 1 and 0 < found["score"] < 1
    (line,) = verdict(found)
    assert "entropy to explore" in line
    # A model that knows nothing is always wrong.
    ignorant = make_model()
    save_model(ignorant, merged_weights(ignorant.model), (2,), tmp_path / "ignorant")
    cold = {"sampling": {"temperature": 0.01}, "objective": {"temperature": 0.01}}
    recipe = recipe_of("unused", student={"model": str(tmp_path / "ignorant")}, **cold)
    line, too_hard, no_entropy = verdict(opening.scores_at_start(recipe, prepared(recipe)))
    assert "in 0% of 32 groups" in line
    assert "too hard" in too_hard and "entropy is near 0" in no_entropy


def test_the_kl_to_the_start_begins_at_nothing(tmp_path):
    recipe = recipe_of(tmp_path / "run", reward={"start_kl": 0.1})
    first, *_, last = rows_of(potstill.train(recipe, quiet=True).folder)
    assert first["start_kl"] == pytest.approx(0, abs=1e-6) and last["start_kl"] > 0


def test_validation_without_a_teacher_is_of_the_score(tmp_path):
    validation = {"num_prompts": 4, "every": 2, "keep_best": "score"}
    folder = potstill.train(recipe_of(tmp_path / "run", validation=validation), quiet=True).folder
    rows = run_folder.read_validations(folder)
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all("score" in row and "teacher_log_prob" not in row for row in rows)
    assert (folder / "best" / "validation.json").exists()


LENGTH = '''
def score(examples, responses):
    """More for longer responses."""
    return [len(response) / 10 for response in responses]
'''


def test_a_function_of_one_s_own_scores_steps_and_validations(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LENGTH)
    (tmp_path / "prompts.txt").write_text("".join(f"{i:_>4}*7=\n" for i in range(40)))
    recipe = recipe_of(
        "run",
        data={"source": "prompts.txt", "num_prompts": 40},
        reward={"source": "mine.py:score"},
        validation={"num_prompts": 4, "every": 4, "keep_best": "score"},
    )
    potstill.train(recipe, quiet=True)
    tokenizer = load_model("potstill:base").tokenizer
    for rollout in written[0]:
        text = tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True)
        assert rollout.credit.score == pytest.approx(len(text) / 10)
    assert run_folder.read_validations(tmp_path / "run")[0]["score"][0] > 1


REMEMBERS = '''
from potstill import Grade, Example

class Remembers:
    """Grades by what it knows of the examples that it made."""
    def __init__(self):
        self.answers = {}

    def examples(self, split, num_examples, seed):
        self.answers = {f"{split}-{i}": str(7 * i) for i in range(num_examples)}
        return [Example(id=name, prompt=f"__{i}*7=") for i, name in enumerate(self.answers)]

    def grade(self, examples, responses):
        return [Grade(float(self.answers[e.id] in r)) for e, r in zip(examples, responses)]

    def answer_end(self, response):
        return None
'''


def test_the_task_that_made_the_prompts_grades_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "remembers.py").write_text(REMEMBERS)
    found = prepared(recipe_of("run", data={"source": "remembers.py:Remembers", "num_prompts": 4}))
    examples = [prompt.example for prompt in found.prompts]
    grades = found.grader.grade(examples, ["0", "7", "14", "no"])
    assert [grade.score for grade in grades] == [1, 1, 1, 0]


@pytest.mark.slow
def test_forty_steps_make_the_base_model_good(tmp_path):
    fields = {"out": str(tmp_path / "run"), "evaluation.temperatures": [1.0]}
    folder = potstill.train(load_recipe("rl", fields), quiet=True).folder
    (row,) = read_entry(folder).evals
    start = json.loads((folder / "environment.json").read_text())["start"]
    assert start["score"] < 0.3
    _, low, _ = row["avg"]
    assert low > start["score"] + 0.2
