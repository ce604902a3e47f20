"""Entropy that a run of the forward KL has above what its stationary point predicts."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from synthetic_runs import write_run

from potstill.config import Recipe
from potstill.report.metrics import entropy_excess
from potstill.report.page import write_report
from potstill.report.tables import comparison_table, table_note
from potstill.runs.results import Entry, read_entry

FORWARD = {"prefix": "teacher", "kl": "forward"}


def row(step: int, excess: float, num_loss_tokens: int = 100) -> dict[str, Any]:
    """A step whose student has so much entropy too much."""
    return {
        "step": step,
        "student_entropy": 0.5 + 1 / step + excess,
        "teacher_entropy": 0.5,
        "forward_kl": 1 / step,
        "num_loss_tokens": num_loss_tokens,
        "seconds": 0.5,
    }


def entry(rows: list[dict[str, Any]], **sections: Any) -> Entry:
    recipe = Recipe.model_validate({"objective": FORWARD} | sections)
    return Entry(
        name="run", path=Path("run"), evals=(), recipe=recipe, metrics=tuple(cast(Any, rows))
    )


def test_the_mean_over_tokens_of_the_last_fifth_of_the_steps():
    rows = [row(step, excess=9.0) for step in range(1, 9)]
    rows += [row(9, excess=0.1, num_loss_tokens=300), row(10, excess=-0.3, num_loss_tokens=100)]
    assert entropy_excess(entry(rows)) == pytest.approx((300 * 0.1 - 100 * 0.3) / 400)
    # One step of fewer than five.
    assert entropy_excess(entry(rows[-2:])) == pytest.approx(-0.3)


def test_on_prefixes_of_either_model_and_at_any_temperature():
    rows = [row(1, excess=0.2)]
    for more in ({"prefix": "student"}, {"temperature": 2.0}):
        assert entropy_excess(entry(rows, objective=FORWARD | more)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": FORWARD | {"kl": "reverse"}},
        {"objective": FORWARD | {"kl": "mixed"}},
        {"objective": FORWARD | {"kl": "jsd"}},
        {"objective": FORWARD | {"signal": "topk"}},
        {"objective": {"prefix": "teacher", "signal": "labels"}},
        {"objective": FORWARD | {"weights": "first-tokens"}},
        {"objective": FORWARD | {"prefix": "student"}, "reward": {"weight": 1.0}},
        {"objective": FORWARD, "reward": {"start_kl": 1.0}},
        {"train": {"normalize": "sequence"}},
        {"objective": {"prefix": "student", "kl": "none"}, "reward": {"weight": 1.0}},
    ],
)
def test_no_other_objective_predicts_an_entropy(sections):
    assert entropy_excess(entry([row(1, excess=0.2)], **sections)) is None


def test_none_where_a_step_does_not_tell():
    assert entropy_excess(entry([])) is None
    assert entropy_excess(Entry(name="model", path=Path("model"), evals=())) is None
    for name in ("student_entropy", "teacher_entropy", "forward_kl", "num_loss_tokens"):
        assert entropy_excess(entry([row(1, excess=0.2) | {name: None}])) is None
    assert entropy_excess(entry([row(1, excess=0.2, num_loss_tokens=0)])) is None


def test_in_the_table_and_in_the_results(tmp_path):
    folders = [
        write_run(tmp_path / kl, [], num_steps=4, objective={"prefix": "teacher", "kl": kl})
        for kl in ("forward", "reverse")
    ]
    for folder in folders:
        rows = [row(step, excess=0.0126) for step in range(1, 5)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    page = write_report(folders, tmp_path / "report.html")
    (panel,) = json.loads((tmp_path / "results.json").read_text())["panels"]
    found = {run["path"].rstrip("/"): run["entropy_excess"] for run in panel["runs"]}
    assert found == {"forward": pytest.approx(0.0126), "reverse": None}
    text = page.read_text()
    assert "excess entropy" in text and "+0.013" in text and "last 20% of the steps" in text

    forward, reverse = (read_entry(folder) for folder in folders)
    header, rows = comparison_table([forward, reverse])
    assert [cells[header.index("excess entropy")] for cells in rows] == ["+0.013", ""]
    header, _ = comparison_table([reverse])
    assert "excess entropy" not in header and "xcess" not in table_note([reverse])
