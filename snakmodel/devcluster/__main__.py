"""sbatch/devcluster up | status | env | down — a real Slurm cluster of several nodes on this one machine.

munged, MariaDB and slurmdbd (when installed), slurmctld and one slurmd per node are started without systemd, with files
that all lie in one folder. `up` returns when every node is idle; `down` stops what was started and removes the folder.
`up` chooses free ports; the database uses none. The partition `urgent` preempts the partition `cpu`. Started as root,
the cluster serves several users, else only the user who started it. It needs only the standard library of any Python ≥
3.10.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from snakmodel.devcluster import daemons
from snakmodel.devcluster.config_files import (
    CLUSTER_NAME,
    MARK,
    SYSTEM_PATH,
    Cluster,
    free_ports,
    require_plain,
    user_name,
    write_files,
)
from snakmodel.devcluster.daemons import ClusterError

DEFAULT_FOLDER = Path("/tmp/snakmodel-devcluster")
ACCOUNT = "snak"
REQUIRED = ("munged", "slurmctld", "slurmd", "sinfo")
ACCOUNTING = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db")
NEXT = """\
{nodes} nodes are up. Now type
  export SLURM_CONF={conf}
  sinfo
and at the end
  {down}
"""


def _missing(tools: Sequence[str]) -> list[str]:
    return [tool for tool in tools if not shutil.which(tool, path=SYSTEM_PATH)]


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def _start_munge(cluster: Cluster) -> None:
    home = cluster.folder / "munge"
    files = [f"--socket={home}/socket", f"--key-file={home}/key", f"--pid-file={home}/pid", f"--seed-file={home}/seed"]
    argv = ["munged", "--foreground", *files, f"--log-file={cluster.folder}/log/munge.log"]
    cluster.serve("munged", argv, lambda: _accepts(home / "socket"))


def _start_accounting(cluster: Cluster) -> None:
    """Start MariaDB without a port, then slurmdbd, and enter the cluster's name and account."""
    home = cluster.folder / "mariadb"
    # A server that starts removes the temporary tables of other servers from a shared folder.
    (home / "tmp").mkdir(exist_ok=True)
    options = ["--no-defaults", f"--datadir={home}/data", f"--tmpdir={home}/tmp", f"--user={user_name()}"]
    if not (home / "data").exists():
        first = ["--auth-root-authentication-method=socket", f"--auth-root-socket-user={user_name()}", "--skip-test-db"]
        cluster.must("mariadb-install-db", *options, *first, seconds=300)
    small = ["--skip-networking", "--skip-log-bin", "--innodb-flush-log-at-trx-commit=0", "--performance-schema=OFF"]
    argv = ["mariadbd", *options, *small, f"--socket={home}/socket", f"--pid-file={home}/pid"]
    cluster.serve("mariadbd", argv, lambda: _accepts(home / "socket"))
    listing = ("sacctmgr", "-nP", "show", "cluster", "format=cluster")
    cluster.serve("slurmdbd", ["slurmdbd", "-D"], lambda: cluster.run(*listing).returncode == 0)
    if CLUSTER_NAME not in cluster.must(*listing):
        cluster.must("sacctmgr", "-i", "add", "cluster", CLUSTER_NAME)
        cluster.must("sacctmgr", "-i", "add", "account", ACCOUNT, "Description=development", "Organization=snakmodel")


def _add_users(cluster: Cluster, users: Sequence[str]) -> None:
    listing = cluster.must("sacctmgr", "-nP", "show", "assoc", f"account={ACCOUNT}", "format=user")
    new = sorted(set(users) - set(listing.split()))
    if new:
        cluster.must("sacctmgr", "-i", "add", "user", f"name={','.join(new)}", f"account={ACCOUNT}")


def _node_serves(cluster: Cluster, node: str) -> bool:
    """Whether the controller hears from the node; a node that somebody drained on purpose counts too."""
    state = cluster.run("sinfo", "-h", "-n", node, "-p", "cpu", "-o", "%T").stdout.strip()
    return bool(state) and not state.endswith("*") and not state.startswith(("down", "unk"))


def _start_slurm(cluster: Cluster) -> None:
    cluster.serve("slurmctld", ["slurmctld", "-D"], lambda: "is UP" in cluster.run("scontrol", "ping").stdout)
    commands = {node: ["slurmd", "-D", "-N", node] for node in cluster.node_names}
    for node, command in commands.items():
        daemons.start(cluster.folder, f"slurmd-{node}", command, cluster.environment)
    for node, command in commands.items():
        cluster.serve(f"slurmd-{node}", command, partial(_node_serves, cluster, node))


def _own_processes(cluster: Cluster) -> list[daemons.Process]:
    """The cluster's daemons, job steps and processes of jobs, including those whose slurmd has died."""
    daemon, task = f"{MARK}={cluster.folder}".encode(), f"SLURM_CONF={cluster.conf}".encode()
    roots = _running(cluster, cluster.daemon_names)
    for process, _ in daemons.processes():
        try:
            environment = Path(f"/proc/{process[0]}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        in_job = task in environment and any(entry.startswith(b"SLURMD_NODENAME=") for entry in environment)
        if (daemon in environment or in_job) and process[0] != os.getpid():
            roots.append(process)
    return daemons.descendants(dict.fromkeys(roots))


def _running(cluster: Cluster, names: Sequence[str]) -> list[daemons.Process]:
    return [process for name in names if (process := daemons.recorded(cluster.folder, name))]


def _stop(cluster: Cluster) -> None:
    """End the controller, the nodes, whatever still runs on them, and then what they relied on, the database last."""
    daemons.stop(_running(cluster, ["slurmctld"]), seconds=15)
    daemons.stop(_running(cluster, [f"slurmd-{node}" for node in cluster.node_names]), seconds=5)
    support = _running(cluster, ["slurmdbd", "munged", "mariadbd"])
    kept = daemons.descendants(support)
    jobs = [process for process in _own_processes(cluster) if process not in kept]
    daemons.stop(jobs, seconds=0, first=signal.SIGKILL)
    for process in support:
        daemons.stop([process], seconds=15)


def _require_tools(accounting: bool) -> bool:
    """Check what is installed; returns whether there will be accounting. Raises ClusterError if Slurm is missing."""
    if missing := _missing(REQUIRED):
        raise ClusterError(f"Slurm is not installed ({', '.join(missing)} not found): run sudo sbatch/install_slurm.sh")
    missing = _missing(ACCOUNTING) if accounting else []
    if missing:
        print(f"without accounting: {', '.join(missing)} not found (sudo sbatch/install_slurm.sh installs them)")
    return accounting and not missing


def up(folder: Path, nodes: int, cpus: int, accounting: bool, users: Sequence[str]) -> None:
    """Start a cluster, or what is missing of one that was complete; what an interrupted start left is removed first."""
    if os.getuid() and users:
        raise ClusterError("--user needs root: only root's slurmd can run jobs as another user")
    for user in users:
        _require_user(user)
    require_plain(folder)
    accounting = _require_tools(accounting)
    cluster = Cluster.read_own(folder)
    if cluster and not cluster.complete:
        print(f"removing what an interrupted start left in {folder}")
        down(folder)
        cluster = None
    if cluster and (cluster.nodes, cluster.cpus, cluster.accounting) != (nodes, cpus, accounting):
        raise ClusterError(
            f"{folder} holds a cluster of {cluster.nodes} nodes with {cluster.cpus} CPUs each and accounting "
            f"{'on' if cluster.accounting else 'off'}: ask for the same, or run `sbatch/devcluster down` first"
        )
    if cluster:
        _start(cluster, users)
    else:
        _create(Cluster(folder, nodes, cpus, accounting, free_ports(2 + nodes)), users)


def _create(cluster: Cluster, users: Sequence[str]) -> None:
    """Start a new cluster. If that fails or is interrupted, its processes are ended and its logs stay."""
    cluster.folder.mkdir(parents=True, exist_ok=True)
    cluster.folder.chmod(0o755)
    cluster.write()
    try:
        write_files(cluster)
        _start(cluster, users)
        replace(cluster, complete=True).write()
    except BaseException:
        _stop(cluster)
        raise


def _start(cluster: Cluster, users: Sequence[str]) -> None:
    """Start those daemons that do not run, in order."""
    _start_munge(cluster)
    if cluster.accounting:
        _start_accounting(cluster)
        _add_users(cluster, ["root", user_name(), *filter(None, [os.environ.get("SUDO_USER")]), *users])
    _start_slurm(cluster)


def _require_user(name: str) -> None:
    try:
        pwd.getpwnam(name)
    except KeyError:
        raise ClusterError(f"--user {name}: this machine has no such user; make it with `useradd {name}`") from None


def down(folder: Path) -> None:
    """Stop every process of the cluster and remove its folder."""
    cluster = Cluster.read_own(folder)
    if cluster:
        _stop(cluster)
        shutil.rmtree(folder)


def status(folder: Path) -> int:
    """Print the daemons, nodes and jobs; returns 0 if every daemon runs, else 1."""
    cluster = _existing(folder)
    dead = [name for name in cluster.daemon_names if not daemons.recorded(folder, name)]
    for name in cluster.daemon_names:
        process = daemons.recorded(folder, name)
        print(
            f"{name:14} {f'pid {process[0]}' if process else f'not running; its log: {daemons.log_of(folder, name)}'}"
        )
    if "slurmctld" not in dead and "munged" not in dead:
        print(cluster.must("sinfo"), cluster.must("squeue"), sep="\n", end="")
    return 1 if dead else 0


def _existing(folder: Path) -> Cluster:
    cluster = Cluster.read(folder)
    if not cluster:
        raise ClusterError(f"no cluster in {folder}: start one with `sbatch/devcluster up`")
    return cluster


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sbatch/devcluster", description="A real Slurm cluster on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "up": "start it; started already, it brings back daemons that died and adds users",
        "down": "stop everything it started and remove its folder",
        "status": "daemons, nodes, jobs; exit 1 if a daemon is down",
        "env": 'what to give the shell: eval "$(sbatch/devcluster env)"',
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--dir", type=Path, default=DEFAULT_FOLDER, help="its folder (default %(default)s)")
        if name == "up":
            command.add_argument("--nodes", type=int, default=4, help="nodes (default %(default)s)")
            command.add_argument("--cpus", type=int, default=8, help="CPUs each node claims (default %(default)s)")
            command.add_argument("--no-accounting", action="store_true", help="no slurmdbd, MariaDB and sacct")
            command.add_argument("--user", action="append", default=[], help="also may submit; repeatable; needs root")
    arguments = parser.parse_args()
    if arguments.command == "up" and (arguments.nodes < 1 or arguments.cpus < 1):
        parser.error("--nodes and --cpus must be at least 1")
    return arguments


def main() -> int:
    """The command sbatch/devcluster up | down | status | env."""
    arguments = _arguments()
    folder = arguments.dir.absolute()
    os.umask(0o022)  # other users' jobs read slurm.conf and reach the sockets
    try:
        if arguments.command == "up":
            up(folder, arguments.nodes, arguments.cpus, not arguments.no_accounting, arguments.user)
            print(
                NEXT.format(nodes=arguments.nodes, conf=f"{folder}/slurm.conf", down=_command("down", folder)), end=""
            )
        elif arguments.command == "down":
            down(folder)
        elif arguments.command == "status":
            return status(folder)
        else:
            print(f"export SLURM_CONF={shlex.quote(str(_existing(folder).conf))}")
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _command(name: str, folder: Path) -> str:
    return f"sbatch/devcluster {name}" + ("" if folder == DEFAULT_FOLDER else f" --dir {folder}")
