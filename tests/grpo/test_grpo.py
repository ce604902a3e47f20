"""GRPO: TRL's update is the policy gradient by hand, a stopped run ends in the same bits, bad input
leaves nothing."""

import json

import pytest
import torch
from conftest import make_model
from row_faults import faults
from safetensors.torch import load_file

from potstill.cli.app import main
from potstill.config import GrpoRecipe, RecipeError, load_grpo_recipe, to_toml
from potstill.grpo import responses, run, trainer
from potstill.grpo.run import run_grpo
from potstill.models.language_model import load_model, save_model
from potstill.runs import run_folder
from potstill.runs.results import read_entry
from potstill.runs.schema import GrpoRow
from potstill.training import checkpoint
from potstill.types import NonFiniteError

SMALL = {
    "steps": 4,
    "prompts_per_step": 3,
    "group_size": 4,
    "rows_per_batch": 5,
    "checkpoint_every": 2,
    "lr": 5e-4,
}
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


def recipe_for(out, **sections) -> GrpoRecipe:
    data = {"out": str(out), "data": {"num_prompts": 64}, "window": {"tokens": 48}, "grpo": SMALL}
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section} if isinstance(section, dict) else section
    return GrpoRecipe.model_validate(data)


def logged(folder):
    """The rows of a run without what depends on the machine's speed."""
    rows = run_folder.read_rows(folder / "metrics.jsonl")
    return [
        {key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows
    ]


@pytest.fixture
def written(monkeypatch):
    """All responses with their scores, a list a call of `grpo.score`."""
    calls, real = [], responses.score

    def score(task, answers):
        scores = real(task, answers)
        calls.append(list(zip(answers, scores, strict=True)))
        return scores

    for module in (responses, run, trainer):
        monkeypatch.setattr(module, "score", score)
    return calls


@pytest.fixture
def two_ends(tmp_path):
    """The base model with the full stop after an answer as its second end token, and without a
    padding token."""
    model = load_model("potstill:base")
    full_stop = model.tokenizer.convert_tokens_to_ids(".")
    model.tokenizer.pad_token = None
    weights = {
        name: value for name, value in model.model.state_dict().items() if name != "lm_head.weight"
    }
    save_model(model, weights, (*model.end_ids, full_stop), tmp_path / "two-ends")
    return str(tmp_path / "two-ends")


def test_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluation = {"source": "multiplication", "num_problems": 3, "num_responses": 2}
    folder = run_grpo(recipe_for(tmp_path / "run", evaluation=evaluation))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    files = {"recipe.toml", "environment.json", "metrics.jsonl", "evals.jsonl"}
    assert names == files | {"checkpoint", "responses", "model", "DONE"}
    assert not [
        path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")
    ]
    entry = read_entry(folder)
    assert entry.name == "GRPO" and str(entry.start) == "potstill:base"
    assert entry.num_loss_tokens and entry.seconds and entry.flops
    assert [row["temperature"] for row in entry.evals] == [1.0, 0.6]
    assert [row["step"] for row in entry.metrics] == [1, 2, 3, 4]
    assert [fault for row in entry.metrics for fault in faults(row, GrpoRow)] == []
    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err
    assert (
        "end set: <eos> (2)" in said and "entropy before the answer" in said and "step 4/4" in said
    )
    assert json.loads((folder / "environment.json").read_text())["start"]["num_groups"] == 32
    # TRL leaves nothing in the model but weights.
    start = load_model("potstill:base")
    trained = load_model(str(folder / "model"))
    assert trained.model.config.to_diff_dict() == start.model.config.to_diff_dict()
    assert (
        trained.model.generation_config.pad_token_id == start.model.generation_config.pad_token_id
    )
    assert trained.tokenizer.special_tokens_map == start.tokenizer.special_tokens_map
    # A run that is done is not repeated.
    before = (folder / "metrics.jsonl").read_text()
    assert run_grpo(recipe_for(folder, evaluation=evaluation)) == folder
    assert (folder / "metrics.jsonl").read_text() == before
    # With another evaluation it is evaluated anew, and nothing else.
    other = recipe_for(
        folder, evaluation=evaluation | {"temperatures": [0.0]}, grpo={"checkpoint_every": 3}
    )
    assert not run_folder.is_done(folder, other)
    run_grpo(other)
    assert run_folder.is_done(folder, other) and (folder / "metrics.jsonl").read_text() == before
    assert [row["temperature"] for row in run_folder.read_rows(folder / "evals.jsonl")] == [
        1.0,
        0.6,
        0.0,
    ]


@pytest.mark.parametrize("model", ["potstill:base", "two ends"])
def test_one_step_is_the_policy_gradient_by_hand(tmp_path, model, two_ends, written):
    """Advantages in closed form, log-probabilities one unpadded response at a time, and Adam's
    first moment."""
    name = two_ends if model == "two ends" else model
    settings = SMALL | {"steps": 1, "prompts_per_step": 6, "lr": 1e-3, "max_grad_norm": 0.05}
    folder = run_grpo(
        recipe_for(
            tmp_path / "run",
            model=name,
            window={"tokens": 40},
            sampling={"temperature": 0.8},
            grpo=settings,
        ),
        quiet=True,
    )
    student = load_model(name)
    ends = (2, student.tokenizer.convert_tokens_to_ids(".")) if model == "two ends" else (2,)
    responses, scores = zip(*written[-1], strict=True)
    rewards = torch.tensor(scores).view(6, 4)
    advantages = (
        (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    ).flatten()
    num_tokens, loss = 0, torch.zeros(())
    for response, advantage in zip(responses, advantages, strict=True):
        prompt, completion = response.prompt.token_ids, response.completion.token_ids
        # Up to the first end token, which is learnt.
        stops = [i for i, token in enumerate(completion) if token in ends]
        assert stops == [len(completion) - 1] if response.completion.stop == "end" else not stops
        logits = student.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        log_probs = (logits / 0.8).log_softmax(-1)[range(len(completion)), list(completion)]
        loss = loss - advantage * log_probs.sum()
        num_tokens += len(completion)
    loss = loss / num_tokens
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.model.parameters(), 0.05)
    (row,) = logged(folder)
    expected = {
        "num_loss_tokens": num_tokens,
        "reward": sum(scores) / 24,
        "groups_with_signal": sum(len(set(group.tolist())) > 1 for group in rewards) / 6,
        "grad_norm": norm.item(),
        "length": num_tokens / 24,
        "truncation": sum(response.completion.token_ids[-1] not in ends for response in responses)
        / 24,
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert (
        norm > 0.05
        and row["groups_with_signal"] > 0
        and len({len(r.completion.token_ids) for r in responses}) > 3
    )
    # TRL's loss has the value of ratios of 1, not of log-probabilities; the gradient is the same.
    lengths = torch.tensor([float(len(r.completion.token_ids)) for r in responses])
    assert row["loss"] == pytest.approx(-(advantages * lengths).sum().item() / num_tokens, abs=1e-5)
    moments = load_file(checkpoint.latest(folder) / "optimizer.safetensors")
    for parameter, value in student.model.named_parameters():
        torch.testing.assert_close(
            moments[f"model.{parameter}.exp_avg"], 0.1 * value.grad, rtol=1e-3, atol=1e-7
        )
    saved = json.loads((folder / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == (list(ends) if len(ends) > 1 else ends[0])


def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    """With a warm-up, a decay, a gate and a KL to the start, all of which go on where they were."""
    settings = SMALL | {"steps": 5, "warmup_steps": 2, "schedule": "cosine", "kl_weight": 0.1}
    runs = {
        name: recipe_for(tmp_path / name, window=GATE, grpo=settings)
        for name in ("whole", "stopped")
    }
    run_grpo(runs["whole"], quiet=True)
    real = trainer.training_flops
    calls = iter(range(10))

    def interrupt(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "training_flops", interrupt)
        run_grpo(runs["stopped"], quiet=True)
    assert len(logged(tmp_path / "stopped")) == 2 and not (tmp_path / "stopped" / "DONE").exists()
    monkeypatch.setattr(run, "measure_start", lambda *args: pytest.fail("the start is known"))
    run_grpo(runs["stopped"], quiet=True)
    assert logged(tmp_path / "whole") == logged(tmp_path / "stopped")
    decisions = [run_folder.read_rows(tmp_path / name / "window.jsonl") for name in runs]
    assert decisions[0] == decisions[1]
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in runs)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    rows = logged(tmp_path / "whole")
    # Half the rate, the whole one twice (the cosine begins there), then half a cosine.
    assert [row["lr"] for row in rows] == pytest.approx([2.5e-4, 5e-4, 5e-4, 3.75e-4, 1.25e-4])
    # The model is its own reference at the first step, and not later.
    assert rows[0]["kl_to_start"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl_to_start"] > 0
    # The first probe sets the reference, each that passes then takes one step up the ladder.
    assert [row["window"] for row in decisions[0]] == [16, 32, 48]
    assert [row["window"] for row in rows] == [16, 32, 48, 48, 48]
    assert all(
        row["teacher_truncation"] == 0 and row["teacher_entropy"] is None for row in decisions[0]
    )


def test_the_linear_window_is_obeyed_and_probes_are_held_out(tmp_path, written):
    run_grpo(
        recipe_for(tmp_path / "run", window={"tokens": 20, "schedule": "linear", "start": 5}),
        quiet=True,
    )
    windows = [row["window"] for row in logged(tmp_path / "run")]
    assert windows == [5, 10, 15, 20]
    lengths = [
        max(len(response.completion.token_ids) for response, _ in call) for call in written[1:]
    ]
    assert lengths == windows
    setup = run.prepare_grpo(recipe_for("unused", window=GATE), run.distributed.start())
    assert len(setup.probes) == 4
    assert not {probe.token_ids for probe in setup.probes} & {
        prompt.token_ids for prompt in setup.prompts
    }


def test_the_start_is_measured_and_judged(tmp_path, written):
    recipe = recipe_for("unused")
    found = run.measure_start(recipe, run.prepare_grpo(recipe, run.distributed.start()))
    (pairs,) = written
    groups = [[score for _, score in pairs[i : i + 4]] for i in range(0, len(pairs), 4)]
    assert len(groups) == 32 and len({response.prompt.token_ids for response, _ in pairs}) == 32
    assert (
        found["groups_with_signal"] == sum(min(group) < max(group) for group in groups) / 32 > 0.2
    )
    assert found["score"] == pytest.approx(sum(map(sum, groups)) / 128)
    (line,) = run.verdict(found)
    assert "entropy to explore" in line
    # A model that knows nothing is always wrong.
    ignorant = make_model()
    weights = {
        name: value
        for name, value in ignorant.model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_model(ignorant, weights, (2,), tmp_path / "ignorant")
    recipe = recipe_for("unused", model=str(tmp_path / "ignorant"), sampling={"temperature": 0.01})
    line, too_hard, no_entropy = run.verdict(
        run.measure_start(recipe, run.prepare_grpo(recipe, run.distributed.start()))
    )
    assert (
        "in 0% of 32 groups" in line
        and "too hard" in too_hard
        and "entropy is near 0" in no_entropy
    )


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    real = run.ready

    def load(name, **options):
        model = real(name, **options)
        next(model.model.parameters()).register_hook(lambda gradient: gradient * torch.nan)
        return model

    monkeypatch.setattr(run, "ready", load)
    with pytest.raises(NonFiniteError, match="step 1: the gradient is not finite"):
        run_grpo(recipe_for(tmp_path / "run"), quiet=True)
    assert (
        not (tmp_path / "run" / "metrics.jsonl").exists()
        and not (tmp_path / "run" / "checkpoint").exists()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.source", "prompts.jsonl"], "only the responses of a task can be scored"),
        (["--sampling.top-p", "0.9"], "tokens drawn from the whole distribution"),
        (["--sampling.temperature", "0"], "tokens drawn from the whole distribution"),
        (["--window.start", "16"], "window.start is set but not read"),
        (["--window.schedule", "linear", "--window.start", "512"], "more than window.tokens"),
        (
            ["--window.schedule", "entropy-gated", "--window.reference", "teacher"],
            "GRPO has no teacher",
        ),
        (["--grpo.group-size", "1"], "grpo.group_size is 1"),
        (["--grpo.stepz", "1"], "the nearest is grpo.steps"),
        (["--train.steps", "1"], "train is not a field of the recipe"),
        (["--model", "no/such/folder"], "does not exist"),
        (["--model", "unfinished"], "run 'unfinished' is not finished"),
        (
            ["--evaluation.source", "multiplication", "--evaluation.end-tokens", "['<nil>']"],
            "end token '<nil>' is not in",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.toml").write_text(
        to_toml(load_grpo_recipe("grpo").resolved())
    )
    with pytest.raises(SystemExit) as exit:
        main(["grpo", "grpo", "--out", "run", *arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]


def test_without_trl_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'potstill\[rl\]'"):
        run_grpo(recipe_for(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_forty_steps_make_the_base_model_good(tmp_path):
    recipe = load_grpo_recipe(
        "grpo", {"out": str(tmp_path / "run"), "evaluation.temperatures": [1.0]}
    )
    folder = run_grpo(recipe, quiet=True)
    (row,) = read_entry(folder).evals
    start = json.loads((folder / "environment.json").read_text())["start"]
    assert start["score"] < 0.3
    _, low, _ = row["avg"]
    assert low > start["score"] + 0.2


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
    recipe = recipe_for(
        tmp_path / "run", data={"source": "remembers.py:Remembers", "num_prompts": 4}
    )
    setup = run.prepare_grpo(recipe, run.distributed.start())
    examples = [prompt.example for prompt in setup.prompts]
    assert [grade.score for grade in setup.task.grade(examples, ["0", "7", "14", "no"])] == [
        1,
        1,
        1,
        0,
    ]
