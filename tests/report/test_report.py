import base64
import hashlib
import html
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import markupsafe
import pytest
from conftest import browsed, in_a_browser, tiny_recipe
from synthetic_runs import evaluate, rewarded, write_run

import potstill
from potstill.files import append, unpack
from potstill.report.comparison import forward_weight, grids, make_groups, rewarded_pairs
from potstill.report.metrics import metrics_of, problem_values, stored
from potstill.report.page import with_policy, write_report
from potstill.report.questions import Claim
from potstill.report.tables import comparison_table, table_note
from potstill.runs.results import group_by_seed, read_entry, recipe_key
from potstill.runs.run_folder import RunError
from potstill.statistics import Estimate, seeds_and_problems

DECISION = {
    "teacher_entropy": None,
    "truncation": 0.1,
    "teacher_truncation": 0.0,
    "repetition": 0.0,
    "threshold": 0.1,
}
DECISIONS = [
    {"step": 1, "action": "hold", "window": 16, "failed": [], "entropy": 0.31, **DECISION},
    {"step": 20, "action": "climb", "window": 32, "failed": [], "entropy": 0.29, **DECISION},
    {
        "step": 30,
        "action": "freeze",
        "window": 32,
        "failed": ["entropy"],
        "entropy": 0.05,
        **DECISION,
    },
]
SECTIONS = {
    "The grid",
    "Results",
    "Accuracy, entropy and length",
    "Training",
    "Mixing the KLs",
    "The curriculum",
    "Equal steps and equal operations",
    "Accuracy against operations",
    "Before and after reinforcement learning",
}
ATTACK = """<script>alert(1)</script><img src=x onerror="document.title='broken'">"""


def sections_of(page: Path) -> set[str]:
    """The headings of a report, of those that depend on its runs."""
    return SECTIONS & set(re.findall(r"<h3[^>]*>(.*?)</h3>", page.read_text()))


def results_of(page: Path) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads((page.parent / "results.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def evals():
    """Evaluations of known accuracy, made once."""
    return [evaluate(i, accuracy) for i, accuracy in enumerate((0.3, 0.5, 0.8))]


@pytest.fixture(scope="module")
def study(tmp_path_factory, evals):
    """A folder of runs that feed every section: corners with seeds, a mixture, a gate, a budget,
    reinforcement learning."""
    folder = tmp_path_factory.mktemp("study")
    low, middle, high = evals
    for prefix in ("teacher", "student"):
        for kl in ("forward", "reverse"):
            objective = {"prefix": prefix, "kl": kl}
            write_run(
                folder / f"{prefix}-{kl}", high if kl == "reverse" else low, objective=objective
            )
            budget = {"flops": 1e9}
            write_run(folder / f"{prefix}-{kl}-flops", middle, objective=objective, train=budget)
    opd = {"prefix": "student", "kl": "reverse"}
    write_run(folder / "student-reverse-1", middle, objective=opd, train={"seed": 1})
    mixed = {"prefix": "student", "kl": "mixed", "forward_weight": 0.8}
    write_run(folder / "mixed", middle, objective=mixed)
    window = {"schedule": "entropy-gated", "start": 16}
    write_run(folder / "gated", middle, decisions=DECISIONS, objective=opd, window=window)
    write_run(folder / "rl", high, **rewarded(folder / "teacher-forward", steps=40))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs with an evaluation each."""
    folder = tmp_path_factory.mktemp("runs")
    evaluation = {"source": "multiplication", "num_problems": 3, "num_responses": 2}
    for name, kl in (("opd", "reverse"), ("dagger", "forward")):
        objective = {"prefix": "student", "kl": kl}
        potstill.train(
            tiny_recipe(folder / name, objective=objective, evaluation=evaluation), quiet=True
        )
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
        'href="../../',
    ):
        assert wanted in body, wanted
    assert body.count('id="reader-data"') == 1
    # Works offline: nothing is loaded from anywhere.
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text) and "@import" not in body


def test_numbers_are_those_of_the_files(runs):
    entry = read_entry(runs / "opd")
    rows = [json.loads(line) for line in (runs / "opd" / "metrics.jsonl").read_text().splitlines()]
    assert entry.num_loss_tokens == sum(row["num_loss_tokens"] for row in rows)
    header, (cells,) = comparison_table([entry])
    value, low, high = entry.evals[0]["avg"]
    assert (
        cells[header.index("Avg@2 T=1")] == f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    )
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


def test_what_models_and_users_write_is_escaped(runs, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(runs / "opd"), str(folder)], check=True)
    attack = "<script>alert(1)</script>"
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])
    sample |= {"prompt": attack, "tokens": [attack] * len(sample["tokens"])}
    append(folder / "samples.jsonl", sample)
    text = write_report([folder], tmp_path / "report.html").read_text()
    (packed,) = re.findall(r'id="reader-data">([A-Za-z0-9+/=]*)</script>', text)
    assert attack not in text and attack in unpack(packed)


def test_unfinished_runs_are_refused(runs, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(runs / "opd"), str(folder)], check=True)
    (folder / "DONE").unlink()
    with pytest.raises(
        RunError, match=r"is not finished; `potstill train .*recipe.toml` resumes it"
    ):
        write_report([folder], tmp_path / "report.html")
    (folder / "DONE").write_text("another recipe's hash\n")
    with pytest.raises(RunError, match="is not finished"):
        write_report([folder], tmp_path / "report.html")
    with pytest.raises(RunError, match="at least one"):
        write_report([], tmp_path / "report.html")


def test_the_report_does_not_wait_for_torch(runs, tmp_path):
    program = (
        "import sys; from pathlib import Path; from potstill.report.page import write_report;"
        f"write_report([Path({str(runs / 'opd')!r})], Path({str(tmp_path / 'r.html')!r}));"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_controllers_move_is_shown_where_it_moves(runs, tmp_path):
    mixing = {"schedule": "linear", "end_weight": 1.0}
    window = {"schedule": "linear", "start": 8}
    objective = {"prefix": "student", "kl": "mixed"}
    potstill.train(
        tiny_recipe(tmp_path / "moved", objective=objective, weight_schedule=mixing, window=window),
        quiet=True,
    )
    moved = write_report([tmp_path / "moved"], tmp_path / "moved.html").read_text()
    assert "weight of the forward KL" in moved and "window (tokens)" in moved
    still = write_report([runs / "opd"], tmp_path / "still.html").read_text()
    assert "weight of the forward KL" not in still and "window (tokens)" not in still


def test_sections_appear_exactly_when_their_runs_feed_them(study, runs, tmp_path):
    every = write_report(sorted(study.iterdir()), tmp_path / "all" / "report.html")
    assert sections_of(every) == SECTIONS - {"Accuracy against operations"}
    corners = [study / "student-reverse", study / "teacher-forward"]
    some = write_report(corners, tmp_path / "corners" / "report.html")
    both = {
        "The grid",
        "Results",
        "Accuracy, entropy and length",
        "Training",
        "Accuracy against operations",
    }
    assert sections_of(some) == both
    one = write_report([study / "rl"], tmp_path / "one" / "report.html")
    assert sections_of(one) == both - {"The grid"}
    pair = write_report(
        [study / "rl", study / "teacher-forward"], tmp_path / "pair" / "report.html"
    )
    assert sections_of(pair) == both | {"Before and after reinforcement learning"}
    mixture = write_report([*corners, study / "mixed"], tmp_path / "mixed" / "report.html")
    assert sections_of(mixture) == both | {"Mixing the KLs"}
    gate = write_report([*corners, study / "gated"], tmp_path / "gated" / "report.html")
    assert (
        sections_of(gate) == both | {"The curriculum"}
        and "freeze before step 30" in gate.read_text()
    )


def test_a_number_on_the_page_is_the_one_of_the_files(study, evals, tmp_path):
    page = write_report(sorted(study.iterdir()), tmp_path / "report.html")
    (panel,) = results_of(page)["panels"]
    text = re.sub(r"<br>|</?small>|</?span[^>]*>", "", page.read_text())
    # Each run: its own evaluations as they were stored.
    by_path = {run["path"]: run for run in panel["runs"]}
    for folder in study.iterdir():
        (run,) = [
            run for path, run in by_path.items() if path.rstrip("/").endswith(f"/{folder.name}")
        ]
        rows = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
        assert [row["avg"] for row in run["evals"]] == [row["avg"] for row in rows]
        assert not any("problems" in row for row in run["evals"])
        value, low, high = (100 * x for x in rows[0]["avg"])
        assert f"{value:.1f}[{low:.1f}, {high:.1f}]" in text
        assert run["flops"] == 40e9 and run["num_loss_tokens"] == 40_000
    # Two seeds: the mean, with both levels resampled, and each seed's own value beside it.
    first, second = evals[2][0], evals[1][0]
    (group,) = [group for group in panel["groups"] if len(group["paths"]) == 2]
    summary = group["metrics"]["avg-T1"]
    assert summary["value"] == pytest.approx((first["avg"][0] + second["avg"][0]) / 2)
    expected = seeds_and_problems([first["problems"]["score"], second["problems"]["score"]])
    assert (summary["low"], summary["high"]) == (expected.low, expected.high)
    assert list(summary["runs"].values()) == [first["avg"][0], second["avg"][0]]
    shown = f"{100 * expected.value:.1f} [{100 * expected.low:.1f}, {100 * expected.high:.1f}]"
    assert shown in text and f"seed 1: {100 * second['avg'][0]:.1f}" in text
    # Reinforcement learning: the paired difference.
    (pair,) = panel["rewarded"]
    effect = pair["differences"]["avg-T1"]
    assert effect["value"] == pytest.approx(evals[2][0]["avg"][0] - evals[0][0]["avg"][0])
    assert (
        f"{100 * effect['value']:+.1f} [{100 * effect['low']:+.1f}, {100 * effect['high']:+.1f}]"
        in text
    )
    # Both grids, at equal steps and at equal operations, have four corners.
    assert [len(grid["cells"]) for grid in panel["grids"]] == [4, 4]


def test_values_of_problems_mean_the_stored_metric(study):
    entry = read_entry(study / "mixed")
    metrics = [metric for metric in metrics_of([entry]) if metric.temperature is not None]
    assert {metric.column for metric in metrics} >= {
        "avg",
        "pass",
        "entropy_before_answer",
        "length",
        "truncation",
    }
    for metric in metrics:
        found, kept = problem_values(entry, metric), stored(entry, metric)
        assert found is not None and kept is not None
        assert statistics.mean(found.values()) == pytest.approx(kept[0], abs=1e-5), metric.key


def test_seeds_group_and_other_fields_do_not(tmp_path, evals):
    for name, sections in {
        "a": {"train": {"seed": 0, "lr": 3e-3}},
        "b": {"train": {"seed": 1, "lr": 3e-3}, "data": {"seed": 1}},
        "c": {"train": {"lr": 1e-3}},
    }.items():
        write_run(tmp_path / name, evals[0], **sections)
        write_run(tmp_path / f"{name}-rl", evals[1], **rewarded(tmp_path / name, seed=len(name)))
    entries = [read_entry(path) for path in sorted(tmp_path.iterdir())]
    names = [[entry.path.name for entry in group] for group in group_by_seed(entries)]
    assert names == [["a", "b"], ["a-rl", "b-rl"], ["c"], ["c-rl"]]
    a, c = entries[0], entries[4]
    assert recipe_key(a, ()) != recipe_key(c, ()) and recipe_key(a, ("train",)) == recipe_key(
        c, ("train",)
    )
    labels = [group.label for group in make_groups(entries, [])]
    rates = ("0.003", "0.001")
    assert labels == [
        f"{name} · train.lr {lr}" for lr in rates for name in ("SFT", "GRPO · from SFT")
    ]


def test_stages_of_stages_group_by_seed(tmp_path, evals):
    """Each seed goes on from its own run; a next distillation is no reinforcement learning."""
    for seed in range(2):
        train = {"seed": seed}
        opd = write_run(tmp_path / f"opd-{seed}", evals[0], train=train)
        again = {"student": {"model": str(opd / "model")}, "objective": {"kl": "reverse"}}
        write_run(tmp_path / f"again-{seed}", evals[1], train=train, **again)
        one = write_run(tmp_path / f"one-{seed}", evals[1], **rewarded(opd, seed=seed))
        write_run(tmp_path / f"two-{seed}", evals[2], **rewarded(one, seed=seed))
    entries = [read_entry(path) for path in sorted(tmp_path.iterdir())]
    names = [[entry.path.name for entry in group] for group in group_by_seed(entries)]
    assert names == [[f"{name}-{i}" for i in range(2)] for name in ("again", "one", "opd", "two")]
    groups = make_groups(entries, metrics_of(entries))
    pairs = rewarded_pairs(groups, metrics_of(entries))
    found = {(p.before.entries[0].path.name, p.after.entries[0].path.name) for p in pairs}
    assert found == {("opd-0", "one-0"), ("one-0", "two-0")}


def test_a_reward_beside_a_kl_is_no_corner_of_the_grid(tmp_path, evals):
    for kl in ("forward", "reverse"):
        objective = {"prefix": "student", "kl": kl}
        write_run(tmp_path / kl, evals[0], objective=objective)
        for name, reward in (("weight", {"weight": 1.0}), ("start", {"start_kl": 0.1})):
            write_run(tmp_path / f"{kl}-{name}", evals[1], objective=objective, reward=reward)
    groups = make_groups([read_entry(path) for path in sorted(tmp_path.iterdir())], [])
    (part,) = grids(groups)
    assert [group.entries[0].path.name for group in part.groups] == ["forward", "reverse"]
    assert [forward_weight(group) for group in groups] == [1.0, None, None, 0.0, None, None]


def test_cells_may_have_loss_backends_and_batches_of_their_own(tmp_path, evals):
    ways = {
        "forward": {"loss_backend": "plain"},
        "reverse": {"loss_backend": "triton", "tokens_per_batch": 77},
    }
    entries = [
        read_entry(write_run(tmp_path / kl, evals[0], objective={"kl": kl}, train=ways[kl]))
        for kl in ways
    ]
    (part,) = grids(make_groups(entries, []))
    assert [group.entries[0].path.name for group in part.groups] == ["forward", "reverse"]


def test_cells_may_have_learning_rates_of_their_own(tmp_path, evals):
    def run(kl: str, lr: float):
        path = tmp_path / f"{kl}-{lr}"
        return read_entry(
            path
            if path.exists()
            else write_run(path, evals[0], objective={"kl": kl}, train={"lr": lr})
        )

    def cells(*entries):
        return [[g.entries[0].path.name for g in p.groups] for p in grids(make_groups(entries, []))]

    forward, reverse, other = run("forward", 1e-3), run("reverse", 2e-3), run("forward", 2e-3)
    assert cells(forward, reverse) == [["forward-0.001", "reverse-0.002"]]
    # Two rates in one corner: only what has the same rate is compared.
    assert cells(forward, reverse, other) == [["reverse-0.002", "forward-0.002"]]
    assert cells(forward) == [["forward-0.001"]]


def test_unfinished_runs_of_a_study_are_listed(study, tmp_path):
    folder = tmp_path / "a study"
    shutil.copytree(study / "mixed", folder / "mixed")
    shutil.copytree(study / "gated", folder / "crashed")
    (folder / "crashed" / "DONE").unlink()
    states = {"mixed": "done", "crashed": "crashed: out of memory", "later": "not begun"}
    planned = [
        {"folder": name, "name": f"name of {name}", "state": state}
        for name, state in states.items()
    ]
    panels = [
        {"title": ATTACK, "note": "a note", "is_sweep": False, "runs": planned},
        {"title": "nothing yet", "note": "", "is_sweep": False, "runs": planned[1:]},
    ]
    (folder / "plan.json").write_text(json.dumps({"panels": panels}))
    page = write_report([folder], tmp_path / "report.html")
    text = page.read_text()
    assert str(markupsafe.escape(ATTACK)) in text
    assert (
        ATTACK not in text and "name of mixed" in text and text.count("crashed: out of memory") == 2
    )
    assert [len(panel["unfinished"]) for panel in results_of(page)["panels"]] == [2, 2]
    assert 'href="a%20study/crashed/"' in text and "a%20study/later" not in text


def test_links_lead_to_what_is_there(study, tmp_path):
    page = write_report(sorted(study.iterdir()), tmp_path / "deep" / "er" / "report.html")
    body = re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL)
    links = {
        (page.parent / unquote(link)).resolve() for link in re.findall(r'href="([^"#]+)"', body)
    }
    assert links == {path.resolve() for path in (*study.iterdir(), page.parent / "results.json")}
    assert all(path.exists() for path in links)


def test_verdicts_are_words_with_their_runs(study, tmp_path, monkeypatch):
    pair = (study / "student-reverse", study / "teacher-forward")
    found = [
        Claim(
            name="c1",
            statement="Reverse KL wins.",
            metric="Avg",
            effect=Estimate(4.0, 1.0, 7.0),
            unit="points",
            pairs=(pair,),
            verdict="supported",
            detail="d1",
        ),
        Claim(
            name="c2",
            statement="It is longer.",
            metric="length",
            effect=Estimate(-4.0, -7.0, -1.0),
            unit="tokens",
            pairs=(pair,),
            verdict="contradicted",
            detail="d2",
        ),
        Claim(
            name="c3",
            statement=f"It is cheap {ATTACK}.",
            metric="GFLOP",
            effect=Estimate(0.1, -1.0, 1.0),
            unit="%",
            pairs=(pair,),
            verdict="undecided",
            detail="d3",
        ),
        Claim(
            name="c4",
            statement="It is best.",
            metric="Avg",
            effect=None,
            unit="points",
            pairs=(),
            verdict="not measured",
            detail="d4",
        ),
    ]
    monkeypatch.setattr("potstill.report.numbers.claims", lambda entries: found)
    page = write_report(pair, tmp_path / "report.html")
    rows = re.findall(r"<tr><td><b>c\d.*?</tr>|<li><b>c\d.*?</li>", page.read_text(), re.DOTALL)
    assert [each.verdict in row for each, row in zip(found, rows, strict=True)] == [True] * 4
    assert "+4 points" in rows[0] and "[1, 7]" in rows[0] and rows[0].count("<a href=") == 2
    assert ATTACK not in rows[2] and rows[3].startswith("<li>") and "d4" in rows[3]
    (panel,) = results_of(page)["panels"]
    assert [claim["verdict"] for claim in panel["claims"]] == [each.verdict for each in found]
    assert panel["claims"][0]["effect"] == {"value": 4.0, "low": 1.0, "high": 7.0}


def test_what_is_no_number_is_null_and_no_other_file_is_replaced(study, evals, tmp_path):
    folder = shutil.copytree(study / "mixed", tmp_path / "run")
    append(
        folder / "metrics.jsonl", {"step": 41, "grad_norm": float("nan"), "seconds": float("inf")}
    )
    page = write_report([folder], tmp_path / "report.html")
    assert results_of(page)["panels"][0]["runs"][0]["seconds"] is None
    assert "NaN," not in re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL)
    write_report([folder], page)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "results.json").write_text(json.dumps(evals[0]))
    with pytest.raises(RunError, match="one of the files to report on"):
        write_report([folder, page], page)
    with pytest.raises(RunError, match=r"results.json' is there and is no report's"):
        write_report([mine / "results.json"], mine / "report.html")
    assert (mine / "results.json").read_text() == json.dumps(evals[0]) and not (
        mine / "report.html"
    ).exists()


@pytest.mark.slow
def test_three_hundred_runs(evals, tmp_path):
    paths = [
        write_run(
            tmp_path / f"r{i}", evals[i % 3], 120, train={"seed": i % 4, "lr": 1e-3 + i // 4 * 1e-4}
        )
        for i in range(300)
    ]
    # The processor's time: the clock's says how busy the machine is.
    started = time.process_time()
    page = write_report(paths, tmp_path / "report.html")
    assert time.process_time() - started < 20
    assert page.stat().st_size < 5e6
    (panel,) = results_of(page)["panels"]
    assert len(panel["runs"]) == 300 and len(panel["groups"]) == 75
    assert page.read_text().count(" checked>") == 6


@in_a_browser
def test_a_browser_draws_every_figure_and_runs_no_text(study, tmp_path):
    runs = enumerate(sorted(study.iterdir()))
    planned = [
        {"folder": str(path), "name": f"{ATTACK} name {i}", "state": "done"} for i, path in runs
    ]
    panels = [{"title": f"panel {ATTACK}", "note": ATTACK, "is_sweep": False, "runs": planned}]
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "plan.json").write_text(json.dumps({"panels": panels}))
    page = write_report([tmp_path / "study"], tmp_path / "report.html")
    # A reader who presses every button on a narrow screen.
    narrow = "<style>html { width: 400px; }</style></head>"
    script = """<script>
        (async () => {
        await ready;
        const drawn = () => document.querySelectorAll(".chart.js-plotly-plot").length;
        const seen = { first: drawn(), charts: document.querySelectorAll(".chart").length };
        const buttons = document.querySelectorAll(".buttons button, th button");
        for (const button of buttons) button.click();
        seen.all = drawn();
        document.querySelector('.runs input[value*="/mixed/"]').click();
        const lines = document.querySelector(".drawn .chart").data;
        seen.lines = new Set(lines.map((line) => line.meta)).size;
        seen.both = lines.length / seen.lines;
        const field = document.querySelector(".find");
        field.value = "NAME 3";
        field.dispatchEvent(new Event("input"));
        const all = [...document.querySelectorAll(".sortable tbody tr")];
        const rows = all.filter((row) => !row.hidden);
        seen.rows = rows.map((row) => row.cells[0].textContent);
        seen.overflow = document.body.scrollWidth - document.body.clientWidth;
        seen.broken = !document.getElementById("broken").hidden;
        document.body.dataset.seen = JSON.stringify(seen);
        })();
    </script></body>"""
    tried = tmp_path / "tried.html"
    # The policy holds for these scripts too, which must be known to it.
    tried.write_text(
        with_policy(page.read_text().replace("</head>", narrow).replace("</body>", script))
    )
    dom = browsed(tried)
    assert "· potstill report</title>" in dom and not re.search(
        r"<img[^>]*onerror", dom[dom.index("<body") :]
    )
    found = re.search(r'<body data-seen="([^"]*)"', dom)
    assert found, "a script failed"
    seen = json.loads(html.unescape(found[1]))
    # The first of several views by buttons is drawn, the others when they are chosen.
    num_temperatures, num_metrics = 2, 6
    assert seen["charts"] - seen["first"] == 2 * (num_temperatures - 1) + num_metrics - 1
    assert seen["all"] == seen["charts"] > 15 and not seen["broken"]
    num_runs = len(planned)
    # Of the six that are drawn one was taken away; each is a mean with its steps behind it.
    assert num_runs > 6 and seen["lines"] == 6 - 1 and seen["both"] == 2
    assert [name.removeprefix(ATTACK) for name in seen["rows"]] == [" name 3"]
    assert seen["overflow"] == 0


@in_a_browser
def test_a_page_does_not_scroll_sideways_on_a_phone(study, tmp_path):
    page = write_report(sorted(study.iterdir()), tmp_path / "report.html")
    script = """<script>
        ready.then(() => {
          const { scrollWidth, clientWidth } = document.scrollingElement;
          parent.postMessage(`${innerWidth} ${scrollWidth - clientWidth}`, "*");
        });
    </script></body>"""
    page.write_text(with_policy(page.read_text().replace("</body>", script)))
    # A window of a browser has a least width; a frame in it has not.
    (tmp_path / "phone.html").write_text(
        "<!doctype html><body><iframe src=report.html width=390 height=800></iframe><script>"
        "addEventListener('message', (event) => { document.body.dataset.width = event.data; });"
        "</script></body>"
    )
    assert '<body data-width="390 0">' in browsed(tmp_path / "phone.html")


def test_the_page_runs_its_own_scripts_alone(study, tmp_path):
    """Every script of the page is in its policy by hash, one from elsewhere is not, and nothing may
    be fetched."""
    page = write_report([next(iter(sorted(study.iterdir())))], tmp_path / "report.html").read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert policy and page.index(policy[0]) < page.index("<script")
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert (
        rules["default-src"] == "'none'"
        and "unsafe" not in rules["script-src"]
        and "http" not in policy[1]
    )
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    (plotly,) = re.findall(r'<script type="text/plain" id="plotly">(.*?)</script>', page)
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in (*scripts, unpack(plotly))
    ]
    assert [f"'sha256-{text}'" for text in hashes] == rules["script-src"].split()
    # Nothing else in the page is run: no handlers in tags, no other kind of script.
    assert set(re.findall(r"<script[^>]*>", page)) <= {
        "<script>",
        '<script type="application/json">',
    } | set(re.findall(r'<script type="text/plain" id="[a-z0-9-]*">', page))
    body = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<[^>]+\son[a-z]+=", body)
