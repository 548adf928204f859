"""A real Slurm on this machine: munged, slurmctld and a slurmd a node, in a folder of its own, on free ports."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
_SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"

PATIENCE = 300.0  # seconds: far beyond what a loaded machine takes; only a failure waits so long
# A requeued job waits for AuthInfo's cred_expire (120 s by default, 5 at least) before it starts again.
_CONFIG = """\
ClusterName=peartest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=1
SlurmdParameters=config_overrides
KillWait={kill_wait}
CompleteWait=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=DEFAULT CPUs=2 RealMemory=4000 Gres=gpu:1
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=60 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Slurm's and munge's programs that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_SBIN) is None]


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Looks ten times a second until ``condition`` holds.

    Raises:
        AssertionError: it did not hold in time; names ``what``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.1)


class SlurmCluster:
    """Nodes n1, n2, ...: on this machine, each with two CPUs and one (invented) GPU; partitions main and urgent.

    Args:
        folder: empty and short (it holds munge's socket); everything of the cluster is in it.
        nodes: how many.
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.environment = {**os.environ, "PATH": _SBIN, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Starts every daemon and waits until all nodes are idle."""
        host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(self.nodes))
        nodes = [
            f"NodeName={n} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            for n, port in zip(self.nodes, ports[1:], strict=True)
        ]
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        config = _CONFIG.format(
            host=host, ctld_port=ports[0], user=getpass.getuser(), folder=self.folder, nodes="\n".join(nodes),
            kill_wait=5,
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        self._start_munge()
        self._daemon("slurmctld", "-D")
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-N", node)
        wait_until(self._all_idle, f"the nodes to be idle; see {self.folder}/*.log")

    def stop(self) -> None:
        """Kills the daemons and whatever else runs with this cluster's configuration in its environment."""
        for process in reversed(self._daemons):
            process.kill()
            process.wait()
        for pid in _processes_with(f"{self.folder}/"):
            _kill(pid)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """A Slurm command -> what it printed.

        Raises:
            AssertionError: it failed; with its stderr.
        """
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**self.environment, **variables},
            timeout=PATIENCE,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr}{done.stdout}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """A job's fields as ``scontrol show job`` names them."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def wait(self, job_id: str, *states: str, seconds: float = PATIENCE) -> dict[str, str]:
        """Waits until a job is in one of the states -> its fields."""
        wait_until(lambda: self.job(job_id)["JobState"] in states, f"job {job_id} to be {states}", seconds)
        return self.job(job_id)

    def _start_munge(self) -> None:
        options = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid",
                   "seed-file": "munge.seed", "log-file": "munge.log"}  # fmt: skip
        files = [f"--{name}={self.folder / file}" for name, file in options.items()]
        self._daemon("munged", "--foreground", "--force", "--num-threads=2", *files)
        wait_until((self.folder / "munge.socket").exists, "munge's socket")

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}{command[-1] if command[0] == 'slurmd' else ''}.log").open("wb")
        self._daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment))

    def _all_idle(self) -> bool:
        for process in self._daemons:
            assert process.poll() is None, f"{process.args} ended; see {self.folder}/*.log"
        states = self.run("sinfo", "--noheader", "-p", "main", "-N", "-o", "%T", check=False).split()
        return states == ["idle"] * len(self.nodes)


@contextmanager
def slurm_cluster(folder: Path, nodes: int = 2) -> Iterator[SlurmCluster]:
    """A running cluster; nothing of it is left afterwards, whatever happens."""
    cluster = SlurmCluster(folder, nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _processes_with(text: str) -> list[int]:
    """Processes whose environment at their start holds ``text``: jobs leave the daemons' process tree."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:  # it ended, or is another user's
            continue
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
