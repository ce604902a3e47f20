"""The page "Your first own model", command by command, on SmolLM2-135M. Run by `make test-real`."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from potstill.runs.run_folder import read_rows

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[1]
# Kept between test runs, as making the models takes longer than loading them.
MODELS = ROOT / "build" / "smollm2"
PROMPTS = ROOT / "examples" / "first_prompts.jsonl"
# Of the page's sizes, what ends in minutes on two cores.
SMALL = [
    *("--train.steps", "3"),
    *("--train.prompts_per_step", "4"),
    *("--window.tokens", "24"),
    *("--validation.num_prompts", "4"),
]


def potstill(folder: Path, *words: str, said: str = "") -> str:
    """Run a command in the folder, and return what it printed."""
    command = [sys.executable, "-m", "potstill", *words]
    done = subprocess.run(
        command, cwd=folder, input=said, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_from_a_file_of_prompts_to_a_student(tmp_path):
    runpy.run_path(str(ROOT / "scripts" / "make_smollm2.py"))["make"](MODELS)
    (tmp_path / "models").symlink_to(MODELS)
    (tmp_path / "prompts.jsonl").write_bytes(PROMPTS.read_bytes())

    models = ["--student", "models/student", "--teacher", "models/teacher"]
    made = potstill(tmp_path, "init", *models, "--data", "prompts.jsonl", "--method", "opd")
    assert "next: potstill doctor my.toml" in made
    assert len((tmp_path / "my.toml").read_text().splitlines()) < 35

    found = json.loads(
        subprocess.run(
            [sys.executable, "-m", "potstill", "doctor", "my.toml", *SMALL, "--json"],
            cwd=tmp_path, capture_output=True, text=True, timeout=900, check=True,
        ).stdout
    )  # fmt: skip
    assert found["fit"] and len(found["findings"]) > 10

    printed = potstill(tmp_path, "train", "my.toml", *SMALL)
    assert (
        "first of 60 prompts" in printed and "4 prompts of the data are not trained on" in printed
    )
    run = tmp_path / "runs" / "my"
    before, *_, after = read_rows(run / "validation.jsonl")
    assert after["step"] == 3
    # Three steps at the rate for real models change the student, and on the same prompts.
    key = "student_prefix_reverse_kl"
    assert after[key] != before[key] and after["num_prompts"] == before["num_prompts"] == 4

    options = ["--num-prompts", "4", "--max-tokens", "24", "--teacher", "models/teacher"]
    measured = potstill(tmp_path, "evaluate", "runs/my", "--prompts", "prompts.jsonl", *options)
    assert "runs/my" in measured

    potstill(tmp_path, "report", "runs/my", "--out", "report.html")
    assert "runs/my" in (tmp_path / "report.html").read_text()

    answer = potstill(
        tmp_path, "chat", "models/teacher", "--temperature", "0", "--max-tokens", "16",
        said="What is the capital of France? Answer in one sentence.\n",
    )  # fmt: skip
    assert "Paris" in answer
    assert potstill(tmp_path, "chat", "runs/my", "--max-tokens", "8", said="Hello!\n").strip()
