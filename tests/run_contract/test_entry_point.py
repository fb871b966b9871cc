"""One behaviour of every command, of launcher and engine alike, for what can end it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

CASES = {
    "a missing input": ("raise FileNotFoundError(2, 'No such file or directory', '/nowhere/text')", 3,
                        "error: /nowhere/text: No such file or directory"),
    "a marker that does not verify": ("raise InputsMissing('it is gone')", 3, "error: it is gone"),
    "a folder without permission": ("raise PermissionError(13, 'Permission denied', '/root/x')", 2,
                                    "error: /root/x: Permission denied"),
    "a read-only disk": (f"raise OSError({errno.EROFS}, 'Read-only file system', '/mnt/x')", 2,
                         "error: /mnt/x: Read-only file system"),
    "a full disk": (f"raise OSError({errno.ENOSPC}, 'No space left on device', '/mnt/x')", 74,
                    "error: /mnt/x: No space left on device"),
    "a full disk, in words": ("raise NoRoom('no room for a.bin')", 74, "error: no room for a.bin"),
    "a mistake": ("raise UserError('lr is 0')", 2, "error: lr is 0"),
    "a replaced attempt": ("raise Superseded('7.r0 was replaced')", 1, "superseded: 7.r0 was replaced"),
    "Ctrl-C": ("raise KeyboardInterrupt", 130, "Stopped. Type the same command again: it goes on."),
    "a network disk's error": (f"raise OSError({errno.EIO}, 'Input/output error', '/net/x')", 1,
                               "error: /net/x: Input/output error"),
    "an exit code": ("return 75", 75, ""),
    "nothing": ("return None", 0, ""),
}  # fmt: skip


def run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an entry point with this body."""
    source = (
        "from run_contract.entry_point import run_main\n"
        "from run_contract.errors import InputsMissing, NoRoom, Superseded, UserError\n"
        f"def main():\n    {body}\nrun_main(main)\n"
    )
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("case", CASES)
def test_what_ends_a_command(case: str) -> None:
    """The exit code says whether running again may help, and a user's mistake is one line without a traceback."""
    body, code, words = CASES[case]
    ended = run(body)
    assert (ended.returncode, ended.stderr.strip(), ended.stdout) == (code, words, ""), ended.stderr


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    """Whoever mends the program needs to know where it failed."""
    ended = run("raise ValueError('a bug')")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert ended.stderr.rstrip().endswith("ValueError: a bug")


def test_only_the_first_rank_prints_what_all_ranks_find() -> None:
    """Rank 1 ends with the same code and says nothing; a fault that only it has is printed all the same."""
    assert (run("raise UserError('lr is 0')", RANK="0").stderr, run("raise UserError('lr is 0')", RANK="1").stderr) == (
        "error: lr is 0\n",
        "",
    )
    assert run("raise UserError('lr is 0')", RANK="1").returncode == 2
    assert "a bug" in run("raise ValueError('a bug')", RANK="1").stderr


def test_a_reader_that_has_gone() -> None:
    """As in `jobs/status.py | head -1`: exit code 1 and no word, however much is left to print."""
    source = "from run_contract.entry_point import run_main; run_main(lambda: print('x\\n' * 100000))"
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout
        assert command.stderr
        command.stdout.readline()
        command.stdout.close()
        assert command.stderr.read() == b""
    assert command.returncode == 1
