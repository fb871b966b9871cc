"""The packages as others get them: built into a wheel, installed outside of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from .conftest import PROJECT

PACKAGES = {"run_contract": "run_contract", "snakmodel": "snakmodel", "megatron_llm": "Megatron-LLM/megatron_llm"}
IMPORT_ALL = """
import importlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
names = [".".join(path.relative_to(root).with_suffix("").parts) for path in root.glob("*/**/*.py")]
left_out = ("__main__", "process_pool_preload")  # a command, and what only a pool's server may import
for name in sorted(names):
    if name.split(".")[0] in sys.argv[2:] and name.split(".")[-1] not in left_out:
        module = importlib.import_module(name.removesuffix(".__init__"))
        assert module.__file__.startswith(str(root)), module.__file__
print(len(names))
"""
TOKENISE = """
import sys
from megatron_llm.tokenizer.build import build
print(build("SentencePieceTokenizer", sys.argv[1]).encode(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's packages, built from a copy of the project."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (root / "source").mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, root / "source")
    for folder in PACKAGES.values():
        shutil.copytree(PROJECT / folder, root / "source" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root), str(root / "source")]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = root.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(root / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return root / "site"


def run(installed: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run Python far from the checkout, with the wheel's packages."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=installed, env=environment)


def test_every_module_is_there_and_can_be_imported(installed: Path) -> None:
    """No package was forgotten, and nothing needs the checkout to be imported."""
    done = run(installed, "-c", IMPORT_ALL, str(installed), *PACKAGES)
    assert done.returncode == 0, done.stderr
    there = sum(len(list((PROJECT / folder).rglob("*.py"))) for folder in PACKAGES.values())
    assert int(done.stdout) == there
    assert {path.parent.name for path in installed.glob("*/py.typed")} == set(PACKAGES)


def test_commands_run(installed: Path) -> None:
    """`python -m` works for the commands that are packages."""
    for module in ("snakmodel.dedup", "snakmodel.prepare", "snakmodel.export_text", "megatron_llm.plan"):
        done = run(installed, "-m", module, "--help")
        assert done.returncode == 0, f"{module}: {done.stderr}"
        assert "usage" in done.stdout


def test_a_tokenisation(installed: Path, demo_base: Path) -> None:
    """The installed engine gives SentencePiece's ids."""
    model, text = str(demo_base / "tokenizer.model"), "Der var engang en gåsepige."
    done = run(installed, "-c", TOKENISE, model, text)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == sentencepiece.SentencePieceProcessor(model_file=model).encode(text)
