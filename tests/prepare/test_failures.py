"""prepare and export-text on a machine that fails them: killed, no room on the disk, files that cannot be read."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from run_contract.errors import EXIT_NO_ROOM
from snakmodel.prepare.input_files import plan_shards


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A planned run of one shard of 15 MB."""
    line = 'En linje med almindelig tekst, æøå og "citater", nummer {}\n'
    (tmp_path / "raw").mkdir()
    text = "".join(line.format(number) for number in range(60_000))
    (tmp_path / "raw/a.txt").write_text(text * 4)
    parts = [[asdict(part) for part in shard] for shard in plan_shards(tmp_path / "raw", None, 1, 1)]
    (tmp_path / "shards.json").write_text(json.dumps({"shards": parts}))
    return tmp_path


def prepare_command(folder: Path, output: Path) -> list[str]:
    flags = ["--shards", str(folder / "shards.json"), "--shard", "0", "--output", str(output / "s")]
    return [sys.executable, "-m", "snakmodel.prepare", *flags]


def export_command(folder: Path, output: Path) -> list[str]:
    if not (folder / "in.arrow").exists():
        subprocess.run(prepare_command(folder, folder), check=True, stdout=subprocess.DEVNULL)
        (folder / "s.arrow").rename(folder / "in.arrow")
    flags = ["--input", str(folder / "in.arrow"), "--output", str(output / "s")]
    return [sys.executable, "-m", "snakmodel.export_text", "shard", *flags]


COMMANDS = [prepare_command, export_command]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_moment_and_run_again(run_folder: Path, command: Any) -> None:
    """SIGKILL in the midst of writing leaves nothing under a final name but whole files; run again, the same bytes."""
    seed = time.time_ns()
    print(f"seed {seed}")
    random_ = random.Random(seed)
    started = time.monotonic()
    subprocess.run(command(run_folder, run_folder / "expected"), check=True, stdout=subprocess.DEVNULL)
    took = time.monotonic() - started
    expected = contents(run_folder / "expected")
    out = run_folder / "out"
    out.mkdir()
    claim = run_folder / "claim.json"
    environment = {**os.environ, "SNAKMODEL_CLAIM": str(claim)}
    midway, attempt = 0, 0
    while attempt < 5 or (not midway and attempt < 100):  # the first time spans may not be those of the later ones
        attempt += 1
        environment["SNAKMODEL_ATTEMPT"] = f"1.r{attempt}"
        claim.write_text(json.dumps({"attempt": f"1.r{attempt}"}))
        child = subprocess.Popen(command(run_folder, out), env=environment, stdout=subprocess.DEVNULL)
        while child.poll() is None and not list(out.glob(f".s.*.tmp-1.r{attempt}")):
            time.sleep(0.001)
        time.sleep(random_.uniform(0, took / 3))
        child.kill()
        child.wait()
        midway += any(path.name.startswith(".") for path in out.iterdir())
        assert contents(out).items() <= expected.items()
    assert midway
    claim.write_text(json.dumps({"attempt": "1.r9"}))
    environment["SNAKMODEL_ATTEMPT"] = "1.r9"
    subprocess.run(command(run_folder, out), env=environment, check=True, stdout=subprocess.DEVNULL)
    assert contents(out) == expected
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_may_not_grow(run_folder: Path, command: Any) -> None:
    """At the limit of a file's size the command ends with one line that names the output, and publishes nothing."""
    (run_folder / "out").mkdir()
    words = command(run_folder, run_folder / "out")
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    assert (done.returncode, done.stderr.count("\n")) == (EXIT_NO_ROOM, 1), done.stderr
    assert f"error: {run_folder / 'out'}: no room for s." in done.stderr
    assert "(File too large). Nothing was published" in done.stderr
    assert not list((run_folder / "out").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({mounted.stderr.strip()}); needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(run_folder: Path, small_disk: Path, command: Any) -> None:
    """With no space left the command ends with one line, nothing is published, and the space is free again."""
    done = subprocess.run(command(run_folder, small_disk), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (EXIT_NO_ROOM, 1), done.stderr
    assert f"error: {small_disk}: no room for s." in done.stderr
    assert "(No space left on device)" in done.stderr
    assert not list(small_disk.iterdir())
    assert shutil.disk_usage(small_disk).used < 100_000


def test_a_file_that_may_not_be_read(run_folder: Path) -> None:
    """Raw text without permission to read it is named in one line."""
    words = prepare_command(run_folder, run_folder)
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read every file, and there is no setpriv to give that up")
        words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *words]
    (run_folder / "raw/a.txt").chmod(0)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: {run_folder / 'raw/a.txt'}: Permission denied\n")
    assert not (run_folder / "s.arrow").exists()
