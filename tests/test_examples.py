"""Every file in `examples/` runs, made small, and does what it says."""

import ast
import dataclasses
import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import potstill
from potstill.cli.app import main
from potstill.config import make_recipe
from potstill.kl.terms import TokenStats

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = (
    "--train.steps 2 --train.prompts-per-step 4 --data.num-prompts 8 --window.tokens 16 "
    "--train.warmup-steps 0 "
)
SMALL += "--evaluation.num-problems 2 --evaluation.num-responses 2 --evaluation.max-tokens 16"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with the examples in it, as the repository's root has them."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)


def run(monkeypatch, capsys, command: str) -> str:
    """The output of a script."""
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(command.split()[0], run_name="__main__")
    return capsys.readouterr().out


def test_own_loop(monkeypatch, capsys):
    """It learns: after two updates the KL is lower, and the student is a model folder."""
    said = run(
        monkeypatch,
        capsys,
        "examples/own_loop.py --steps 3 --rollouts 16 --problems 2 --out student",
    )
    kls = [float(kl) for kl in re.findall(r"reverse KL (\d\.\d+)", said)]
    assert len(kls) == 3 and kls[-1] < 0.8 * kls[0]
    assert len(re.findall(r"Avg@16 \d+\.\d %", said)) == 3
    main(["sample", "student", "--num", "1", "--max-tokens", "4"])


def test_own_loop_is_short():
    lines = (EXAMPLES / "own_loop.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 80
    assert not any(line.startswith("def ") for line in lines)


def test_custom_loss(monkeypatch, capsys):
    """The gradient of the loss from statistics is that from whole logits."""
    said = run(monkeypatch, capsys, "examples/custom_loss.py")
    values = re.findall(r"(\d\.\d{4}) nats", said)
    assert values[0] == values[1] and len(values) == 3
    assert float(re.search(r"differ by (\S+) of", said)[1]) < 1e-4


def test_custom_task(capsys):
    main(["train", "examples/custom_task.toml", *SMALL.split()])
    rows = [
        json.loads(line) for line in Path("runs/custom-task/evals.jsonl").read_text().splitlines()
    ]
    assert [row["settings"]["source"] for row in rows] == ["examples/custom_task.py:Nines"]
    assert "the code of examples/custom_task.py is run" in capsys.readouterr().err


def test_the_custom_task_is_solved_by_the_teacher(capsys):
    """Its prompts and its grader fit the shipped models."""
    command = (
        "evaluate potstill:teacher --source examples/custom_task.py:Nines --num-problems "
        "6 --num-responses 2"
    )
    main([*command.split(), *["--temperatures", "0", "--out", "teacher.json"]])
    (row,) = json.loads(Path("teacher.json").read_text())
    assert row["avg"][0] > 0.6


def test_other_tokenizer(monkeypatch, capsys):
    """The teacher writes two digits at once, and is one that the student's loss of spans takes."""
    run(monkeypatch, capsys, "examples/other_tokenizer.py --steps 2")
    main(["train", "examples/other_tokenizer.toml", *SMALL.split()])
    row = json.loads(Path("runs/other-tokenizer/metrics.jsonl").read_text().splitlines()[-1])
    assert row["span_tokens"] > 1 and row["left_out"] < 0.5


def train_by_docstring(name: str) -> dict:
    """The last metrics of a short run by the recipe in a file's docstring."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / name).read_text()))
    lines = [line[4:] for line in docstring.splitlines() if line.startswith("    ") or not line]
    fields = tomllib.loads("\n".join(lines))
    fields |= {"out": "run", "window": {"tokens": 16}, "data": {"num_prompts": 8}}
    fields |= {"train": {"steps": 2, "prompts_per_step": 4, "warmup_steps": 0}}
    return potstill.train(make_recipe(fields), quiet=True).metrics


def test_my_weights():
    """It trains, and gives four tokens what its docstring says."""
    assert train_by_docstring("my_weights.py")["loss"] > 0
    entropy_N = torch.tensor([0.2, 0.6, 0.2, 0.6])
    stats = TokenStats(
        student_entropy_N=entropy_N,
        student_log_sum_exp_N=entropy_N,
        teacher_entropy_N=entropy_N,
    )
    known = dict.fromkeys(field.name for field in dataclasses.fields(potstill.Tokens))
    known |= {"stats": stats, "position_N": torch.tensor([6, 7, 8, 9])}
    weights = runpy.run_path("examples/my_weights.py")["weights"]
    terms = weights(potstill.Tokens(**known), above=0.5)
    assert terms.forward.tolist() == [0, 2, 0, 1] and terms.reverse.tolist() == [2, 0, 1, 0]


def test_my_reward():
    """It trains, and a right and short response has the best score."""
    assert "reward" in train_by_docstring("my_reward.py")
    example = potstill.Example(id="a", prompt="__12*3=", answer="36")
    score = runpy.run_path("examples/my_reward.py")["score"]
    found = score([example] * 4, ["#36.", "#3.#36.", "36", "#36.#37."])
    assert found == pytest.approx([0.996, 0.993, -0.002, -0.008])


def test_my_prompts():
    prompts = [
        json.loads(line) for line in Path("examples/my_prompts.jsonl").read_text().splitlines()
    ]
    assert all(re.fullmatch(r"[_\d]{4}\*\d=", row["prompt"]) for row in prompts)
    main(["train", "examples/my_prompts.toml", *SMALL.split()])
    assert Path("runs/my-prompts/DONE").is_file()


def test_my_study(capsys, monkeypatch):
    """Its plan: seven settings by three seeds, and two models as they are."""
    settings = tomllib.loads(Path("examples/my_study.toml").read_text())
    assert len(settings["seeds"]) == 3
    monkeypatch.setattr("potstill.study.estimates._try_steps", lambda *given: None)
    monkeypatch.setattr("potstill.study.estimates._try_evaluation", lambda *given: None)
    main(["study", "examples/my_study.toml", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(": not begun (" in line for line in lines) == 7 * 3 + 2


def test_own_models(capsys):
    """The notebook's cells in order: the student learns, by its loss and by its validation."""
    notebook = json.loads(Path("examples/own_models.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and not any(cell["outputs"] for cell in cells)
    found = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), "own_models.ipynb", "exec"), found)
    losses, rows = found["losses"], found["rows"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    first, last = rows[0], rows[-1]
    assert last["student_prefix_reverse_kl"][0] < first["student_prefix_reverse_kl"][0]
    assert found["prompts"][0] in capsys.readouterr().out.splitlines()[-1]
