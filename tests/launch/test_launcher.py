"""What the launchers say about folders that they cannot write."""

from __future__ import annotations

from pathlib import Path

import pytest

from run_contract.errors import UserError
from snakmodel.launch.launcher import make_writable


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, name: str) -> None:
    """--run-dir that names a file, or something below one, is no matter of permissions."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file: move it away, or give another --run-dir") as caught:
        make_writable(tmp_path / name, "the run's folder", "another --run-dir")
    assert "permissions" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
