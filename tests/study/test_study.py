"""Studies: which runs there are, that each is done once, what a crash or a kill leaves."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import tiny_recipe
from row_faults import faults
from waiting import wait_until

from potstill.cli.app import main
from potstill.cli.overrides import split_overrides
from potstill.config import RecipeError, load_recipe, make_recipe, to_toml, with_fields
from potstill.files import append
from potstill.runs.results import EVAL_COLUMNS, read_panels
from potstill.runs.results_schema import StudyPlan
from potstill.runs.run_folder import is_done, mark_done, read_rows
from potstill.study import items
from potstill.study.estimates import estimate_costs
from potstill.study.file import read_study_file
from potstill.study.planning import SWEEP_EVALUATION_SEED, choose, plan
from potstill.study.run import run_study

HEAD = """
out = "{out}"
recipe = "demo"
[fields]
data.num_prompts = 64
train.steps = 2
train.warmup_steps = 0
train.prompts_per_step = 4
window.tokens = 8
evaluation.num_problems = 2
evaluation.num_responses = 2
evaluation.max_tokens = 8
evaluation.temperatures = [1.0]
"""


# Long enough to be killed on the way.
NUM_STEPS = 150


def write_study(folder, text, name="study.toml", out=None):
    file = folder / name
    file.write_text(HEAD.format(out=out or folder / "study") + text)
    return read_study_file(file)


def items_of(study, chosen=None):
    return [item for panel in plan(study, chosen or {}) for item in panel.items]


GRID = """
seeds = [3, 4]
[[panels]]
title = "Natural"
models = ["potstill:base"]
[[panels.groups]]
axes.method = ["sft", "opd"]
axes.window.tokens = [6, 8]
cache = true
[[panels.groups.then]]
also_from = ["potstill:base"]
"""


def with_top_level(text):
    """Keys of the study before its tables."""
    key, _, rest = text.strip().partition("\n")
    return key, rest


def test_a_study_is_every_combination_with_every_seed(tmp_path):
    file = tmp_path / "study.toml"
    key, rest = with_top_level(GRID)
    file.write_text(key + HEAD.format(out=tmp_path / "study") + rest)
    study = read_study_file(file)
    (panel,) = plan(study, {})
    trained = [item for item in panel.items if item.kind == "train"]
    runs = [item for item in trained if not item.recipe.reward.weight]
    found = {
        (r.recipe.method, r.recipe.window.tokens, r.recipe.train.seed, r.recipe.data.seed)
        for r in runs
    }
    assert found == {(m, w, s, s) for m in ("SFT", "OPD") for w in (6, 8) for s in (3, 4)}
    assert {run.recipe.evaluation.seed for run in runs} == {0}
    # A folder is named by what is in it, and its recipe by what it was asked for alone.
    for run in runs:
        assert (
            run.job.path
            == tmp_path / "study/runs" / f"{run.recipe.method.lower()}-{run.recipe.hash()}"
        )
        fields = {
            "objective.prefix": run.recipe.objective.prefix,
            "objective.kl": run.recipe.objective.kl,
        }
        fields |= {"window.tokens": run.recipe.window.tokens, "train.seed": run.recipe.train.seed}
        fields |= {"data.seed": run.recipe.data.seed, "out": str(run.job.path)}
        if run.recipe.teacher.cache:
            fields |= {"teacher.cache": run.recipe.teacher.cache}
        assert run.recipe.hash() == load_recipe("demo", study.fields | fields).hash()
    # One cache a seed serves both windows; only teacher prefixes read it.
    caches = {item.job.path: item for item in panel.items if item.kind == "cache"}
    assert len(caches) == 2 and all(cache.recipe.window.tokens == 8 for cache in caches.values())
    for run in runs:
        assert run.job.needs == (
            (tmp_path / "x" / run.recipe.teacher.cache,) if run.recipe.method == "SFT" else ()
        )
        assert set(run.job.needs) <= set(caches)
    after = [item for item in trained if item.recipe.reward.weight]
    of_models, of_runs = after[:2], after[2:]
    assert [item.job.needs for item in of_runs] == [(run.job.path,) for run in runs]
    assert [item.recipe.student.model for item in of_runs] == [str(run.job.path) for run in runs]
    assert [(item.recipe.train.seed, item.recipe.data.seed) for item in of_runs] == [
        (run.recipe.train.seed, run.recipe.data.seed) for run in runs
    ]
    assert {item.label for item in of_runs} == {f"GRPO from {run.label}" for run in runs}
    assert all(item.recipe.evaluation == runs[0].recipe.evaluation for item in after)
    # Everything else is the recipe's own.
    assert {item.recipe.train.steps for item in after} == {load_recipe("rl").train.steps}
    assert [(item.recipe.student.model, item.label) for item in of_models] == [
        ("potstill:base", "GRPO from potstill:base")
    ] * 2
    assert [(item.recipe.train.seed, item.job.needs) for item in of_models] == [(3, ()), (4, ())]
    names = [item.job.name for item in panel.items if item.kind != "cache"]
    assert len(set(names)) == len(names) and "OPD, window 6, seed 3" in names
    # The report calls all seeds the same.
    assert {item.label for item in runs} == {
        f"{m}, window {w}" for m in ("SFT", "OPD") for w in (6, 8)
    }
    assert [item.label for item in panel.items if item.kind == "evaluate"] == ["base"]


SWEEP = """
[[panels]]
title = "Natural"
[panels.sweep]
field = "train.lr"
values = [1e-3, 2e-3, 4e-3]
methods = ["sft", "opd"]
[[panels.groups]]
axes.method = ["sft", "opd"]
[[panels.groups]]
fields.objective.prefix = "student"
fields.objective.kl = "mixed"
sweep_as = "opd"
"""


def pretend(item, avg):
    """A finished run with a given accuracy."""
    item.job.path.mkdir(parents=True, exist_ok=True)
    (item.job.path / "recipe.toml").write_text(to_toml(item.recipe.resolved()))
    append(
        item.job.path / "metrics.jsonl",
        {"step": 2, "seconds": 1.0, "total_flops": 5.0, "length": 8.0},
    )
    for temperature, value in ((1.0, avg), (0.6, 1 - avg)):
        row = dict.fromkeys(EVAL_COLUMNS) | {
            "step": 2,
            "temperature": temperature,
            "avg": [value, 0, 1],
            "seconds": 1,
        }
        append(item.job.path / "evals.jsonl", row)
    mark_done(item.recipe)


def test_a_sweep_is_judged_on_its_own_problems_and_decides_what_follows(tmp_path):
    study = write_study(tmp_path, SWEEP)
    natural, sweep = plan(study, choose(study))
    assert sweep.is_sweep and not natural.is_sweep
    assert all(item.pending for item in natural.items)
    assert {item.recipe.evaluation.seed for item in sweep.items} == {SWEEP_EVALUATION_SEED}
    for item, avg in zip(sweep.items[:5], (0.1, 0.3, 0.2, 0.7, 0.6), strict=True):
        pretend(item, avg)
    # One run of on-policy distillation is missing.
    assert choose(study) == {("Natural", "sft"): 2e-3}
    pretend(sweep.items[5], 0.5)
    assert choose(study) == {("Natural", "sft"): 2e-3, ("Natural", "opd"): 1e-3}
    natural, _ = plan(study, choose(study))
    assert [item.recipe.train.lr for item in natural.items] == [2e-3, 1e-3, 1e-3]
    assert not any(item.pending for item in natural.items)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ('axes.method = ["odp"]', "method is 'odp' on an axis; choose one of sft, dagger"),
        ("axes.train.lrr = [1]", "panel 'A': train.lrr is not a field.*nearest is train.lr"),
        ('axis.method = ["opd"]', "axis is not a field"),
        ('sweep_as = "odp"', "sweep_as is 'odp': the nearest is 'opd'; input should be 'sft'"),
        ('sweep_as = "opd"', 'sweep_as is "opd", and in this panel nothing is swept'),
        (
            'sweep_as = "opd"\n[panels.sweep]\nvalues = [1]\nmethods = ["sft"]',
            "in this panel the sweep is of sft",
        ),
        ("axes.train.lr = []", "axes.train.lr is .*: it is empty; name at least one"),
        (
            '[[panels]]\ntitle = "A"\n[[panels.groups]]',
            "two panels have the title 'A'; give each its own",
        ),
        (
            'fields.teacher.model = "potstill:nobody"',
            "'potstill:nobody' is not a shipped model; choose one of",
        ),
        ("fields.train.lr = -1", "panel 'A': train.lr is -1: input should be greater"),
        (
            "axes.train.seed = [1, 2]",
            r"axes.train.seed is set by the study itself: use seeds = \[...\]",
        ),
        (
            "fields.data.seed = 3",
            r"fields.data.seed is set by the study itself: use seeds = \[...\]",
        ),
        (
            'fields.out = "elsewhere"',
            "fields.out is set by the study itself: give out to the study",
        ),
        ('axes.out = ["a", "b"]', "axes.out is set by the study itself: give out to the study"),
        (
            "fields.train.lr = 1\naxes.train.lr = [2]",
            "train.lr is in fields and on an axis of one group",
        ),
        (
            'fields.objective.kl = "jsd"\naxes.method = ["opd"]',
            "objective.kl is set beside the axis method",
        ),
        ('cache = true\nfields.teacher.cache = "c"', "teacher.cache is set beside cache = true"),
        (
            'axes.method = ["opd"]\naxes.train.lr = [1]\n[panels.sweep]\nvalues = [1, 2]',
            "axes.train.lr is set by the study itself: the panel's sweep chooses it",
        ),
        (
            '[panels.sweep]\nfield = "train.seed"\nvalues = [1, 2]',
            r"field.train.seed is .*: use seeds = \[...\]",
        ),
        (
            "[panels.sweep]\nvalues = [1]\nfields.evaluation.seed = 3",
            "fields.evaluation.seed is set by the study",
        ),
        (
            "[[panels.groups.then]]\nfields.train.seed = 3",
            r"fields.train.seed is set by the study itself: use seeds = \[...\]",
        ),
        (
            '[[panels.groups.then]]\nfields.student.model = "x"',
            "fields.student.model is set by the study itself: the stage takes it from",
        ),
        (
            '[[panels.groups.then]]\nfields.data.split = "x"',
            "fields.data.split is set by the study itself: the stage takes it from",
        ),
        (
            '[[panels.groups.then]]\nrecipe = "grpo"',
            "recipe 'grpo' does not exist; give a TOML file or one of",
        ),
        ("grpo = true", "grpo is not a field"),
    ],
)
def test_what_could_not_begin_is_refused_before_any_work(tmp_path, group, message):
    with pytest.raises(ValueError, match=message):
        run_study(
            write_study(tmp_path, f'[[panels]]\ntitle = "A"\n[[panels.groups]]\n{group}\n'),
            main,
            dry_run=True,
        )
    assert not (tmp_path / "study").exists()


def test_files_that_are_no_study_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="--jobs is 0; it must be at least 1"):
        run_study(read_study_file("quick"), main, num_jobs=0)
    with pytest.raises(
        RecipeError, match="study 'quik' does not exist; give a TOML file or one of paper-mini"
    ):
        read_study_file("quik")
    (tmp_path / "s.toml").write_text("out = [")
    with pytest.raises(RecipeError, match=r"s.toml is not valid TOML"):
        read_study_file(tmp_path / "s.toml")


def test_a_recipe_is_found_beside_the_study(tmp_path):
    (tmp_path / "mine.toml").write_text(to_toml(load_recipe("demo", {"train.lr": 7e-4}).resolved()))
    (tmp_path / "s.toml").write_text(
        'out = "o"\nrecipe = "mine.toml"\n[[panels]]\ntitle = "A"\n[[panels.groups]]\n'
    )
    (item,) = items_of(read_study_file(tmp_path / "s.toml"))
    assert item.recipe.train.lr == 7e-4


FULL = pytest.param("paper-mini-full", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["quick", "paper-mini", FULL, "paper-qwen3"])
def test_every_run_of_a_shipped_study_could_begin(name):
    study = read_study_file(name)
    chosen = {
        (panel.title, method): panel.sweep.values[0]
        for panel in study.panels
        if panel.sweep is not None
        for method in panel.sweep.methods
    }
    items = items_of(study, chosen)
    assert len(items) > 5 and not any(item.pending for item in items)
    # The file that is written for a process reads as the same recipe.
    for item in items:
        if item.kind == "train":
            assert make_recipe(with_fields(item.recipe.resolved(), {})).hash() == item.recipe.hash()


RUNS = """
[[panels]]
title = "Natural"
models = ["potstill:base"]
fields.data.template_arguments = {think = false}
[[panels.groups]]
axes.method = ["opd", "sft"]
cache = true
[[panels.groups.judgements]]
label = "greedy"
fields.temperatures = [0.0]
fields.num_responses = 1
fields.template_arguments = {days = [{first = 1}, "a b"], think = "false"}
[[panels.groups]]
label = "broken"
axes.method = ["dagger"]
fields.train.lr = 1e30
[[panels.groups.judgements]]
label = "greedy"
fields.temperatures = [0.0]
"""


def test_each_run_is_done_once_and_a_crash_is_shown_and_done_again(tmp_path, capfd):
    study = write_study(tmp_path, RUNS)
    assert not run_study(study, main, num_jobs=2)
    captured = capfd.readouterr()
    assert "CRASHED DAgger, broken: potstill: step 2: the gradient is not finite" in captured.err
    (panel,) = read_panels([study.out])
    assert {entry.name for entry in panel.entries} == {
        "base",
        "OPD",
        "SFT",
        "OPD, greedy",
        "SFT, greedy",
    }
    states = {path.name: state for path, state in panel.unfinished}
    assert len(states) == 2
    assert [
        state[:43]
        for name, state in sorted(states.items())
        if name.startswith("dagger-d") or "crashed" in state
    ] == ["crashed: potstill: step 2: the gradient is n"[:43]]
    assert "not begun" in states.values()
    greedy = [entry.evals[0] for entry in panel.entries if "greedy" in entry.name]
    assert {row["temperature"] for row in greedy} == {0.0}
    # The base is asked as the runs are, unless a judgement says otherwise.
    told = {"days": [{"first": 1}, "a b"], "think": "false"}
    assert [row["settings"]["template_arguments"] for row in greedy] == [told, told]
    others = [entry.evals[0] for entry in panel.entries if "greedy" not in entry.name]
    assert [row["settings"]["template_arguments"] for row in others] == [{"think": False}] * 3
    (sft,) = [entry for entry in panel.entries if entry.name == "SFT"]
    assert sft.metrics[0]["flops"]["teacher"] == 0, "the teacher came from the cache"

    finished = {path: path.stat().st_mtime_ns for path in study.out.rglob("DONE")}
    assert len(finished) == 2
    # The same study again: only what crashed, and what is new.
    study = write_study(tmp_path, RUNS.replace("train.lr = 1e30", "train.lr = 1e-3"))
    assert run_study(study, main, num_jobs=2)
    out = capfd.readouterr().out
    assert "2 to do, 2 at a time" in out and "from finished runs and trials" in out
    assert (
        finished.items()
        <= {path: path.stat().st_mtime_ns for path in study.out.rglob("DONE")}.items()
    )
    (panel,) = read_panels([study.out])
    assert not panel.unfinished and len(panel.entries) == 7
    assert run_study(study, main) and "nothing is left to do" in capfd.readouterr().out


@pytest.mark.slow
def test_a_killed_study_takes_its_processes_along_and_goes_on(tmp_path):
    text = RUNS[: RUNS.index("[[panels.groups]]\nlabel")].replace(
        "cache = true\n", f"fields.train.steps = {NUM_STEPS}\n"
    )
    study = write_study(tmp_path, text.replace('models = ["potstill:base"]\n', ""))
    command = [
        sys.executable,
        "-m",
        "potstill",
        "study",
        str(tmp_path / "study.toml"),
        "--jobs",
        "2",
        "--no-report",
    ]
    process = subprocess.Popen(command, start_new_session=True)
    runs = [item for item in items_of(study) if item.kind == "train"]
    wait_until(lambda: any(read_rows(run.job.path / "metrics.jsonl") for run in runs), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while _processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _processes_of(process.pid)
    assert not any(is_done(run.job.path, run.recipe) for run in runs)
    (panel,) = read_panels([study.out])
    assert len(panel.unfinished) == 4

    assert run_study(study, main, num_jobs=2)
    for run in runs:
        steps = [row["step"] for row in read_rows(run.job.path / "metrics.jsonl")]
        assert steps == list(range(1, NUM_STEPS + 1)) and is_done(run.job.path, run.recipe)


def _processes_of(session):
    found = subprocess.run(
        ["ps", "-s", str(session), "-o", "pid=,stat="], capture_output=True, text=True, check=False
    )
    return [line for line in found.stdout.splitlines() if "Z" not in line.split()[1]]


def test_estimates_come_from_finished_runs_of_a_kind(tmp_path):
    study = write_study(
        tmp_path, '[[panels]]\ntitle = "A"\n[[panels.groups]]\naxes.train.lr = [1e-3, 2e-3]\n'
    )
    first, second = items_of(study)
    pretend(first, 0.5)
    costs = estimate_costs([first, second], one_thread=True)
    # A second a row of metrics, two steps; and the evaluation that was tried.
    assert set(costs) == {second.job.path} and 2 < costs[second.job.path].seconds < 60
    # What a stage starts from is not there yet: the trial is of the model that was before it.
    staged = write_study(
        tmp_path,
        """
[[panels]]
title = "A"
[[panels.groups]]
axes.method = ["opd"]
[[panels.groups.then]]
fields.data.num_prompts = 16
fields.train.prompts_per_step = 2
fields.reward.group_size = 3
fields.window.tokens = 8
""",
    )
    costs = estimate_costs(items_of(staged), one_thread=True)
    assert len(costs) == 2 and all(cost.seconds > 0 for cost in costs.values())
    hub = write_study(
        tmp_path,
        '[[panels]]\ntitle = "A"\n[[panels.groups]]\naxes.student.model = ["org/not-here"]\n',
    )
    assert list(estimate_costs(items_of(hub), one_thread=True).values()) == [None]


def test_plan_file_is_plain_data(tmp_path):
    study = write_study(tmp_path, '[[panels]]\ntitle = "A"\nnote = "b"\n[[panels.groups]]\n')
    (item,) = items_of(study)
    pretend(item, 0.5)
    assert run_study(study, main)
    written = json.loads((study.out / "plan.json").read_text())
    assert faults(written, StudyPlan) == []
    (panel,) = written["panels"]
    assert (panel["title"], panel["note"], panel["runs"][0]["state"]) == ("A", "b", "done")
    assert tiny_recipe(tmp_path / "x").hash() != item.recipe.hash()


def test_an_evaluation_is_told_all_that_its_settings_say():
    told = {"enable_thinking": False, "style": "short", "depth": 2}
    for arguments in ({}, told):
        flags = items._flags(
            {"template_arguments": arguments, "end_tokens": [], "temperatures": [1.0, 0.5]}
        )
        rest, overrides = split_overrides("evaluate", flags)
        assert rest == ["--temperatures", "1.0", "0.5"]
        assert overrides == {
            f"template_arguments.{name}": value for name, value in arguments.items()
        }
