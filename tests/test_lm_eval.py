"""EleutherAI's lm-eval on a saved student, unchanged, beside our own evaluation. Run by `make
test-real`."""

import json
import subprocess
import sys

import pytest
from conftest import tiny_recipe

from potstill import evaluate, train
from potstill.config import Evaluation
from potstill.evaluation.scores import make_problems
from potstill.runs.run_folder import read_rows

pytestmark = pytest.mark.real

# `until` is empty, as the text must go on to the model's own end token; left out, it would be two
# newlines.
TASK = r"""
task: products
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 128}
filter_list:
  - name: last
    filter: [{function: regex, regex_pattern: '#(\d+)', group_select: -1}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_lm_eval_reads_our_model_folder_and_gives_our_greedy_responses(tmp_path, monkeypatch):
    train(tiny_recipe(tmp_path / "run", window={"tokens": 96}, train={"steps": 8}), quiet=True)
    evaluation = Evaluation(
        source="multiplication", temperatures=(0.0,), num_responses=1, num_problems=60
    )
    (ours,) = evaluate(tmp_path / "run", evaluation, responses=tmp_path / "ours", quiet=True)
    (file,) = (tmp_path / "ours").glob("*.jsonl")
    responses = read_rows(file)
    # Some are right and some wrong, and not all have the same length.
    assert 0.1 < ours["avg"].value < 0.9 and len({row["length"] for row in responses}) > 10

    _, examples = make_problems(evaluation)
    rows = [{"prompt": example.prompt, "answer": example.answer} for example in examples]
    data = tmp_path / "products.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "products.yaml").write_text(TASK.replace("DATA", json.dumps(str(data))))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={tmp_path / 'run/model'}",
    ]
    command += ["--tasks", "products", "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    command += ["--batch_size", "32", "--log_samples", "--output_path", str(tmp_path / "theirs")]
    subprocess.run(command, check=True, cwd=tmp_path)

    (results,) = (tmp_path / "theirs").glob("**/results_*.json")
    (samples,) = (tmp_path / "theirs").glob("**/samples_*.jsonl")
    found = sorted(read_rows(samples), key=lambda row: row["doc_id"])
    assert [row["resps"] for row in found] == [[[row["text"]]] for row in responses]
    assert [row["exact_match"] for row in found] == [row["score"] for row in responses]
    assert (
        json.loads(results.read_text())["results"]["products"]["exact_match,last"]
        == ours["avg"].value
    )
