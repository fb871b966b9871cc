"""One real cluster of four nodes for all Slurm tests, used as an unprivileged user: root would hide permission errors.

`cluster` starts sbatch/devcluster in a free folder and stops it at the end. The user may not be able to reach Python or
this checkout (a Python below /root), so it is let through the folders on the way for as long as the tests last.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DEVCLUSTER = REPOSITORY / "sbatch" / "devcluster"
USER = "snak-test"
PATIENCE = 10
"""Limits in these tests are for a quiet machine; a busy one is given so many times as long."""
LOCK = Path("/tmp/snakmodel-slurm-tests.lock")
SACCT_FIELDS = ("JobID", "JobName", "State", "ExitCode", "Partition", "NodeList")
SQUEUE_FIELDS = {"JobID": "%i", "State": "%T", "Reason": "%r", "Partition": "%P", "JobName": "%j", "Comment": "%k"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder carries the `slurm` marker."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")


def _demote(user: str) -> dict[str, object]:
    entry = pwd.getpwnam(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def call(
    argv: Sequence[str | Path],
    *,
    cwd: Path,
    env: dict[str, str],
    timeout: float,
    user: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command, as `user` if given; after PATIENCE limits its process group is killed and the test fails."""
    identity = _demote(user) if user else {}
    child = subprocess.Popen(
        [str(word) for word in argv],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **identity,  # type: ignore[call-overload]
    )
    try:
        out, err = child.communicate(timeout=timeout * PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
        pytest.fail(f"{argv} did not end within {timeout} s\n{out}\n{err}")
    return subprocess.CompletedProcess(list(argv), child.returncode, out, err)


def _names(job: str) -> set[str]:
    """An array element answers to its array's id too."""
    return {job, job.split("_")[0]}


def _covers(rows: list[dict[str, str]], wanted: set[str], queued: set[str]) -> bool:
    """Whether sacct knows all that was asked for and that the controller lists; elements that never ran are 7_[0-9]."""
    recorded = {row["JobID"] for row in rows}
    unstarted = {job.split("_")[0] for job in recorded if "_[" in job}
    known = {name for job in recorded for name in _names(job)}
    return known >= wanted and all(job in recorded or job.split("_")[0] in unstarted for job in queued)


@dataclass(frozen=True)
class Cluster:
    """A running cluster and the user whose jobs it runs."""

    folder: Path
    home: Path
    user: str

    @property
    def environment(self) -> dict[str, str]:
        """What the user's commands see: the tests' Python first, this cluster, and nothing of a cluster around it."""
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        own = {"HOME": str(self.home), "USER": self.user, "LOGNAME": self.user, "LANG": "C.UTF-8", "PATH": path}
        own |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        if "PYTHONPATH" in os.environ:
            own["PYTHONPATH"] = os.environ["PYTHONPATH"]
        return own

    def run(
        self,
        argv: Sequence[str | Path],
        cwd: Path | None = None,
        check: bool = True,
        timeout: float = 60,
        *,
        as_root: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the unprivileged user (or as root, for what an administrator does)."""
        user = None if as_root else self.user
        done = call(argv, cwd=cwd or self.home, env=self.environment, timeout=timeout, user=user)
        assert not check or done.returncode == 0, f"{argv} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def workdir(self, name: str) -> Path:
        """A new folder that the user owns; all nodes see it, since they are on this machine."""
        folder = self.home / name
        folder.mkdir()
        shutil.chown(folder, self.user, pwd.getpwnam(self.user).pw_gid)
        return folder

    def submit(self, *argv: str | Path, cwd: Path) -> str:
        """Run sbatch with these arguments; returns the job's id."""
        return self.run(["sbatch", "--parsable", *argv], cwd=cwd).stdout.strip().split(";")[0]

    def sacct(self, jobs: Iterable[str], fields: Sequence[str] = SACCT_FIELDS) -> list[dict[str, str]]:
        """The accounting's records of jobs without their steps; array elements that never ran share one."""
        ids = ",".join(jobs)
        out = self.run(["sacct", "-X", "-n", "-P", "-j", ids, "-o", ",".join(fields)]).stdout
        return [dict(zip(fields, line.split("|"), strict=True)) for line in out.splitlines()]

    def squeue(self) -> list[dict[str, str]]:
        """Every job that the controller remembers, one an array element, finished ones too."""
        out = self.run(["squeue", "-h", "-r", "-t", "all", "-o", "|".join(SQUEUE_FIELDS.values())]).stdout
        return [
            dict(zip(SQUEUE_FIELDS, line.split("|", len(SQUEUE_FIELDS) - 1), strict=True)) for line in out.splitlines()
        ]

    def wait(self, jobs: Iterable[str], *states: str, timeout: float = 60) -> list[dict[str, str]]:
        """Wait until every job (every element of an array) is in one of the states; returns their sacct records.

        The accounting alone misleads: for a second an array that has just run is one COMPLETED record, not several.
        """
        wanted, limit = set(jobs), time.monotonic() + timeout * PATIENCE
        while True:
            queued = [row for row in self.squeue() if _names(row["JobID"]) & wanted]
            rows = self.sacct(wanted)
            settled = all(row["State"].split(" ")[0] in states for row in [*queued, *rows])
            if settled and _covers(rows, wanted, {row["JobID"] for row in queued}):
                return rows
            if time.monotonic() > limit:
                pytest.fail(f"{wanted} not {' or '.join(states)} within {timeout} s: {queued}, in sacct {rows}")
            time.sleep(0.2)

    @property
    def accounting(self) -> bool:
        """Whether it has slurmdbd."""
        return (self.folder / "pids" / "slurmdbd").exists()

    def pid(self, daemon: str) -> int:
        """The pid of `slurmctld`, `slurmd-node1`, …"""
        return int((self.folder / "pids" / daemon).read_text().split()[0])


@contextmanager
def cluster_in(folder: Path, *options: str) -> Iterator[Path]:
    """A devcluster in `folder`, stopped at the end whatever happens; yields the folder."""
    try:
        up = devcluster("up", folder, *options)
        assert up.returncode == 0, f"devcluster up exited {up.returncode}\n{up.stdout}\n{up.stderr}"
        yield folder
    finally:
        down = devcluster("down", folder)
    assert down.returncode == 0, f"devcluster down exited {down.returncode}\n{down.stdout}\n{down.stderr}"


def devcluster(command: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run sbatch/devcluster."""
    argv: list[str | Path] = [sys.executable, DEVCLUSTER, command, "--dir", folder, *options]
    return call(argv, cwd=Path("/"), env=dict(os.environ), timeout=300)


def _why_not() -> str | None:
    missing = [
        t for t in ("slurmctld", "slurmdbd", "munged", "mariadbd") if not shutil.which(t, path="/usr/sbin:/usr/bin")
    ]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} not found): run sudo sbatch/install_slurm.sh"
    return "the Slurm tests start a cluster for several users: run them as root" if os.getuid() else None


@pytest.fixture(scope="session")
def slurm_user() -> Iterator[str]:
    """An unprivileged user who can run this Python and the toolkit; without Slurm or root skips, in CI fails."""
    if reason := _why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with LOCK.open("w") as lock:  # shared by all sessions on the machine: the last to leave takes the access back
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            pwd.getpwnam(USER)
        except KeyError:
            add = ["useradd", "--system", "--no-create-home", "--shell", "/bin/bash", USER]
            done = subprocess.run(add, capture_output=True, text=True)
            already = 9  # another session was quicker
            assert done.returncode in (0, already), done.stderr
        undo: list[Callable[[], object]] = []
        try:
            _let_through(USER, undo)
            yield USER
        finally:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                undo.clear()
            for step in reversed(undo):
                step()


def _let_through(user: str, undo: list[Callable[[], object]]) -> None:
    """Give the user the right to pass through every folder above Python and the checkout; `undo` gets how to end it."""
    python = Path(sys.executable).resolve().parent
    targets = [Path(sys.prefix), Path(sys.base_prefix), python, Path(sys.executable).parent, REPOSITORY]
    for folder in sorted({folder for target in targets for folder in (target, *target.parents)}):
        if _has_entry(user, folder) or not _can_enter(user, folder):
            undo.append(_grant(user, folder))
    probe = [sys.executable, "-B", "-c", "import snakmodel"]
    env = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = call(probe, cwd=Path("/"), env=env, timeout=60, user=user)
    if done.returncode:
        pytest.fail(f"{user} cannot run this Python ({sys.executable}) with the toolkit:\n{done.stderr}")


def _can_enter(user: str, folder: Path) -> bool:
    return (
        call(["test", "-x", folder], cwd=Path("/"), env={"PATH": "/usr/bin:/bin"}, timeout=10, user=user).returncode
        == 0
    )


def _acl(folder: Path) -> list[str]:
    done = subprocess.run(["getfacl", "-cp", folder], capture_output=True, text=True)
    return done.stdout.split()


def _has_entry(user: str, folder: Path) -> bool:
    """Whether another session of these tests, perhaps one that was killed, let the user in already."""
    return f"user:{user}:--x" in _acl(folder)


def _grant(user: str, folder: Path) -> Callable[[], object]:
    """Let the user pass by an ACL entry, or everybody where the file system has none; returns what takes it back."""
    before = folder.stat().st_mode
    if shutil.which("setfacl") and subprocess.run(["setfacl", "-m", f"u:{user}:x", folder]).returncode == 0:
        return lambda: _revoke(user, folder)
    folder.chmod(before | 0o001)
    return lambda: folder.chmod(before)


def _revoke(user: str, folder: Path) -> None:
    subprocess.run(["setfacl", "-x", f"u:{user}", folder], check=True)
    named = [entry for entry in _acl(folder) if entry.startswith(("user:", "group:")) and "::" not in entry]
    if not named:  # only the mask is left, which would go on showing in the folder's mode
        subprocess.run(["setfacl", "-b", folder], check=True)


@contextmanager
def _cluster_of(user: str, *options: str) -> Iterator[Cluster]:
    """A cluster in a new folder, with a home for the user."""
    root = Path(tempfile.mkdtemp(prefix="snak-slurm-", dir="/tmp"))
    root.chmod(0o755)
    try:
        home = root / "home"
        home.mkdir()
        shutil.chown(home, user, pwd.getpwnam(user).pw_gid)
        with cluster_in(root / "c", "--cpus", "8", "--user", user, *options) as folder:
            yield Cluster(folder, home, user)
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(slurm_user: str) -> Iterator[Cluster]:
    """Four nodes of eight CPUs with accounting, for the whole session."""
    with _cluster_of(slurm_user, "--nodes", "4") as found:
        yield found


@pytest.fixture
def bare(slurm_user: str) -> Iterator[Cluster]:
    """A node without accounting, of which a test may stop the controller."""
    with _cluster_of(slurm_user, "--nodes", "1", "--no-accounting") as found:
        yield found


@pytest.fixture
def repaired(cluster: Cluster) -> Iterator[Cluster]:
    """The session's cluster, of which the test may end daemons: all are back at the end."""
    yield cluster
    bring_back(cluster)


def bring_back(cluster: Cluster) -> None:
    """Start the daemons that do not run."""
    up = devcluster("up", cluster.folder, *(() if cluster.accounting else ("--nodes", "1", "--no-accounting")))
    assert up.returncode == 0, up.stdout + up.stderr


def stop_controller(cluster: Cluster) -> None:
    """End slurmctld as an administrator does: killed outright it would forget jobs that it accepted a moment ago."""
    pid = cluster.pid("slurmctld")
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "slurmctld did not end"
        time.sleep(0.1)


@contextmanager
def drained(cluster: Cluster) -> Iterator[None]:
    """No job starts for the duration of the body."""
    nodes = ["scontrol", "update", "NodeName=node[1-4]"]
    cluster.run([*nodes, "State=DRAIN", "Reason=test"], as_root=True)
    try:
        yield
    finally:
        cluster.run([*nodes, "State=RESUME"], as_root=True)


@contextmanager
def settings(cluster: Cluster, *lines: str) -> Iterator[None]:
    """Further lines of slurm.conf, those that slurmctld takes over while it runs."""
    conf = cluster.folder / "slurm.conf"
    before = conf.read_text()
    try:
        conf.write_text("\n".join([before, *lines, ""]))
        cluster.run(["scontrol", "reconfigure"], as_root=True)
        yield
    finally:
        conf.write_text(before)
        cluster.run(["scontrol", "reconfigure"], as_root=True)
