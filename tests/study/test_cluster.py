"""A study on a cluster: by submitit's processes, and by a Slurm of one machine."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import one_node_slurm
import pytest
from one_node_slurm import OneNodeSlurm
from small_runs import assert_same_run
from waiting import wait_until

from potstill.cli.app import main
from potstill.config import RecipeError
from potstill.runs.run_folder import RunError
from potstill.study import cluster
from potstill.study.cluster import Cluster, ClusterJob, read_options
from potstill.study.file import read_study_file
from potstill.study.run import run_study

STUDY = """
out = "{out}"
recipe = "demo"
[fields]
evaluation.num_problems = 4
evaluation.num_responses = 1
evaluation.temperatures = [1.0]
evaluation.max_tokens = 24
data.num_prompts = 32
window.tokens = 24
train.steps = {steps}
train.prompts_per_step = 8
train.checkpoint_every = 1
train.warmup_steps = 1
train.lr = 1e-3
[[panels]]
title = "embedded"
[[panels.groups]]
axes.method = {methods}
"""


def write_study(folder: Path, steps: int = 2, methods=("sft", "opd")) -> Path:
    file = folder / "study.toml"
    file.write_text(STUDY.format(out=folder / "out", steps=steps, methods=list(methods)))
    return file


def test_a_lost_job_says_so_in_its_log(monkeypatch, tmp_path):
    """Twice Slurm has no such job, and there is no result: the job's log says where to look."""
    monkeypatch.setattr(cluster, "is_queued", lambda job_id: False)
    monkeypatch.setattr(cluster, "CHECK_SECONDS", 0)
    paths = SimpleNamespace(result_pickle=tmp_path / "7.pkl", stderr=tmp_path / "7_log.err")
    job = SimpleNamespace(job_id="7", paths=paths)
    log = tmp_path / "run.log"
    waiting = ClusterJob(job=job, log=log, is_slurm=True)
    assert (waiting.exitcode, waiting.exitcode) == (None, 1)
    said = f"Slurm has no job 7 any more, and it left no result; {paths.stderr} may say why\n"
    assert log.read_text() == said


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if lacking := one_node_slurm.missing():
        pytest.skip(f"Slurm's programs are not here: {', '.join(lacking)}")
    found = OneNodeSlurm(tmp_path_factory.mktemp("slurm"))
    yield found
    found.stop()


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["partition"], "give names and values"),
        (["slurm_partitoin=gpu"], "Unknown argument 'partitoin' for executor 'slurm'"),
        (["timeout_min=soon"], 'Parameter "timeout_min" expected type'),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, texts, says):
    study = read_study_file(write_study(tmp_path))
    with pytest.raises(RecipeError, match=says):
        run_study(study, main, cluster=Cluster("local", read_options(texts)))
    assert not list(tmp_path.rglob("recipe.toml"))


def test_a_cluster_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: None)
    study = read_study_file(write_study(tmp_path))
    with pytest.raises(RecipeError, match="there is no sbatch here"):
        run_study(study, main, cluster=Cluster("slurm"))


@pytest.mark.slow
def test_submitits_processes_do_what_ours_do(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("local", "here"):
        (tmp_path / name).mkdir()
        study = read_study_file(write_study(tmp_path / name))
        assert run_study(study, main, 2, cluster=Cluster("local") if name == "local" else None)
    assert_same_runs(tmp_path / "here/out", tmp_path / "local/out", 2)


def assert_same_runs(one: Path, other: Path, num: int) -> None:
    runs = sorted(path.parent.relative_to(one) for path in one.rglob("DONE"))
    assert len(runs) == num
    for run in runs:
        assert_same_run(one / run, other / run)


@pytest.mark.slurm
def test_slurm_runs_a_study_and_goes_on_after_preemption_and_a_kill(tmp_path, slurm, monkeypatch):
    """A job is preempted, and the command that waits is killed; the same command finds the jobs,
    and every run is what it would have been."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_study(tmp_path / name, steps=12)
    assert run_study(read_study_file(tmp_path / "here/study.toml"), main, 2)
    command = [sys.executable, "-m", "potstill", "study", str(tmp_path / "there/study.toml")]
    command += ["--on", "slurm", "--options", "cpus_per_task=1", "timeout_min=30"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_until(lambda: any(rows_of(tmp_path / "there")), first)
    begun = next(path for path in rows_of(tmp_path / "there"))
    job_id = job_of(tmp_path / "there", begun)
    slurm.requeue(job_id)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = set(slurm.job_ids())
    assert job_id in before
    second = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert second.returncode == 0, second.stderr
    assert_same_runs(tmp_path / "here/out", tmp_path / "there/out", 2)
    # Nothing was submitted twice.
    assert {job_of(tmp_path / "there", run) for run in rows_of(tmp_path / "there")} == before


@pytest.mark.slurm
def test_a_job_that_is_cancelled_is_a_crash(tmp_path, slurm, monkeypatch):
    monkeypatch.setattr(cluster, "CHECK_SECONDS", 1.0)
    study = read_study_file(write_study(tmp_path, steps=200, methods=["sft"]))
    known = []

    def cancel_when_it_runs(job_id: str) -> bool:
        if any(rows_of(tmp_path)) and not known:
            known.append(job_id)
            subprocess.run(["scancel", "--signal=KILL", "--full", job_id], check=True)
            time.sleep(3)
        return real(job_id)

    real = cluster.is_queued
    monkeypatch.setattr(cluster, "is_queued", cancel_when_it_runs)
    assert not run_study(study, main, cluster=Cluster("slurm"))
    assert known


def rows_of(folder: Path) -> list[Path]:
    """Run folders with a finished step."""
    return [path.parent for path in folder.rglob("metrics.jsonl") if path.stat().st_size]


def job_of(folder: Path, run: Path) -> str:
    """The job of a run, by the file beside its log."""
    (file,) = folder.rglob(f"{run.name}.job")
    return json.loads(file.read_text())["job_id"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def no_locks(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    study = read_study_file(write_study(tmp_path))
    with pytest.raises(RunError, match=r"has no locks .*choose a folder elsewhere"):
        run_study(study, main)
