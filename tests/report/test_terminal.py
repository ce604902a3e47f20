"""The table on the terminal: 100 columns, the numbers of the files, and models before and after."""

import json

import pytest
from synthetic_runs import evaluate, rewarded, write_run

from potstill.cli.app import main
from potstill.report.page import write_report
from potstill.report.terminal import WIDTH, print_summary, print_table
from potstill.runs.results import read_entry

CORNERS = {
    "DAgger": {"prefix": "student", "kl": "forward"},
    "OPD": {"prefix": "student", "kl": "reverse"},
    "Offline RL": {"prefix": "teacher", "kl": "reverse"},
    "SFT": {"prefix": "teacher", "kl": "forward"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Evaluations of two models, a run for each corner, a mixture, a second OPD with another
    window, and reinforcement learning."""
    folder = tmp_path_factory.mktemp("runs")
    for i, (name, accuracy) in enumerate((("base", 0.2), ("teacher", 0.9))):
        rows = [row | {"model": f"potstill:{name}"} for row in evaluate(10 + i, accuracy)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    for i, (name, objective) in enumerate(CORNERS.items()):
        write_run(folder / name, evaluate(i, 0.3 + 0.1 * i), objective=objective)
    mixed = {"prefix": "student", "kl": "mixed", "forward_weight": 0.8}
    write_run(folder / "mixed", evaluate(5, 0.5), objective=mixed)
    write_run(folder / "short", evaluate(6, 0.5), objective=CORNERS["OPD"], window={"tokens": 24})
    write_run(folder / "rl", evaluate(7, 0.8), **rewarded(folder / "OPD", steps=40))
    return folder


def printed(capsys) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    return lines


def row_of(lines: list[str], name: str) -> list[str]:
    """The cells of a row, each a value or what it was and is."""
    (line,) = [line for line in lines if line.startswith(f"{name} ")]
    return line.removeprefix(name).replace(" -> ", "->").replace(" ±", "±").split()


def test_a_summary_is_models_and_corners_before_and_after(folder, tmp_path, capsys):
    paths = [folder / name for name in ("base.json", "teacher.json", *CORNERS, "mixed")]
    print_summary(write_report(paths, tmp_path / "report.html"))
    lines = printed(capsys)
    assert (
        lines[0].endswith("  Pass@4 T=1") and "Avg@4 T=1" in lines[0] and "Avg@4 T=0.6" in lines[0]
    )
    assert [line.split("  ")[0].strip() for line in lines[1:7]] == ["base", "teacher", *CORNERS]
    base, _ = json.loads((folder / "base.json").read_text())
    value, low, high = base["avg"]
    assert row_of(lines, "base")[0] == f"{100 * value:.1f}±{100 * ((high - low) / 2):.1f}"
    for name in CORNERS:
        after = 100 * read_entry(folder / name).evals[0]["avg"][0]
        assert row_of(lines, name)[0].startswith(f"{100 * value:.1f}->{after:.1f}±")
    (entropy,) = [line for line in lines if line.startswith("Entropy (nats): base 0.")]
    opd = read_entry(folder / "OPD").evals[0]["entropy_before_answer"][0]
    assert f"OPD {opd:.3f}, Offline RL" in entropy
    assert "The report also has 1 more of this panel." in lines and "before -> after" in lines[8]


def test_a_rewarded_run_begins_where_its_run_ended(folder, tmp_path, capsys):
    print_summary(write_report([folder / "OPD", folder / "rl"], tmp_path / "report.html"))
    groups = json.loads((tmp_path / "results.json").read_text())["panels"][0]["groups"]
    assert [(group["corner"], group["is_model"], group["start"]) for group in groups] == [
        ("opd", False, None),
        (None, False, "OPD"),
    ]
    assert "The report also has 1 more of this panel." in printed(capsys)


def test_one_run_of_a_corner_is_shown(folder, tmp_path, capsys):
    print_summary(write_report([folder / "OPD", folder / "short"], tmp_path / "report.html"))
    lines = printed(capsys)
    assert [line.split("  ")[0] for line in lines if line.startswith("OPD")] == [
        "OPD · window.tokens 128"
    ]
    assert "The report also has 1 more of this panel." in lines


def test_runs_without_a_corner_are_shown(folder, tmp_path, capsys):
    print_summary(write_report([folder / "mixed"], tmp_path / "report.html"))
    lines = printed(capsys)
    assert any(line.startswith("Hybrid(student / 0.8 forward + 0.2 re...") for line in lines)
    assert not any("more of this panel" in line for line in lines)


def test_a_table_of_models_as_they_were_given(folder, capsys, monkeypatch):
    """The same runs twice are two rows, other sizes are warned of, and the terminal's width changes
    nothing."""
    entries = [read_entry(folder / name) for name in ("OPD", "SFT", "OPD")]
    print_table(entries)
    lines = printed(capsys)
    assert lines[0] == "12 held-out problems, 4 responses each, at most 60 tokens."
    assert [line.split()[0] for line in lines[2:5]] == ["OPD", "SFT", "OPD"]
    assert [line.split(":")[0] for line in lines[-4:-1]] == [
        "Entropy (nats)",
        "Length (tokens)",
        "Truncated (%)",
    ]
    monkeypatch.setenv("COLUMNS", "40")
    print_table(entries)
    assert printed(capsys) == lines
    entries[1].evals[0]["settings"]["source_sha256"] = "another"
    print_table(entries)
    assert printed(capsys)[-1].startswith(
        "WARNING: the evaluations differ in source_sha256, so their numbers"
    )


def test_what_is_too_wide_is_folded(tmp_path, capsys):
    """Columns that have no room stand below the others, each with the names."""
    metrics = {
        key: {"title": key, "scale": 100, "digits": 1} for key in ("avg-T1", "avg-T0.6", "pass8-T1")
    }
    found = {key: {"value": 1.0, "low": 0.6, "high": 1.0} for key in metrics}
    kinds = (("base", True, None), ("a" * 90, False, "base"))
    groups = [
        {"label": name, "is_model": is_model, "corner": None, "start": start, "metrics": found}
        for name, is_model, start in kinds
    ]
    panel = {"title": "b " * 90, "note": "", "metrics": metrics, "groups": groups}
    (tmp_path / "results.json").write_text(json.dumps({"panels": [panel]}))
    print_summary(tmp_path / "report.html")
    lines = printed(capsys)
    name = f"{'a' * 37}..."
    both, one = (line for line in lines if line.startswith(name))
    assert both.split(name)[1].split("  ")[1:] == ["100.0 -> 100.0 ±20.0"] * 2
    assert one.split(name)[1].split("  ")[1:] == ["100.0 -> 100.0 ±20.0"]
    assert sum(line.startswith("base ") for line in lines) == 2


def test_a_report_prints_its_summary(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["report", str(folder / "OPD"), str(folder / "base.json"), "--out", "r.html"])
    lines = printed(capsys)
    assert row_of(lines, "OPD")[0].count("->") == 1 and lines[-1] == "wrote r.html"


def test_runs_that_were_not_evaluated_are_said_to_be(tmp_path, capsys):
    print_summary(write_report([write_run(tmp_path / "run", [])], tmp_path / "report.html"))
    assert printed(capsys)[0].startswith("None of these runs was evaluated on a task")
