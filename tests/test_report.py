import json
import re
import subprocess
import sys

import pytest
from conftest import tiny_recipe

import potstill
from potstill.report import print_table, table, table_note, write_report
from potstill.results import read_entry
from potstill.runlog import RunError, append


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs with an evaluation each."""
    folder = tmp_path_factory.mktemp("runs")
    evaluation = {"source": "multiplication", "num_problems": 3, "num_responses": 2}
    for name, kl in (("opd", "reverse"), ("dagger", "forward")):
        objective = {"prefix": "student", "kl": kl}
        potstill.train(tiny_recipe(folder / name, objective=objective, evaluation=evaluation), quiet=True)
    return folder


def test_one_file_with_the_grid_the_curves_and_the_rollouts(runs, tmp_path):
    out = write_report([runs / "opd", runs / "dagger"], tmp_path / "sub" / "report.html")
    text = out.read_text()
    body = text[text.index("<body>") :]
    for wanted in (
        "teacher prefix",
        "OPD",
        "DAgger",
        "no run here",
        "Avg@2",
        "Pass@2",
        "reverse KL",
        str(runs),
    ):
        assert wanted in body, wanted
    assert body.count('id="reader-data"') == 1
    # Works offline: nothing is loaded from anywhere.
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)


def test_numbers_are_those_of_the_files(runs):
    entry = read_entry(runs / "opd")
    rows = [json.loads(line) for line in (runs / "opd" / "metrics.jsonl").read_text().splitlines()]
    assert entry.num_loss_tokens == sum(row["num_loss_tokens"] for row in rows)
    header, (cells,) = table([entry])
    value, low, high = entry.evals[0]["avg"]
    assert cells[header.index("Avg@2 T=1")] == f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert entry.cell == "opd"


def test_evaluations_of_different_problems_are_not_compared_silently(runs, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(runs / "opd"), str(folder)], check=True)
    row = json.loads((folder / "evals.jsonl").read_text().splitlines()[-1])
    row["settings"] |= {"seed": 5, "num_problems": 9}
    append(folder / "evals.jsonl", row)
    assert "WARNING" not in table_note([read_entry(runs / "opd"), read_entry(runs / "dagger")])
    note = table_note([read_entry(runs / "dagger"), read_entry(folder)])
    assert "WARNING: the evaluations differ in num_problems, seed" in note


def test_the_terminal_table_is_whole_however_narrow_the_window(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    entries = [read_entry(runs / "opd"), read_entry(runs / "dagger")] * 3
    print_table(entries)
    printed = [line for line in capsys.readouterr().out.splitlines() if line and line[0] in "┏┃┡│├└"]
    assert len({len(line) for line in printed}) == 1 and all(line[-1] in "┓┃┩│┤┘" for line in printed)
    header, _ = table(entries)
    _, low, high = entries[0].evals[0]["entropy"]
    assert f"[{low:.3f}, {high:.3f}]" in "".join(printed) and all(name in "".join(printed) for name in header[1:])


def test_what_models_and_users_write_is_escaped(runs, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(runs / "opd"), str(folder)], check=True)
    attack = "<script>alert(1)</script>"
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])
    sample |= {"prompt": attack, "tokens": [attack] * len(sample["tokens"])}
    append(folder / "samples.jsonl", sample)
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert attack not in text and r"\u003cscript\u003ealert(1)\u003c/script\u003e" in text


def test_unfinished_runs_are_refused(runs, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(runs / "opd"), str(folder)], check=True)
    (folder / "DONE").unlink()
    with pytest.raises(RunError, match=r"is not finished; `potstill train .*recipe.toml` resumes it"):
        write_report([folder], tmp_path / "report.html")
    (folder / "DONE").write_text("another recipe's hash\n")
    with pytest.raises(RunError, match="is not finished"):
        write_report([folder], tmp_path / "report.html")
    with pytest.raises(RunError, match="at least one"):
        write_report([], tmp_path / "report.html")


def test_the_report_does_not_wait_for_torch(runs, tmp_path):
    program = (
        "import sys; from pathlib import Path; from potstill.report import write_report;"
        f"write_report([Path({str(runs / 'opd')!r})], Path({str(tmp_path / 'r.html')!r}));"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_controllers_move_is_shown_where_it_moves(runs, tmp_path):
    mixing = {"schedule": "linear", "end_weight": 1.0}
    window = {"schedule": "linear", "start": 8}
    objective = {"prefix": "student", "kl": "mixed"}
    potstill.train(tiny_recipe(tmp_path / "moved", objective=objective, mixing=mixing, window=window), quiet=True)
    moved = write_report([tmp_path / "moved"], tmp_path / "moved.html").read_text()
    assert "weight of the forward KL" in moved and "window (tokens)" in moved
    still = write_report([runs / "opd"], tmp_path / "still.html").read_text()
    assert "weight of the forward KL" not in still and "window (tokens)" not in still
