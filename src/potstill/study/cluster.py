"""Jobs of a study on a cluster, each a job of Slurm's, through submitit.

A job writes to the folder that all machines share, as it does on one. It is known by a file beside
its log, so that the same command finds it again; Slurm begins a preempted job anew, which goes on
from its run's last checkpoint.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.config import RecipeError
from potstill.files import write_atomically
from potstill.study.jobs import Job

# A job that neither runs nor waits and has left no result was lost, once Slurm has said so twice.
CHECK_SECONDS = 20.0
# As long as Slurm waits at most, by default, until it kills what it has asked to end.
GRACE_SECONDS = 60.0
# How a potstill command ends that is preempted, or whose job's time is up: its run goes on later.
GOES_ON_LATER = (128 + signal.SIGTERM, -signal.SIGUSR2)
# submitit's own default is five minutes.
DEFAULTS = {"timeout_min": 24 * 60}


@dataclass(frozen=True)
class Command:
    """A potstill command as the function of a job. Its output goes to a file."""

    arguments: tuple[str, ...]
    log: Path

    def __call__(self) -> None:
        """Run it; raise RuntimeError where it fails."""
        while (code := self._run()) in GOES_ON_LATER:
            # This process is about to be killed, and begun anew or not.
            time.sleep(GRACE_SECONDS)
        if code:
            raise RuntimeError(f"exit code {code}")

    def _run(self) -> int:
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "potstill", *self.arguments]
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode

    def checkpoint(self) -> Any:
        """The same command, for submitit where the time of a job is up: it goes on from the last
        checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(kw_only=True)
class ClusterJob:
    """A job that waits or runs. It goes on without us."""

    job: Any
    log: Path
    is_slurm: bool
    last_check: float = field(default_factory=time.monotonic)
    num_missing: int = 0

    @property
    def exitcode(self) -> int | None:
        """0 when it is done, 1 when it failed or is lost, None before."""
        if self.job.paths.result_pickle.exists() or not self.is_slurm:
            return self._result() if self.job.done() else None
        if time.monotonic() - self.last_check < CHECK_SECONDS:
            return None
        self.last_check = time.monotonic()
        self.num_missing = 0 if is_queued(self.job.job_id) else self.num_missing + 1
        return self._lose() if self.num_missing > 1 else None

    def _lose(self) -> int:
        with self.log.open("a") as log:
            log.write(
                f"Slurm has no job {self.job.job_id} any more, and it left no result; "
                f"{self.job.paths.stderr} may say why\n"
            )
        return 1

    def _result(self) -> int:
        return 0 if self.job.exception() is None else 1

    def terminate(self) -> None:
        """Leave it alone: the same command finds it again."""

    def join(self) -> None:
        """Nothing to wait for."""


def is_queued(job_id: str) -> bool:
    """Whether Slurm knows of the job as one that waits or runs."""
    command = ["squeue", "--noheader", "--jobs", job_id]
    asked = subprocess.run(command, capture_output=True, text=True)
    return asked.returncode == 0 and bool(asked.stdout.strip())


@dataclass(frozen=True)
class Cluster:
    """A cluster by submitit's name, "slurm" or "local" (processes that outlive us), and submitit's
    options, such as slurm_partition and timeout_min."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options of a cluster from texts such as timeout_min=60. Raises RecipeError."""
    for text in texts:
        if not re.fullmatch(r"\w+=.+", text):
            raise RecipeError(f"--options is {text!r}; give names and values, as timeout_min=60")
    pairs = [text.split("=", 1) for text in texts]
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


def on_cluster(folder: Path, cluster: Cluster) -> Callable[[Job], ClusterJob]:
    """A function that submits a job, or finds the one that was submitted before.

    `folder` is shared by all machines and keeps what submitit writes. Raises RecipeError for a
    cluster that is not there, and for options that it does not have.
    """
    executor = _executor(folder, cluster.name, cluster.options)
    is_slurm = cluster.name == "slurm"

    def start(job: Job) -> ClusterJob:
        known = job.log.with_suffix(".job")
        if is_slurm and known.exists():
            job_id = json.loads(known.read_text())["job_id"]
            if is_queued(job_id):
                found = executor.job_class(folder, job_id)
                return ClusterJob(job=found, log=job.log, is_slurm=is_slurm)
        # A name for people who look at the queue.
        executor.update_parameters(name=job.name[:60])
        submitted = executor.submit(Command(job.arguments, job.log.absolute()))
        write_atomically(known, json.dumps({"job_id": submitted.job_id}))
        return ClusterJob(job=submitted, log=job.log, is_slurm=is_slurm)

    return start


def _executor(folder: Path, cluster: str, options: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise RecipeError(
            f"--on is {cluster!r}, for which submitit is not installed; pip install "
            "'potstill[cluster]'"
        ) from None
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise RecipeError(
            "--on is 'slurm' and there is no sbatch here; run this on a machine of the cluster "
            "that submits jobs"
        )
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    try:
        executor.update_parameters(**DEFAULTS | dict(options))
    except (AssertionError, NameError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"--options {dict(options)}: {first}") from None
    return executor
