"""The launchers as typed, from a shell and with a Python that lacks the packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
LAUNCHERS = sorted(path.name for path in (PROJECT / "jobs").glob("[a-z]*.py"))


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without any packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The launchers alone, in a project that was not set up."""
    shutil.copytree(PROJECT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def start(*command: str | Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with `path` first among the folders of commands, and no settings of this environment."""
    environment = {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(list(map(str, command)), env=environment, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_are_executable(name: str) -> None:
    """A user types what the README says: `jobs/status.py`."""
    path = PROJECT / "jobs" / name
    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")


def test_another_python_goes_on_in_the_projects_environment(project: Path, bare_python: Path) -> None:
    """With a Python that lacks the packages, `.venv` of the project is taken, and the arguments are kept."""
    own = project / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    own.chmod(0o755)
    result = start(project / "jobs" / "status.py", "--help", path=bare_python.parent)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: status.py")


def test_no_environment_says_what_to_type(project: Path, bare_python: Path) -> None:
    """Without `.venv` the error names the Python, what it lacks and `make setup`; there is no traceback."""
    result = start(bare_python, project / "jobs" / "submit_all.py", path=bare_python.parent)
    assert result.returncode == 1
    assert f"{bare_python} is Python 3." in result.stderr
    assert "it lacks run_contract, snakmodel, pydantic, rich, submitit, yaml" in result.stderr
    assert f"Type `make setup` in {project} once" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("python", ["nopython", "./old"])
def test_make_names_a_python_that_will_not_do(tmp_path: Path, python: str) -> None:
    """A command that does not exist and a Python that is too old are told apart."""
    shutil.copy(PROJECT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    result = subprocess.run(
        ["make", "-C", str(tmp_path), "setup", f"PYTHON={python}"], check=False, capture_output=True, text=True
    )
    expected = {
        "nopython": "error: there is no command nopython here. Name a Python of version 3.10 or newer",
        "./old": "error: ./old is Python 3.8.1, and 3.10 or newer is needed. Name a newer one",
    }
    assert result.returncode != 0
    assert expected[python] in result.stderr
    assert not (tmp_path / ".venv").exists()


def made(target: str, path: Path, folder: Path) -> list[str]:
    """The commands of `make TARGET` in a project that was not set up, where only `path` has commands."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, folder)
    make = shutil.which("make")
    assert make
    command = [make, "--dry-run", "-C", str(folder), target]
    done = subprocess.run(command, env={"PATH": str(path)}, check=True, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if " install " in line]


@pytest.mark.parametrize("uv", [False, True])
def test_what_set_up_installs(tmp_path: Path, uv: bool) -> None:
    """Users get no developer tools and only text-dedup itself, by uv where it is there, and see progress."""
    path = tmp_path / "bin"
    path.mkdir()
    if uv:
        (path / "uv").write_text("#!/bin/sh\n")
        (path / "uv").chmod(0o755)
    begin = "uv pip install " if uv else ".venv/bin/pip install "
    users = made("setup", path, tmp_path)
    assert [line.startswith(begin) and "--quiet" not in line for line in users] == [True, True]
    assert users[0].endswith("--editable '.[text-dedup]'")
    assert users[1].endswith("--no-deps text-dedup")
    assert made("setup-dev", path, tmp_path) == [*users, users[0].replace("[text-dedup]", "[text-dedup,dev]")]


def test_what_text_dedup_would_bring_along_is_not_installed() -> None:
    """It is an extra without the package itself, and no version is pinned of what only its own list asks for."""
    project = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = (PROJECT / "constraints.txt").read_text(encoding="utf-8")
    assert "text-dedup==" not in "".join(line for line in project.splitlines() if not line.startswith("#"))
    for name in ("pyspark", "onnx", "onnxruntime", "sphinx", "sphinxcontrib-bibtex"):
        assert f"\n{name}==" not in pinned
    assert "\ntext-dedup==0.4.0\n" in pinned


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_on_a_terminal_that_knows_only_ascii(name: str) -> None:
    """Characters that the terminal lacks become escapes, not an error."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [sys.executable, str(PROJECT / "jobs" / name), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").startswith("usage")


def test_the_readme_says_on_its_first_screen_that_gpus_have_not_run() -> None:
    """Whoever has GPUs must not learn it in the last paragraph."""
    first = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()[:20])
    assert "on GPUs it has not run yet" in first
