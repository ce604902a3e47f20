"""Two gloo processes with FSDP2 against one process: the same loss, gradients and weights."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import tiny_recipe
from forked import Trouble
from safetensors.torch import load_file
from waiting import SECONDS, wait_until

from potstill.config import to_toml
from potstill.runs import run_folder


def write_recipe(folder, **sections):
    (folder / "recipe.toml").write_text(to_toml(tiny_recipe(folder / "run", **sections).resolved()))


def train_on_one_and_on_two(forks, folder):
    """The run folders `one` and `two`, by ranks as `torchrun` starts them."""
    one = forks.run(folder, ["train", "recipe.toml", "--out", "one"])
    two = forks.run_ranks(folder, ["train", "recipe.toml", "--out", "two"], num_ranks=2)
    assert one.code == two.code == 0, one.err + two.err


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_two_ranks_equal_one(tmp_path, forks, normalize):
    objective = {"prefix": "student", "kl": "mixed", "forward_weight": 0.3}
    # The rate is tiny, so that the second step's rollouts are the same on both sides to the last
    # token.
    train = {
        "steps": 2,
        "lr": 1e-6,
        "normalize": normalize,
        "checkpoint_every": 2,
        "tokens_per_batch": 128,
    }
    pair = {
        "student": {"model": "potstill:stops-student"},
        "teacher": {"model": "potstill:stops-teacher"},
    }
    write_recipe(tmp_path, objective=objective, train=train, window={"tokens": 48}, **pair)
    train_on_one_and_on_two(forks, tmp_path)
    one, two = (run_folder.read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in (
            "loss",
            "forward_kl",
            "reverse_kl",
            "student_entropy",
            "grad_norm",
            "length",
            "num_loss_tokens",
        ):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
        mine, theirs = a["end_habits"], b["end_habits"]
        assert mine["num_ends"] == theirs["num_ends"] > 0
        for who in ("student", "teacher"):
            assert mine[who] == pytest.approx(theirs[who], rel=1e-4), who
    # The first rank writes what it read: the step's first rollout comes first on both sides.
    first, second = (
        run_folder.read_rows(tmp_path / name / "samples.jsonl")[0] for name in ("one", "two")
    )
    assert first["tokens"] == second["tokens"] and first["forward_kl"] == pytest.approx(
        second["forward_kl"], abs=2e-5
    )
    states = [
        load_file(tmp_path / name / "checkpoint/step-000002/optimizer.safetensors")
        for name in ("one", "two")
    ]
    # AdamW's first moment is a mean of the clipped gradients, which shows the gradients themselves.
    moments = [name for name in states[0] if name.endswith("exp_avg")]
    assert len(moments) == len(states[0]) / 3
    for name in moments:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-7)
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-6, atol=1e-7)


def test_two_ranks_gate_the_window_and_look_ahead_as_one(tmp_path, forks):
    """Seven probes on two ranks, and returns whose baseline is over both."""
    window = {
        "schedule": "entropy-gated",
        "tokens": 32,
        "start": 8,
        "check_every": 1,
        "num_probes": 7,
        "patience": 1,
    }
    train = {"steps": 3, "lr": 1e-6, "checkpoint_every": 3, "tokens_per_batch": 128}
    objective = {"prefix": "student", "kl": "reverse", "gamma": 1.0}
    write_recipe(
        tmp_path, objective=objective, train=train, window=window | {"reference": "teacher"}
    )
    train_on_one_and_on_two(forks, tmp_path)
    one, two = (run_folder.read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["window"] for row in one] == [8, 16, 32]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "reverse_kl", "grad_norm", "window", "total_flops"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    gates = [run_folder.read_rows(tmp_path / name / "window.jsonl") for name in ("one", "two")]
    for a, b in zip(*gates, strict=True):
        assert {k: v for k, v in a.items() if not isinstance(v, float)}.items() <= b.items()
        for key in ("entropy", "teacher_entropy", "truncation", "teacher_truncation"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key


def test_two_ranks_learn_from_groups_as_one(tmp_path, forks):
    """Each group is one rank's, and its responses, scores and advantages are those of one rank;
    the second step is on the first one's rollouts."""
    (tmp_path / "my_reward.py").write_text(
        "def digits(examples, responses):\n"
        "    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in responses]\n"
    )
    reward = {"weight": 1.0, "group_size": 2, "start_kl": 0.1, "source": "my_reward.py:digits"}
    train = {"steps": 2, "lr": 1e-4, "prompts_per_step": 6, "tokens_per_batch": 128}
    write_recipe(
        tmp_path,
        objective={"prefix": "student", "kl": "reverse"},
        reward=reward,
        rollouts={"reuse": 2},
        train=train | {"normalize": "sequence", "warmup_steps": 0},
    )
    train_on_one_and_on_two(forks, tmp_path)
    one, two = (run_folder.read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert one[1]["start_kl"] > 0 and one[1]["rollout_age"] == 1
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "reward", "reward_std", "start_kl", "grad_norm", "total_flops"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-8), key
        assert a["groups_with_signal"] == b["groups_with_signal"] > 0
    samples = (
        run_folder.read_rows(tmp_path / name / "samples.jsonl")[0] for name in ("one", "two")
    )
    first, second = (each["advantage"] for each in samples)
    assert first == second != 0


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_and_the_run_resumes(tmp_path, forks):
    """The rank that writes is killed at its fourth row, after the checkpoint of the second step."""
    train = {"steps": 10, "checkpoint_every": 2, "lr": 1e-3}
    write_recipe(tmp_path, objective={"prefix": "teacher", "kl": "forward"}, train=train)
    argv, fourth_row = ["train", "recipe.toml", "--out"], Trouble(event=4, where="metrics.jsonl")
    killed = forks.run_ranks(tmp_path, [*argv, "killed"], num_ranks=2, trouble=fourth_row)
    assert killed.is_killed and "potstill: rank 1" in killed.err, killed.err
    assert len(run_folder.read_rows(tmp_path / "killed/metrics.jsonl")) == 3
    for name in ("killed", "whole"):
        ended = forks.run_ranks(tmp_path, [*argv, name], num_ranks=2)
        assert ended.code == 0, ended.err
    killed, whole = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("killed", "whole")
    )
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_a_rank_that_fails_says_why_and_ends_the_other_in_seconds(tmp_path, forks):
    """Its own function for the scores raises in the second step; the other rank would wait for ten
    minutes."""
    (tmp_path / "my_reward.py").write_text(
        "import os\n"
        "calls = []\n"
        "def fails_once(examples, responses):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 2:\n"
        "        raise ValueError('no score for you')\n"
        "    return [float(len(text) % 2) for text in responses]\n"
    )
    reward = {"weight": 1.0, "group_size": 2, "source": "my_reward.py:fails_once"}
    train = {"steps": 3, "prompts_per_step": 4, "normalize": "sequence"}
    write_recipe(tmp_path, objective={"prefix": "student"}, reward=reward, train=train)
    ended = forks.run_ranks(tmp_path, ["train", "recipe.toml", "--out", "run"], num_ranks=2)
    assert ended.code != 0 and ended.seconds < 60
    assert "no score for you" in ended.err and "potstill: rank 0" in ended.err, ended.err
    assert len(run_folder.read_rows(tmp_path / "run/metrics.jsonl")) == 1


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_no_longer_than_the_limit(tmp_path):
    """The other says so in a line of its own and ends; nothing hangs for half an hour."""
    write_recipe(tmp_path, train={"steps": 5000})
    (tmp_path / "impatient.py").write_text(
        "from datetime import timedelta\n"
        "from potstill.models import distributed\n"
        "from potstill.__main__ import main\n"
        "distributed.TIMEOUT = timedelta(seconds=30)\n"
        "main()\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(tmp_path / "impatient.py"), "train", str(tmp_path / "recipe.toml")]
    said = tmp_path / "said"
    with said.open("w") as to_write:
        process = subprocess.Popen(
            [sys.executable, *launcher, *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=to_write,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        wait_until((tmp_path / "run" / "metrics.jsonl").exists, process)
        ranks = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(ranks[-1]), signal.SIGSTOP)
        wait_until(lambda: "waited in vain for another rank" in said.read_text(), process)
        os.kill(int(ranks[-1]), signal.SIGCONT)
        assert process.wait(timeout=SECONDS) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert "potstill: rank" in said.read_text()
