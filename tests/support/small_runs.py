"""Runs of milliseconds a step, and what two runs that should be one are compared by."""

import os
import signal

import torch
from safetensors.torch import load_file

from potstill.runs import run_folder

TIMES = [
    f"{part}seconds"
    for part in ("", "rollout_", "teacher_", "student_", "probe_", "samples_", "grading_")
]
# No rollouts are sampled, so that a step takes some milliseconds.
FAST = {
    "data": {"source": "multiplication:persona"},
    "objective": {"prefix": "dataset"},
    "window": {"tokens": 16},
}
EVALUATION = {"source": "multiplication", "num_problems": 4, "num_responses": 2, "max_tokens": 16}


def rows_of(folder, name="metrics.jsonl"):
    return [
        {k: v for k, v in row.items() if k not in TIMES}
        for row in run_folder.read_rows(folder / name)
    ]


def weights_of(folder):
    return load_file(folder / "model/model.safetensors")


def assert_same_run(a, b):
    assert all(torch.equal(tensor, weights_of(b)[name]) for name, tensor in weights_of(a).items())
    for name in ("metrics.jsonl", "samples.jsonl", "evals.jsonl"):
        assert [row | {"model": ""} for row in rows_of(a, name)] == [
            row | {"model": ""} for row in rows_of(b, name)
        ]


def kill(*given):
    os.kill(os.getpid(), signal.SIGKILL)
