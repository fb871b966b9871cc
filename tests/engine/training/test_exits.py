"""A rank whose output fails saves, and ends within seconds with all other ranks and its data-loading processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_llm.process.errors import OutputLost, check_outputs
from megatron_llm.process.signals import Output, StopRequest
from run_contract.errors import UserError
from tests.engine import engine_ranks
from tests.engine.engine_ranks import Ranks
from tests.engine.tiny_run import flags, metrics

LONG = ("--train_iters", 4000, "--num_workers", 2, "--eval_iters", 0)
FULL = "/dev/full"


def full_finetune(argv: Sequence[str]) -> None:
    """The script, all of whose output goes to a full disk on rank 0, as the variable FULL says: `1` or `1 2`."""
    if os.environ["RANK"] == "0":
        for descriptor in os.environ["FULL"].split():
            os.dup2(os.open(FULL, os.O_WRONLY), int(descriptor))
    engine_ranks._finetune(argv)


def unrecorded_finetune(argv: Sequence[str]) -> None:
    """The script, for whose metrics there is no room from the third record on."""
    from megatron_llm.metrics.log import Metrics

    append = Metrics._append

    def full(self: Metrics, record: dict[str, float]) -> None:
        if record["iteration"] >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, record)

    Metrics._append = full  # type: ignore[method-assign]
    engine_ranks._finetune(argv)


def children(pid: int) -> list[int]:
    """The processes that a process has started and that have not ended."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def saved(save: Path) -> int:
    """The iteration that the tracker names."""
    return int((save / "latest_checkpointed_iteration.txt").read_text())


def test_the_logs_reader_has_gone(tmp_path: Path, tiny_data: Path) -> None:
    """As in `finetune.py … 2>&1 | grep -m1 "lm loss"`: saved first, then exit code 1; no data-loading process, all of
    which ignore TERM, keeps the interpreter from ending or outlives it."""
    save = tmp_path / "save"
    command = [sys.executable, str(engine_ranks.FINETUNE), *map(str, flags(tiny_data, save, *LONG))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout
    try:
        assert any(b" iteration        3/" in line for line in process.stdout)
        workers = children(process.pid)
        assert len(workers) == 2
        process.stdout.close()
        assert process.wait(engine_ranks.TIMEOUT) == 1
    finally:
        process.kill()
    assert saved(save) == metrics(save)[-1]["iteration"] >= 3
    until = time.monotonic() + engine_ranks.TIMEOUT
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < until, "a data-loading process outlives its rank"
        time.sleep(0.01)


@pytest.mark.parametrize("outputs", ["1", "1 2"])
def test_a_full_disk_from_the_beginning(tmp_path: Path, tiny_data: Path, outputs: str) -> None:
    """Nothing is trained; the exit code is that of a full disk, heard or not."""
    argv = flags(tiny_data, tmp_path / "save", *LONG)
    ranks = Ranks(tmp_path, argv, 2, {"FULL": outputs}, main=full_finetune)
    assert ranks.wait() == [74, 74], ranks.text()
    assert ("error: stdout cannot be written (No space left on device)" in ranks.text()) is (outputs == "1")
    assert not list((tmp_path / "save").glob("iter_*"))


def test_a_mistake_that_nobody_hears(tmp_path: Path, tiny_data: Path) -> None:
    """The exit code is that of the mistake."""
    argv = flags(tiny_data, tmp_path / "save", *LONG, "--load", "/nonexistent")
    ranks = Ranks(tmp_path, argv, 1, {"FULL": "1 2"}, main=full_finetune)
    assert ranks.wait() == [3]


def test_no_room_for_metrics(tmp_path: Path, tiny_data: Path) -> None:
    """As a failing log: saved, then one line and exit code 74 on all ranks."""
    save = tmp_path / "save"
    ranks = Ranks(tmp_path, flags(tiny_data, save, *LONG), 2, {}, main=unrecorded_finetune)
    assert ranks.wait() == [74, 74], ranks.text()
    (error,) = [line for line in ranks.text().splitlines() if line.startswith("error: ")]
    assert error.startswith(
        "error: the files of metrics cannot be written (No space left on device), so the run ends here; what was "
        "trained is saved. Make room, or let the output go elsewhere"
    )
    assert "Traceback" not in ranks.text()
    assert ranks.text(1) == ""
    assert saved(save) == 3


def test_an_output_fails_once() -> None:
    """The first failure is noted, of whichever output; what is printed afterwards goes nowhere, without an error."""
    request, streams = StopRequest(), [Path(FULL).open("w") for _ in range(2)]  # noqa: SIM115  closed at the end
    outputs = [Output(stream, name, request) for stream, name in zip(streams, ("stdout", "stderr"), strict=True)]
    print("unwritten", file=outputs[0])
    assert request.lost is None
    for output in (*outputs, *outputs):
        print("lost", file=output, flush=True)
    assert request.lost is not None
    assert request.lost[0] == "stdout"
    assert request.lost[1].errno == errno.ENOSPC
    assert outputs[0].fileno() == streams[0].fileno()
    for output in outputs:
        output.close()


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, UserError), (errno.EPIPE, OutputLost), (errno.EIO, OutputLost)]
)
def test_what_is_tried_again(number: int, kind: type[Exception]) -> None:
    """A full disk is the user's to mend; a reader that has gone or a disk that stammers may come back."""
    check_outputs(None)
    lost: Any = ("stdout", OSError(number, os.strerror(number)))
    with pytest.raises(kind, match="stdout cannot be written"):
        check_outputs(lost)
