"""Where a long step is, on a terminal and in a log, and that short ones say nothing of it."""

import io
import re
import sys

import pytest
import torch
from conftest import tiny_recipe
from small_runs import rows_of

import potstill
from potstill.console import progress
from potstill.console.progress import StepDisplay
from potstill.training.metrics import NOTICED_TOKENS, Stopwatch


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_has_a_line_each_ten_seconds_of_a_long_step(clock, capsys):
    with StepDisplay(20, 4, quiet=False) as display:
        for second in range(35):
            clock.now = float(second)
            display.doing(f"rollouts, {second} of at most 40 tokens")
        display.lap()
        for second in range(9):
            clock.now = 34.0 + second
            display.doing("teacher, batch 1 of 2")
        display.update(5, num_tokens=8, total_flops=1.0, numbers="loss 1")
        clock.now = 44.5
        display.doing("student, batch 2 of 2")
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "loss" not in line] == [
        "step 5/20: rollouts, 10 of at most 40 tokens",
        "step 5/20: rollouts, 20 of at most 40 tokens",
        "step 5/20: rollouts, 30 of at most 40 tokens",
        "step 6/20: student, batch 2 of 2",
    ]


def test_quiet_says_nothing(clock, capsys):
    with StepDisplay(2, 0, quiet=True) as display:
        clock.now = 100.0
        display.doing("teacher, batch 1 of 2")
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_it_on_the_bar(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with StepDisplay(2, 0, quiet=False) as display:
        display.doing("teacher, batch 1 of 2")
        assert display.progress.tasks[0].description == "first step"
        clock.now = 1.5
        display.doing("teacher, batch 2 of 2")
        assert display.progress.tasks[0].description.startswith("teacher, batch 2 of 2")
        display.update(1, num_tokens=8, total_flops=1.0, numbers="loss 1")
        assert display.progress.tasks[0].description.endswith("loss 1")


def test_tokens_are_counted_and_noticed_now_and_then():
    told = []
    count = Stopwatch(torch.device("cpu"), told.append).token_counter(1000)
    for place in range(3 * NOTICED_TOKENS - 1):
        count(place % 7, 5)
    assert told == [f"rollouts, {i * NOTICED_TOKENS} of at most 1,000 tokens" for i in (1, 2)]


@pytest.mark.parametrize(
    "objective",
    [
        {"prefix": "student", "kl": "reverse"},
        {"prefix": "mixed", "prefix_mix": "handoff", "handoff_tokens": (2, 4)},
        {"prefix": "mixed", "prefix_mix": "token"},
    ],
)
def test_a_run_tells_its_parts_and_no_number_depends_on_it(
    tmp_path, capsys, monkeypatch, objective
):
    sections = {"objective": objective, "train": {"steps": 1, "tokens_per_batch": 128}}
    potstill.train(tiny_recipe(tmp_path / "alone", **sections))
    assert "batch" not in capsys.readouterr().err
    monkeypatch.setattr(progress, "LONG_IN_LOG", 0.0)
    potstill.train(tiny_recipe(tmp_path / "told", **sections))
    said = capsys.readouterr().err
    num_tokens = [int(num) for num in re.findall(r"step 1/1: rollouts, (\d+) of at most 192", said)]
    (row,) = rows_of(tmp_path / "told")
    assert num_tokens and max(num_tokens) <= 8 * row["length"]
    assert num_tokens == sorted(num_tokens)
    (num_batches,) = set(re.findall(r"teacher, batch \d of (\d)", said))
    for who in ("teacher", "student"):
        for number in range(1, int(num_batches) + 1):
            assert f"step 1/1: {who}, batch {number} of {num_batches}" in said
    assert rows_of(tmp_path / "alone") == rows_of(tmp_path / "told")
