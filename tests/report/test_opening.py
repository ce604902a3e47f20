"""The opening of a report says what the numbers of its runs say, counted by hand."""

import json
import re
from pathlib import Path

import pytest
from synthetic_runs import evaluate, write_run

from potstill.report.figures import COLOURS, style_at
from potstill.report.numbers import panel_result
from potstill.report.opening import NOT_MEASURED, picture, sentences_of, title_of
from potstill.report.page import write_report
from potstill.runs.results import Panel, read_entry

OPD, SFT = (
    {"prefix": "student", "kl": "reverse"},
    {"prefix": "teacher", "kl": "forward"},
)


def result_of(*folders: Path):
    return panel_result(Panel(title="", entries=tuple(read_entry(path) for path in folders)))


def seeds(folder: Path, accuracy: float, objective: dict, num: int = 3) -> list[Path]:
    return [
        write_run(
            folder / f"{accuracy}-{seed}",
            evaluate(seed, accuracy, 60),
            objective=objective,
            train={"seed": seed},
        )
        for seed in range(num)
    ]


def test_two_runs_by_their_names_and_no_ranking_of_one_seed(tmp_path):
    result = result_of(*seeds(tmp_path, 0.8, OPD, 1), *seeds(tmp_path, 0.3, SFT, 1))
    assert title_of([result]) == "OPD and SFT"
    compared, best, look = sentences_of(result)
    assert compared == (
        "2 runs: OPD; SFT. The recipes differ in objective.kl (reverse, forward), objective.prefix "
        "(student, teacher)."
    )
    values = [entry.evals[0]["avg"][0] for entry in result.panel.entries]
    assert f"{100 * (values[0] - values[1]):.1f} points [" in best
    assert best.startswith("Highest is OPD") and "no ranking, which takes 3 seeds" in best
    assert look.startswith("Nothing stands out")


def test_three_seeds_rank_and_equal_runs_do_not(tmp_path):
    better = seeds(tmp_path / "a", 0.8, OPD)
    result = result_of(*better, *seeds(tmp_path / "b", 0.3, SFT))
    assert sentences_of(result)[1].startswith("Best is OPD with Avg@4 T=1 ")
    same = result_of(*better, *seeds(tmp_path / "c", 0.8, SFT))
    assert "cannot be told" in sentences_of(same)[1] and "includes 0" in sentences_of(same)[1]
    figure = picture(result, str)
    assert figure is not None
    (marks,) = figure["data"]
    assert marks["y"] == ["OPD", "SFT"] and marks["x"][0] > marks["x"][1]


@pytest.mark.parametrize(
    ("second", "num", "shown", "expected"),
    [
        ([0.5, 0.45, 0.55], 16, "0.2000 [0.1000, 0.3000]", "do not overlap"),
        ([0.5, 0.25, 0.6], 16, "0.2000 [0.1000, 0.3000]", "intervals overlap"),
        ([0.5, 0.5, 0.5], 1, "0.2000", "one prompt has no interval"),
    ],
)
def test_runs_without_a_task_are_ranked_by_validation(tmp_path, second, num, shown, expected):
    folders = [
        write_run(tmp_path / "opd", [], objective=OPD),
        write_run(tmp_path / "sft", [], objective=SFT),
    ]
    for folder, last in zip(folders, ([0.2, 0.1, 0.3], second), strict=True):
        rows = [
            {"step": step, "num_prompts": num, "max_tokens": 60, "seconds": 1.0}
            | {"student_prefix_reverse_kl": quality}
            for step, quality in ((0, [0.9, 0.8, 1.0]), (40, last))
        ]
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = result_of(*folders)
    best = sentences_of(result)[1]
    assert f"OPD at {shown}, 0.9000 before training" in best and expected in best
    text = write_report(folders, tmp_path / "report.html").read_text()
    headings = re.findall(r"<h3[^>]*>(.*?)</h3>", text)
    assert headings[:2] == ["On prompts that are not trained on", "Results"]


def test_a_run_without_any_quality_is_told_what_to_switch_on(tmp_path):
    result = result_of(write_run(tmp_path / "run", [], objective=OPD))
    assert sentences_of(result)[1] == NOT_MEASURED and picture(result, str) is None


def test_what_stands_out_is_named(tmp_path):
    folder = write_run(tmp_path / "run", [], objective=OPD)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"truncation": 0.1, "teacher_entropy_before_answer": 0.7}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "less than half of the teacher's in OPD" in sentences_of(result_of(folder))[2]
    rows[-1]["truncation"] = 0.4
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "cuts 20% or more of the completions" in sentences_of(result_of(folder))[2]


def test_no_two_of_36_groups_look_alike():
    styles = [style_at(group, 0) for group in range(36)]
    assert len({(style.colour, style.symbol) for style in styles}) == 36
    assert len({(style.colour, style.dash) for style in styles}) == 36
    assert {style.colour for style in styles[:6]} == set(COLOURS)


def test_claims_are_for_studies_or_for_seeds_that_judge(tmp_path):
    dagger = OPD | {"kl": "forward"}
    few = [*seeds(tmp_path / "a", 0.8, OPD, 1), *seeds(tmp_path / "b", 0.3, dagger, 1)]
    page = write_report(few, tmp_path / "few.html").read_text()
    assert "<h3>Claims</h3>" not in page and "claims not measured" not in page
    planned = [
        {"folder": str(path.relative_to(tmp_path)), "name": path.name, "state": "done"}
        for path in few
    ]
    panel = {"title": "Four corners", "note": "", "is_sweep": False, "runs": planned}
    (tmp_path / "plan.json").write_text(json.dumps({"panels": [panel]}))
    page = write_report([tmp_path], tmp_path / "study.html").read_text()
    assert page.index('">Results</h3>') < page.index("<h3>Claims</h3>")
    assert "<title>Four corners · potstill report</title>" in page
