"""Uploads through the real huggingface_hub to a server that speaks the Hub's protocol, on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.engine.hub_server import READER, WRITER, Hub
from tests.engine.small_llama import ENGINE, make_config, make_hf, run

REPO = "org/model"
Push: TypeAlias = Callable[..., tuple[int, str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "iter_0000060"
    make_hf(folder, make_config())
    return folder


def start(hub: Hub, model: Path, home: Path, *flags: object, **more: str) -> subprocess.Popen[str]:
    """The script as a process of its own, whose Hub is the server."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER}
    environment |= more
    argv = [sys.executable, ENGINE / "tools/push_to_hub.py", model, "--max_shard_size", "60KB", "--hf_repo_name", REPO]
    return subprocess.Popen(
        list(map(str, [*argv, *flags])), env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture
def push(hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Push:
    """Run the script in this process; no token is ever in what it prints, and nobody waits."""
    from huggingface_hub import constants

    for name, value in {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr("time.sleep", lambda _: None)

    def push(*flags: object, token: str | None = WRITER) -> tuple[int, str]:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        code, out, err = run("tools/push_to_hub.py", model, "--hf_repo_name", REPO, "--max_shard_size", "60KB", *flags)
        assert WRITER not in out + err
        assert READER not in out + err
        return code, out + err

    return push


def test_create_upload_and_revision(hub, model, push, tmp_path):
    """A private repository with exactly the copy's bytes; an intermediate checkpoint becomes a branch of its own."""
    code, out = push("--output_folder", tmp_path / "copy", "--license", "llama2")
    assert code == 0, out
    copy = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert hub.repos[REPO]["private"] is True
    assert hub.files(REPO) == copy
    assert len([name for name in copy if name.endswith(".safetensors")]) > 2
    assert b"license: llama2" in copy["README.md"]
    (tmp_path / "token").write_text(f"{WRITER}\n")
    code, out = push("--revision", "it60", "--token_file", tmp_path / "token", token=None)
    assert code == 0, out
    assert hub.files(REPO, "it60").keys() == copy.keys()
    assert b'revision="it60"' in hub.files(REPO, "it60")["README.md"]
    assert hub.files(REPO) == copy
    assert sorted(path.name for path in model.parent.iterdir()) == ["iter_0000060", "iter_0000060-tokenizer"]


def test_the_saved_login(hub, push, tmp_path, monkeypatch):
    """Without HF_TOKEN and --token_file the token of `hf auth login` is used."""
    from huggingface_hub import constants

    (tmp_path / "login").write_text(WRITER)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    code, out = push(token=None)
    assert code == 0, out
    assert "config.json" in hub.files(REPO)


def test_no_token_in_what_is_printed_or_written(hub, model, tmp_path):
    """With huggingface_hub's own debug output on, the token is in no line, no file of the copy and nothing uploaded."""
    process = start(hub, model, tmp_path, "--output_folder", tmp_path / "copy", HF_DEBUG="1")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert "Request" in err, "there is no debug output"
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for content in (out.encode(), err.encode(), *written, *hub.files(REPO).values()):
        assert WRITER.encode() not in content


def test_killed_in_the_middle_goes_on_where_it_stopped(hub, model, push, tmp_path):
    """After SIGKILL during the third file nothing is visible; the next run sends the rest only, and then commits."""
    hub.hang_after = 2
    process = start(hub, model, tmp_path)
    assert hub.hanging.wait(600)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert hub.files(REPO) == {}
    before = list(hub.stored)
    assert len(before) == 2
    hub.hang_after = None
    assert push()[0] == 0
    assert max(Counter(hub.stored).values()) == 1
    assert set(before) < set(hub.stored)
    assert any(name.startswith("model-00001-of") for name in hub.files(REPO))
    sent, commits = len(hub.stored), len(hub.commits)
    assert push()[0] == 0
    assert (len(hub.stored), len(hub.commits)) == (sent, commits), "an unchanged model was sent again"
    assert not (model.parent / ".iter_0000060.push").exists()


def test_busy_and_broken_servers_are_waited_for(hub, push):
    """429 and 504, at every kind of request, are tried again until they pass."""
    hub.faults = {"POST /api/repos/create": [429], "objects/batch": [504, 429], "PUT /lfs": [504], "/commit/": [504]}
    code, out = push()
    assert code == 0, out
    assert "going on in 2 s" in out
    assert not any(hub.faults.values())
    assert "config.json" in hub.files(REPO)


def test_no_permission_says_so_at_once(hub, push):
    """A token that may only read, and no token at all: exit 2, no retry, nothing sent."""
    for token in (READER, None):
        code, out = push(token=token)
        assert code == 2, out
        assert out.count("error: org/model is not uploaded") == 1
        assert "write permission" in out
        assert "Traceback" not in out
    assert hub.stored == []
    assert sum("create" in request for request in hub.requests) == 2


def test_another_number_of_shards_leaves_no_old_ones(hub, push):
    """Uploaded again in one file, the repository holds one file and no index of the old shards."""
    assert push()[0] == 0
    assert push("--max_shard_size", "1GB")[0] == 0
    weights = [name for name in hub.files(REPO) if "model" in name and name != "tokenizer.model"]
    assert weights == ["model.safetensors"]


def test_visibility(hub, push):
    """--public makes a public repository; without it nothing is sent to one."""
    assert push("--public")[0] == 0
    assert hub.repos[REPO]["private"] is False
    commits = len(hub.commits)
    code, out = push()
    assert (code, "exists and is public; give --public" in out) == (2, True)
    assert len(hub.commits) == commits


def test_a_hub_that_stays_away(hub, model, push, monkeypatch):
    """When no attempt helped the command exits 1, which a launcher tries again; the waits grow and the copy stays."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.faults = {"repos/create": [503] * 99}
    code, out = push()
    assert (code, "run again to go on" in out) == (1, True)
    assert waits == [2, 4, 8, 16, 32, 64]
    assert (model.parent / ".iter_0000060.push").is_dir()
    hub.faults = {}
    assert push()[0] == 0
    assert not (model.parent / ".iter_0000060.push").exists()
