"""A private Slurm of two virtual nodes on this machine.

Debian's packages as they are, without systemd, as root or any user: munged, slurmctld and one slurmd per node, in one
directory, listening on the loopback device. The first node has the name of this host, for which mpirun starts its ranks
itself; the second one sorts behind it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo", "mpirun")
#: Slurm's daemons are in /usr/sbin, which users do not have on their path.
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_START_SECONDS = 60.0

CONFIGURATION = """\
ClusterName=distckpt
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SlurmdPort={port}
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
TmpFS={base}/tmp.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=600
MailProg=/bin/true
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=8 RealMemory=1000 State=UNKNOWN
NodeName={host}2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host},{host}2 Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""

#: Open MPI on one machine: as root, on the loopback device, each job with a session directory of its own.
MPI_SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_oob_tcp_if_include": "lo",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PYTHONPATH": str(ROOT),
}
#: Virtual nodes share /dev/shm, where the ranks of both would take the same names.
TWO_NODES = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,tcp", "OMPI_MCA_btl_tcp_if_include": "lo"}
_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "SBATCH_")


@dataclass
class Slurm:
    """The running cluster.

    Attributes:
        base: Its directory.
        nodes: Names of the nodes; the first is this host.
    """

    base: Path
    nodes: tuple[str, str]

    @property
    def environment(self) -> dict[str, str]:
        """For its commands and jobs: without the variables of a launcher around pytest."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_PREFIXES)}
        return {**inherited, **MPI_SETTINGS, "PATH": PATH, "SLURM_CONF": str(self.base / "slurm.conf")}

    def run(self, *command: str | Path, env: Mapping[str, str] | None = None, check: bool = True) -> str:
        """Output of one of its commands."""
        done = subprocess.run(
            list(map(str, command)),
            env={**self.environment, **(env or {})},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def logs(self) -> str:
        """The ends of what its daemons logged."""
        return "\n".join(f"-- {log.name}:\n{log.read_text()[-3000:]}" for log in sorted(self.base.glob("*.log")))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _configure(base: Path) -> Slurm:
    host = socket.gethostname().partition(".")[0]
    for name in ("munge", "state", f"spool.{host}", f"spool.{host}2", f"tmp.{host}", f"tmp.{host}2"):
        (base / name).mkdir(mode=0o755)
    (base / "munge").chmod(0o700)
    for node in (host, f"{host}2"):
        (base / f"tmp.{node}").chmod(0o1777)
    key = base / "munge" / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    port, port_1, port_2 = _free_ports(3)
    user = getpass.getuser()
    text = CONFIGURATION.format(host=host, user=user, base=base, port=port, port_1=port_1, port_2=port_2)
    (base / "slurm.conf").write_text(text)
    return Slurm(base, (host, f"{host}2"))


def _daemons(slurm: Slurm) -> list[list[str]]:
    base, configuration = slurm.base, str(slurm.base / "slurm.conf")
    munge = {
        "key-file": "munge/munge.key",
        "socket": "munge.socket",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "munge/munged.seed",
    }
    return [
        ["munged", "--foreground", *(f"--{name}={base / path}" for name, path in munge.items())],
        ["slurmctld", "-D", "-f", configuration],
        *(["slurmd", "-D", "-f", configuration, "-N", node] for node in slurm.nodes),
    ]


def _start(slurm: Slurm, command: Sequence[str]) -> subprocess.Popen[bytes]:
    with (slurm.base / f"{command[0]}.out.log").open("ab") as output:
        return subprocess.Popen(
            command, env=slurm.environment, cwd=slurm.base, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )


def _wait_until_idle(slurm: Slurm) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while slurm.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False) != "2":
        assert time.monotonic() < deadline, f"Slurm did not start in {_START_SECONDS:.0f} s:\n{slurm.logs()}"
        time.sleep(0.1)


def _end_jobs(slurm: Slurm) -> None:
    """A job outlives the daemon of its node."""
    slurm.run("scancel", "-u", getpass.getuser(), check=False)
    deadline = time.monotonic() + 30
    while slurm.run("squeue", "-h", check=False) and time.monotonic() < deadline:
        time.sleep(0.2)


@contextlib.contextmanager
def private_slurm() -> Iterator[Slurm]:
    """Two idle nodes; at the end jobs and daemons are stopped, and nothing is left."""
    base = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a socket has 107 bytes at most
    base.chmod(0o755)
    cluster = _configure(base)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in _daemons(cluster):
            started.append(_start(cluster, command))
            if command[0] == "munged":
                _wait_for(base / "munge.socket")
        _wait_until_idle(cluster)
        try:
            yield cluster
        finally:
            _end_jobs(cluster)
    finally:
        _stop(started)
        shutil.rmtree(base, ignore_errors=True)


def _stop(daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    for daemon in daemons:
        daemon.terminate()
    for daemon in daemons:
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(timeout=20)
        daemon.kill()
        daemon.wait()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
