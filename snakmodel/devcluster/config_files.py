"""The files of a development cluster: cluster.json (what was asked for), slurm.conf, slurmdbd.conf and the munge key.

Everything that a daemon reads or writes lies below one folder, and every tool is run with the settings of that folder
only. The module needs only the standard library.
"""

from __future__ import annotations

import json
import os
import pwd
import random
import re
import shlex
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from snakmodel.devcluster import daemons
from snakmodel.devcluster.daemons import ClusterError

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CLUSTER_NAME = "snakdev"
MARK = "SNAKMODEL_DEVCLUSTER"
"""Environment variable that names the cluster's folder to its daemons and to the slurmstepd that a slurmd starts."""
TEMPORARY = ".cluster.json"

SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={me}
SlurmdUser={me}
AuthType=auth/munge
# A requeued job may start cred_expire + 1 seconds later: 5 is the least that Slurm takes, 120 its default.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
{communication}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmdLogFile={folder}/log/steps-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
ReturnToService=2
JobRequeue=1
KillWait=15
SlurmdTimeout=15
BatchStartTimeout=60
MaxJobCount=200000
MaxArraySize=20001
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# The nodes claim more than the machine has.
SlurmdParameters=config_overrides
{node_lines}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
{accounting_lines}
"""

NODE_LINE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000000 State=UNKNOWN"
)

SLURM_ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge/socket
AccountingStorageEnforce=associations,limits,qos
"""

SLURMDBD_CONF = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={me}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
# localhost means the socket in MYSQL_UNIX_PORT, in a folder that only this user may enter.
StorageHost=localhost
StorageUser={me}
StorageLoc=slurm_acct_db
"""


@dataclass(frozen=True)
class Cluster:
    """What `up` was asked for, and the ports that it found; kept in FOLDER/cluster.json."""

    folder: Path
    nodes: int
    cpus: int
    accounting: bool
    ports: tuple[int, ...]
    """The ports of slurmctld and of slurmdbd, then one per node."""
    complete: bool = False
    """False until every node has been idle once; the next `up` removes what an interrupted one left."""

    @classmethod
    def read(cls, folder: Path) -> Cluster | None:
        """The cluster in a folder, or None if there is none.

        Raises ClusterError if the folder holds something else, or belongs to a user who is neither root nor this one.
        """
        file = folder / "cluster.json"
        if not file.exists():
            if folder.is_dir() and {path.name for path in folder.iterdir()} - {TEMPORARY}:
                raise ClusterError(f"{folder} is no development cluster's folder: name another with --dir")
            return None
        if folder.lstat().st_uid not in (0, os.getuid()):
            raise ClusterError(f"{folder} belongs to another user: name another with --dir")
        raw = json.loads(file.read_text())
        return cls(folder=folder, ports=tuple(raw.pop("ports")), **raw)

    @classmethod
    def read_own(cls, folder: Path) -> Cluster | None:
        """Like `read`, but raises ClusterError also if the folder exists and is not this user's own."""
        if folder.exists() and folder.lstat().st_uid != os.getuid():
            raise ClusterError(f"{folder} belongs to another user: name another with --dir")
        return cls.read(folder)

    def write(self) -> None:
        """Publish cluster.json."""
        raw = asdict(self)
        del raw["folder"]
        temporary = self.folder / TEMPORARY
        temporary.write_text(json.dumps(raw, indent=1) + "\n")
        temporary.replace(self.folder / "cluster.json")

    @property
    def conf(self) -> Path:
        """The cluster's slurm.conf."""
        return self.folder / "slurm.conf"

    @property
    def node_names(self) -> list[str]:
        """The names of the nodes: node1, node2, …"""
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def daemon_names(self) -> list[str]:
        """The names of all daemons, in the order in which they start."""
        accounting = ["mariadbd", "slurmdbd"] if self.accounting else []
        return ["munged", *accounting, "slurmctld", *(f"slurmd-{node}" for node in self.node_names)]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of daemons and tools, which holds nothing of the caller's environment but the user's name."""
        return {
            "PATH": SYSTEM_PATH,
            "HOME": str(self.folder),
            "USER": user_name(),
            "LC_ALL": "C",
            "SLURM_CONF": str(self.conf),
            "MYSQL_UNIX_PORT": str(self.folder / "mariadb" / "socket"),
            MARK: str(self.folder),
        }

    def run(self, *argv: str, seconds: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a tool on this cluster, whatever its exit code; one that hangs is killed and counts as exit code 124."""
        try:
            return subprocess.run(argv, env=self.environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(argv, 124, "", f"it did not end within {seconds:.0f} s")

    def must(self, *argv: str, seconds: float = 120) -> str:
        """Run a tool that has to succeed, and return its output. Raises ClusterError if it fails."""
        done = self.run(*argv, seconds=seconds)
        if done.returncode:
            raise ClusterError(f"`{shlex.join(argv)}` exited {done.returncode}:\n{done.stdout}{done.stderr}".rstrip())
        return done.stdout

    def serve(self, name: str, argv: Sequence[str], ready: Callable[[], bool], seconds: float = 120) -> None:
        """Start a daemon unless it runs already, and wait until it answers."""
        daemons.start(self.folder, name, argv, self.environment)
        log = daemons.log_of(self.folder, name)
        daemons.wait_for(
            ready, f"{name} to answer", log, seconds=seconds, alive=lambda: daemons.recorded(self.folder, name)
        )


def user_name() -> str:
    """The name of the user who starts the cluster, as whom its daemons run."""
    return pwd.getpwuid(os.getuid()).pw_name


def require_plain(folder: Path) -> None:
    """Refuse a path that slurm.conf cannot hold, or that leaves no room for a socket's name (107 bytes in all).

    Raises ClusterError.
    """
    if len(str(folder)) > 60 or not re.fullmatch(r"[\w./+-]+", str(folder), re.ASCII):
        raise ClusterError(f"--dir {folder}: at most 60 characters, of letters, digits and ./+-_ only")


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def free_ports(count: int) -> tuple[int, ...]:
    """Ports of 127.0.0.1 that are free now, below the range from which outgoing connections take theirs."""
    found: list[int] = []
    with ExitStack() as held:
        for port in random.sample(range(20000, 32000), 2000):
            probe = held.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return tuple(found)
    raise ClusterError(f"only {len(found)} of {count} ports between 20000 and 32000 are free")


def write_files(cluster: Cluster) -> None:
    """Make the folders, the munge key, slurm.conf and slurmdbd.conf."""
    folder, host = cluster.folder, socket.gethostname().split(".")[0]
    controller, accounting, *node_ports = cluster.ports
    for name in ("log", "munge", "pids", "run", "state", *(f"spool/{node}" for node in cluster.node_names)):
        (folder / name).mkdir(parents=True, mode=0o755)
    (folder / "mariadb").mkdir(mode=0o700)
    _write_private(folder / "munge" / "key", os.urandom(128))
    common = {"name": CLUSTER_NAME, "folder": folder, "host": host, "me": user_name()}
    lines = [
        NODE_LINE.format(name=name, host=host, port=port, cpus=cluster.cpus)
        for name, port in zip(cluster.node_names, node_ports, strict=True)
    ]
    # Slurm can only bind to the address of the host's name; if that is not 127.0.0.1, it has to listen everywhere.
    local = _address_of(host) == "127.0.0.1"
    communication = "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny" if local else ""
    accounting_lines = SLURM_ACCOUNTING.format(port=accounting, **common) if cluster.accounting else ""
    cluster.conf.write_text(
        SLURM_CONF.format(
            controller_port=controller,
            communication=communication,
            node_lines="\n".join(lines),
            accounting_lines=accounting_lines,
            **common,
        )
    )
    _write_private(folder / "slurmdbd.conf", SLURMDBD_CONF.format(port=accounting, **common).encode())


def _write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
