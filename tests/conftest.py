"""Fixtures that several test modules share."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PATIENCE = 600
"""Seconds that a test waits for what is bound to happen: only a limit to hanging, however busy the machine is."""
PROJECT = Path(__file__).resolve().parent.parent
LONGEST = (
    *("test_demo", "test_families", "real_slurm/test_requeue.py", "real_slurm/test_chain", "real_slurm/test_limits"),
    *("real_slurm/test_batch_files", "real_slurm/test_two_nodes", "real_slurm/"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that of several workers (pytest-xdist) none ends long after the others."""
    items.sort(key=lambda item: next((n for n, name in enumerate(LONGEST) if name in str(item.path)), len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def _no_hub() -> None:
    """No test reaches for the Hugging Face Hub, and none inherits a surrounding job's or user's settings."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("DATA", "DEMO_BASE", "SNAKMODEL_RUNS", "SNAKMODEL_LOGS"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's base model and tokenizer, made once for all workers (pytest-xdist). No test changes it."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder = shared / "demo-base"
    with (shared / "demo-base.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            command = [sys.executable, "demo/base_model.py", "--text", "demo/text", "--output", str(folder)]
            subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def install_apart(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Fetch packages by pip, without their dependencies, into a folder to put first on PYTHONPATH.

    Where pip cannot, the test is skipped; with CI=true that is a failure.
    """

    def install(*packages: str) -> Path:
        folder = tmp_path_factory.mktemp("packages")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode and os.environ.get("CI") == "true":
            pytest.fail(f"pip cannot fetch {packages}: {result.stderr}")
        if result.returncode:
            pytest.skip(f"pip cannot fetch {packages}: {result.stderr.strip().splitlines()[-1]}")
        return folder

    return install


@pytest.fixture(scope="session")
def text_dedup_0_3_1(install_apart: Callable[..., Path]) -> Path:
    """text-dedup 0.3.1, which the published run used, and nothing else.

    It pins a SciPy that does not build any more; it runs with the dependencies that are installed.
    """
    return install_apart("text-dedup==0.3.1")
