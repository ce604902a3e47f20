"""Sentences of a report on its runs, by the number of seeds."""

import json
import re

import pytest
from synthetic_runs import evaluate, rewarded, write_run

from potstill.cli.show import comparisons
from potstill.report.page import write_report
from potstill.report.terminal import print_summary
from potstill.runs.results import Entry

JUDGING = ("Below it", "Undecided", "excludes 0", "supported", "contradicted", "undecided")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three seeds of a good, a bad and a good enough method, and a next stage from the bad one."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        for i, (kl, accuracy) in enumerate((("reverse", 0.9), ("forward", 0.1), ("jsd", 0.9))):
            objective = {"prefix": "student", "kl": kl}
            write_run(
                folder / f"{kl}-{seed}",
                evaluate(10 * seed + i, accuracy),
                objective=objective,
                train={"seed": seed},
            )
        start = str(folder / f"forward-{seed}")
        write_run(folder / f"rl-{seed}", evaluate(10 * seed + 5, 0.9), **rewarded(start, seed=seed))
    return folder


def told(folder, num_seeds, out, capsys):
    """Findings, claims and what is printed of the first seeds."""
    paths = [path for path in sorted(folder.iterdir()) if int(path.name[-1]) < num_seeds]
    page = write_report(paths, out / "report.html")
    print_summary(page)
    (panel,) = json.loads((out / "results.json").read_text())["panels"]
    return panel, capsys.readouterr().out, page.read_text()


@pytest.mark.parametrize(("num_seeds", "words"), [(1, "one seed"), (2, "two seeds")])
def test_few_seeds_rank_nothing(folder, tmp_path, capsys, num_seeds, words):
    panel, printed, text = told(folder, num_seeds, tmp_path, capsys)
    found = " ".join(panel["findings"])
    assert not any(word in found + printed for word in JUDGING)
    alone = "; the interval is over problems alone" if num_seeds == 1 else ""
    assert f"({words}{alone})" in panel["findings"][0]
    (direction,) = [
        sentence
        for sentence in panel["findings"]
        if sentence.startswith("A direction and no ranking")
    ]
    by_label = {group["label"]: group["metrics"]["avg-T1"]["value"] for group in panel["groups"]}
    best, worst = max(by_label["OPD"], by_label["Hybrid(student / jsd 0.5)"]), by_label["DAgger"]
    assert f"DAgger by {100 * (best - worst):.1f} ({words})" in direction
    assert {claim["verdict"] for claim in panel["claims"] if claim["effect"]} == {words}
    assert f"towards ({words})" in {claim["answer"] for claim in panel["claims"]}
    assert "<h3>Claims</h3>" not in text
    # Before and after: said in the table, in the sentence and in the numbers.
    assert panel["rewarded"][0]["num_seeds"] == num_seeds and f"</b> ({words}{alone})" in text
    assert any(
        s.startswith("Best end of reinforcement learning") and f"after ({words}{alone})" in s
        for s in panel["findings"]
    )


def test_three_seeds_judge(folder, tmp_path, capsys):
    panel, _, text = told(folder, 3, tmp_path, capsys)
    assert "(3 seeds)." in panel["findings"][0] and not any(
        "A direction" in s for s in panel["findings"]
    )
    assert (
        "Below it by an interval over seeds and problems that excludes 0: 1 of 2 others."
        in panel["findings"]
    )
    assert any(
        s.startswith("Undecided, as the 95 % interval over seeds and problems")
        for s in panel["findings"]
    )
    verdicts = {claim["name"]: claim["verdict"] for claim in panel["claims"]}
    assert verdicts["accuracy-entropy: accuracy"] == "supported" and "supported" in text


def test_models_without_training_are_compared_over_problems(tmp_path, capsys):
    """No seed made them: the interval is about these models."""
    for name, accuracy in (("good", 0.9), ("bad", 0.1)):
        rows = [row | {"model": name} for row in evaluate(len(name), accuracy)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    page = write_report(
        [tmp_path / "good.json", tmp_path / "bad.json"], tmp_path / "out" / "report.html"
    )
    (panel,) = json.loads((page.parent / "results.json").read_text())["panels"]
    assert panel["findings"][0].startswith("Highest Avg@4 T=1 of 2 settings: good with")
    assert "seed" not in " ".join(panel["findings"])
    assert (
        "Below it by an interval over problems that excludes 0: 1 of 1 others." in panel["findings"]
    )


def test_two_evaluated_models_are_compared_as_they_are(tmp_path):
    evals = {"a": evaluate(0, 0.2), "b": evaluate(1, 0.8)}
    entries = [Entry(name=name, path=tmp_path / name, evals=rows) for name, rows in evals.items()]
    *lines, note = comparisons(entries)
    assert len(lines) == 2 and all("(paired bootstrap over problems)" in line for line in lines)
    assert "over problems alone" in note and "not about how they were trained" in note
    assert comparisons(entries[:1]) == []


NAME = "<im_end><script>alert(1)</script>"


def with_habits(folder, *rows):
    """A run whose steps have these habits."""
    write_run(folder, evaluate(0, 0.5), num_steps=len(rows), objective={"prefix": "student"})
    path = folder / "metrics.jsonl"
    lines = [
        json.loads(line) | {"end_habits": row}
        for line, row in zip(path.read_text().splitlines(), rows, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_report_shows_first_and_last_habits(tmp_path):
    none = {"ends_of": "student", "num_ends": 0}
    begun = none | {
        "num_ends": 3,
        "student": {"<eos>": 0.9, NAME: 0.05},
        "teacher": {"<eos>": 0.01, NAME: 0.8},
    }
    ended = none | {
        "num_ends": 4,
        "student": {"<eos>": 0.125, NAME: 0.7},
        "teacher": {"<eos>": 0.02, NAME: 0.9},
    }
    unknown = {key: value for key, value in begun.items() if key != "teacher"}
    paths = [with_habits(tmp_path / "moved", none, begun, none, ended, none)]
    paths += [
        with_habits(tmp_path / "topk", unknown, unknown),
        with_habits(tmp_path / "never", none, none),
    ]
    page = write_report(paths, tmp_path / "out" / "report.html")
    text = page.read_text()
    section = text[text.index("<h3>End habits</h3>") :]
    rows = re.findall(r"<tr><td>.*?</tr>", section[: section.index("</details>")])
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    moved = ["0.900 → 0.125", "0.010 → 0.020", "0.050 → 0.700", "0.800 → 0.900", "no → yes"]
    topk = ["0.900 → 0.900", "not known", "0.050 → 0.050", "not known", "not known → not known"]
    whose = "the student&#39;s"
    assert [row[1:] for row in cells] == [
        [whose, "2 → 4", "3 → 4", *moved],
        [whose, "1 → 2", "3 → 3", *topk],
    ]
    assert NAME not in text
    (panel,) = json.loads((page.parent / "results.json").read_text())["panels"]
    assert any(
        "different tokens in 1 of 2 runs at first, and in 0 at last" in text
        for text in panel["findings"]
    )
    assert [row["step"] for row in panel["runs"][0]["end_habits"]] == [2, 4] and panel["runs"][2][
        "end_habits"
    ] == []
