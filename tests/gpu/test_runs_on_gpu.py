"""Runs on a GPU: the sampler, every cell, a resume, and ranks of NCCL."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import tiny_recipe
from small_runs import assert_same_run

import potstill
from potstill.config import Sampling
from potstill.models.probe import ready
from potstill.models.sampling import sample
from potstill.runs import run_folder

pytestmark = pytest.mark.gpu

CELLS = [(prefix, kl) for prefix in ("teacher", "student") for kl in ("forward", "reverse")]
PROMPTS = [(1, 5, 6), (1, 7), (1, 5, 6, 8, 9)] * 8


def test_what_is_drawn_has_the_models_own_log_probabilities(cuda):
    model = ready("potstill:base", device=cuda)
    seeds = [(0, 0, i) for i in range(len(PROMPTS))]
    options = {"max_tokens": 24, "end_ids": (2,), "sampling": Sampling()}
    first, second = (sample(model.model, PROMPTS, seeds, **options) for _ in range(2))
    assert first == second
    with torch.no_grad():
        for prompt, completion in zip(PROMPTS, first, strict=True):
            ids = torch.tensor([[*prompt, *completion.token_ids]], device=cuda)
            hidden = model(ids[:, :-1])[0, len(prompt) - 1 :]
            log_probs = model.head(hidden).log_softmax(-1)
            written = log_probs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            found = torch.tensor(completion.log_probs, device=cuda)
            torch.testing.assert_close(found, written, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("prefix", "kl"), CELLS)
def test_each_cell_is_that_of_the_cpu(tmp_path, cuda, monkeypatch, prefix, kl):
    """At a rate so small that both draw the same tokens."""
    objective = {"prefix": prefix, "kl": kl}
    train = {"steps": 2, "lr": 1e-6, "prompts_per_step": 8}
    rows = {}
    for name in ("gpu", "cpu"):
        if name == "cpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        potstill.train(tiny_recipe(tmp_path / name, objective=objective, train=train), quiet=True)
        rows[name] = run_folder.read_rows(tmp_path / name / "metrics.jsonl")
    for key in ("loss", "forward_kl", "reverse_kl", "student_entropy", "grad_norm"):
        assert rows["gpu"][0][key] == pytest.approx(rows["cpu"][0][key], rel=1e-3), key


@pytest.mark.parametrize("where", [{"placement": "offloaded"}, {"device": "cpu"}])
def test_a_teacher_that_is_elsewhere_gives_the_same_loss(tmp_path, cuda, where):
    for name, teacher in (("here", {}), ("there", where)):
        recipe = {"objective": {"prefix": "student"}, "train": {"steps": 1, "lr": 1e-6}}
        potstill.train(tiny_recipe(tmp_path / name, teacher=teacher, **recipe), quiet=True)
    here, there = (
        run_folder.read_rows(tmp_path / name / "metrics.jsonl")[0] for name in ("here", "there")
    )
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-3)


def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, cuda):
    train = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 9}
    potstill.train(tiny_recipe(tmp_path / "whole", train=train), quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (tmp_path / "stopped/DONE").unlink()
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"stopped/checkpoint/step-{step:06d}")
    potstill.train(tiny_recipe(tmp_path / "stopped", train=train), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


RANK = """
import sys
import torch
import torch.distributed as dist
from potstill.models import distributed
from potstill.models.language_model import load_model
world = distributed.start()
dist.init_process_group("nccl", device_id=world.device)
plain = load_model("potstill:base").to(world.device)
sharded = load_model("potstill:base").to(world.device)
distributed.shard_layers(sharded)
ids = torch.tensor([[1, 5, 6, 7, 8]], device=world.device)
gradients = []
for model in (plain, sharded):
    model(ids).square().sum().backward()
    gradients.append([distributed.whole(w.grad) for w in model.parameters() if w.grad is not None])
for a, b in zip(*gradients, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
dist.destroy_process_group()
"""


def test_one_rank_of_nccl_has_the_gradients_of_a_whole_model(tmp_path, cuda):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    ended = subprocess.run(
        [sys.executable, *launcher, str(script)], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
