"""A Slurm of one machine, from the system's packages, in a folder of its own. To be stopped."""

import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
SETTINGS = """\
ClusterName=one
SlurmctldHost={host}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
NodeName={host} CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:2
"""


def missing() -> list[str]:
    """The programs that are not here."""
    paths = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=paths) is None]


class OneNodeSlurm:
    """A controller and a node, whose settings are the environment's SLURM_CONF."""

    def __init__(self, folder: Path):
        self.folder, self.host = folder, socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        ports = [_free_port(), _free_port()]
        settings = SETTINGS.format(host=self.host, folder=folder, ports=ports)
        (folder / "slurm.conf").write_text(settings)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        _run("/usr/sbin/munged", "--force", *self._munge("socket"), *self._munge("key-file"))
        _run("/usr/sbin/slurmctld", "-c")
        _run("/usr/sbin/slurmd")
        self._wait_until_idle()

    def _munge(self, option: str) -> list[str]:
        if option == "key-file":
            names = {"key-file": "munge.key", "log-file": "munged.log", "pid-file": "munged.pid"}
            names["seed-file"] = "munged.seed"
        else:
            names = {"socket": "munge.sock"}
        return [f"--{name}={self.folder / file}" for name, file in names.items()]

    def _wait_until_idle(self) -> None:
        for _ in range(100):
            found = subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True)
            if found.stdout.strip() == "idle":
                return
            time.sleep(0.3)
        log = (self.folder / "slurmctld.log").read_text()
        raise AssertionError(f"Slurm does not start: {found.stdout}{found.stderr}\n{log[-2000:]}")

    def job_ids(self) -> list[str]:
        """Jobs that wait or run."""
        found = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True)
        return found.stdout.split()

    def requeue(self, job_id: str) -> None:
        """Preempt a job: it is ended and begins anew."""
        _run("scontrol", "requeue", job_id)

    def stop(self) -> None:
        """End all jobs and all of Slurm."""
        subprocess.run(["scancel", *self.job_ids()], capture_output=True)
        for name in ("slurmd", "slurmctld", "munged"):
            with suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), 15)
        del os.environ["SLURM_CONF"]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
