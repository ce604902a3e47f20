"""The demonstration with a few steps: one table, one report, nothing done twice, failures named."""

import pytest

from potstill.config import METHODS, RecipeError
from potstill.demo import Job, run_demo, run_jobs


def test_demo_trains_evaluates_and_reports_once(tmp_path, capsys):
    run_demo(tmp_path / "demo", num_jobs=2, steps=10)
    out = capsys.readouterr().out
    for name in (
        "base",
        "teacher",
        "DAgger",
        "Offline RL",
        "Avg@16 T=1",
        "Pass@8 T=0.6",
        "entropy",
        "length",
        "truncated",
    ):
        assert name in out
    report = (tmp_path / "demo" / "report.html").read_text()
    assert all(method.name in report for method in METHODS.values())
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert len(finished) == 4
    run_demo(tmp_path / "demo", num_jobs=2, steps=10)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")} == finished


def test_a_process_that_fails_is_named_with_its_reason(tmp_path):
    job = Job("broken", ("train", "no-such-recipe"), tmp_path / "broken")
    with pytest.raises(
        RecipeError, match=r"broken failed: potstill: recipe 'no-such-recipe' does not exist.*broken.log"
    ):
        run_jobs([job], 1, tmp_path, 1)
