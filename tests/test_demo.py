"""The whole chain on this machine: what it ends in, and that killing it changes nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from snakmodel.config.sections import PROJECT
from snakmodel.run.markers import Marker
from tests.toy import DEMO_STAGES


def command(folder: Path, base: Path, run: str) -> list[str]:
    """The launcher's command line for a short version of the demonstration, trained by two tensor ranks."""
    recipe = yaml.safe_load((PROJECT / "recipes" / "demo.yaml").read_text())
    recipe["data"] = {"path": "demo/text", "shards": 2}
    recipe["dedup"]["ranges"] = 2
    recipe["model"]["base"], recipe["tokenizer"]["file"] = str(base), str(base / "tokenizer.model")
    recipe["training"].update(
        train_iters=12, save_interval=3, eval_interval=6, eval_iters=1, global_batch_size=8, seq_length=64
    )
    recipe["training"].update(lr_warmup_iters=2, tensor_parallel=2)
    recipe["export"] = {"iterations": [6, 12], "verify_batches": 1}
    cluster = {"runs": str(folder), "logs": str(folder / "logs"), "stages": {"train": {"ranks_per_node": 2}}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    files = ["--recipe", str(folder / "recipe.yaml"), "--cluster", str(folder / "cluster.yaml")]
    return [sys.executable, "jobs/submit_all.py", *files, "--scheduler", "local", "--run-dir", str(folder / run)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def finished(folder: Path, demo_base: Path) -> Path:
    """A run that nobody disturbed."""
    done = subprocess.run(command(folder, demo_base, "whole"), cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "whole"


def contents(run: Path) -> dict[str, bytes]:
    """Every published file whose bytes are promised."""
    names = ("arrow", "dedup/kept", "text", "tokens", "megatron", "sharded", "merged", "hf", "pushed")
    files = [path for name in names for path in sorted((run / name).rglob("*")) if path.is_file()]
    assert not [path for path in files if ".tmp-" in str(path)], "a temporary was left behind"
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_ranks_must_fit_the_recipe(folder: Path, demo_base: Path) -> None:
    """Fewer ranks than the recipe's tensor parallel size are refused before anything is started."""
    argv = command(folder, demo_base, "refused")
    cluster = folder / "cluster.yaml"
    cluster.write_text(cluster.read_text().replace("ranks_per_node: 2", "ranks_per_node: 3"))
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "stages.train has 3 ranks" in done.stderr
    assert not (folder / "refused" / "markers").exists()


def test_export_loads_and_gives_the_engines_logits(finished: Path) -> None:
    """Transformers loads each exported folder, and the gate found its logits within 1e-4 of the engine's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("iter_0000006", "iter_0000012"):
        report = json.loads((finished / "hf" / "reports" / f"{name}.json").read_text())
        assert report["passed"]
        assert report["max_error"] <= 1e-4
        modes = {path.stat().st_mode for path in (finished / "hf" / name).iterdir()}
        assert len(modes) == 1, "some files are for the owner alone"
        model = AutoModelForCausalLM.from_pretrained(finished / "hf" / name)
        tokens = AutoTokenizer.from_pretrained(finished / "hf" / name)("Der var engang", return_tensors="pt")
        with torch.no_grad():
            logits = model(tokens["input_ids"]).logits
        assert logits.shape[-1] == 2000
        assert torch.isfinite(logits).all()


def test_exports_are_of_different_checkpoints_of_a_model_that_learns(finished: Path) -> None:
    """The two exports differ from each other and from the base model, and the training loss fell."""
    weights = [(finished / "hf" / name / "model.safetensors").read_bytes() for name in ("iter_0000006", "iter_0000012")]
    assert weights[0] != weights[1]
    metrics = [json.loads(line) for line in (finished / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    losses = [one["lm_loss"] for one in metrics if "lm_loss" in one]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.1


def test_counts_agree_from_stage_to_stage(finished: Path) -> None:
    """What deduplication kept is what was tokenised and what the text file holds; duplicates were removed."""

    def total(stage: str, name: str) -> int:
        markers = sorted((finished / "markers" / stage).glob("*.json"))
        return sum(int(json.loads(path.read_text())["counts"][name]) for path in markers)

    kept = total("dedup-filter", "documents")
    assert kept < total("prepare", "documents") - 100
    assert total("merge-tokens", "documents") == kept
    assert (finished / "text" / "corpus.jsonl").read_text().count("\n") == kept
    tokens = (finished / "tokens" / "corpus_text_document.bin").stat().st_size // 2
    assert total("merge-tokens", "tokens") == tokens == total("tokenize", "tokens")


def test_summary(finished: Path) -> None:
    """The summary prints documents, tokens, losses, the model's place and a generated sample."""
    done = subprocess.run(
        [sys.executable, "demo/summary.py", str(finished)], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for word in ("before deduplication", "tokens", "training loss", "validation loss", "iter_0000012", "a sample"):
        assert word in done.stdout


def test_the_pushed_card_tells_the_run(finished: Path) -> None:
    """The pushed folder's card has the run's own counts and losses and the curve; nothing of this machine."""
    card = (finished / "pushed" / "iter_0000012" / "README.md").read_text()
    tokens = json.loads((finished / "markers" / "merge-tokens" / "00000.json").read_text())["counts"]["tokens"]
    for text in (f" | {tokens:,} |\n", "12 of 12 iterations", "| tales |", "| seq_length | 64 |", "loss.png"):
        assert text in card
    assert str(finished) not in card
    assert (finished / "pushed" / "iter_0000006" / "loss.png").stat().st_size > 5000
    table = json.loads((finished / "hf" / "reports" / "iter_0000012.divergence.json").read_text())
    assert min(one["mean_absolute_change"] for one in table if "layers" in one["name"]) > 0
    assert (finished / "hf" / "reports" / "iter_0000012.divergence.png").is_file()


def swapped(path: Path, kind: str) -> None:
    """Change a weight file as a faulty transformation would: up and gate, or query and output, change places."""
    import torch
    from safetensors.torch import load_file, save_file

    if kind == "convert":
        content = torch.load(path, weights_only=False)
        layers = content["model"]["language_model"]["transformer"]
        layers["layers.0.mlp.dense_h_to_4h.weight"] = torch.cat(
            layers["layers.0.mlp.dense_h_to_4h.weight"].chunk(2)[::-1]
        )
        torch.save(content, path)
    else:
        tensors = load_file(path)
        up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
        save_file(tensors | {up: tensors[gate].clone(), gate: tensors[up].clone()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("stage", "index", "file", "outputs", "gate", "after", "published"),
    [
        (
            *("convert", 0, "megatron/release/mp_rank_00/model_optim_rng.pt"),
            *(["megatron/release", "megatron/latest_checkpointed_iteration.txt"], "verify", "shard", "sharded"),
        ),
        (
            *("export-hf", 1, "hf/iter_0000012/model.safetensors"),
            *(["hf/iter_0000012"], "verify-export", "push", "pushed/iter_0000012"),
        ),
    ],
)
def test_a_failing_gate_stops_the_chain(
    folder: Path,
    demo_base: Path,
    finished: Path,
    stage: str,
    index: int,
    file: str,
    outputs: list[str],
    gate: str,
    after: str,
    published: str,
) -> None:
    """Weights that a stage left wrong, with a marker that verifies: the gate fails, and what follows never starts."""
    run = folder / f"wrong-{stage}"
    shutil.copytree(finished, run)
    swapped(run / file, stage)
    marker = run / "markers" / stage / f"{index:05d}.json"
    Marker.of(run, Marker.read(marker).key, outputs).write(marker)  # type: ignore[union-attr]
    for name in (gate, after):
        (run / "markers" / name / f"{index:05d}.json").unlink()
    shutil.rmtree(run / published)
    argv = [*command(folder, demo_base, run.name), "--only", gate, after]
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0, done.stdout
    log = "".join(path.read_text() for path in (folder / "logs" / run.name / gate).rglob("*.out"))
    assert "FAILED: the logits differ" in log
    assert "differ from here on: layer 0" in log
    assert not (run / "markers" / after / f"{index:05d}.json").exists()
    assert not (run / published).exists()


def kill_at(stage: str, argv: list[str], run: Path) -> bool:
    """Start the launcher and kill it, and with it everything, shortly after it started `stage`.

    False: it was faster.
    """
    events = run / "events.jsonl"
    seen = events.stat().st_size if events.exists() else 0
    process = subprocess.Popen(argv, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted = f'"stage": "{stage}", "event": "start"'
    while process.poll() is None:
        if events.exists() and wanted in events.read_text()[seen:]:
            time.sleep(random.uniform(0, 12 if stage == "train" else 2))
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(0.02)
    return False


def test_killed_anywhere_ends_in_the_same_bytes(folder: Path, demo_base: Path, finished: Path) -> None:
    """Killed with SIGKILL in three random stages and twice in training, then run to the end: the same bytes."""
    seed = int.from_bytes(os.urandom(4), "little")
    random.seed(seed)
    others = [stage for stage in DEMO_STAGES if stage != "train"]
    stages = sorted([*random.sample(others, 3), "train", "train"], key=DEMO_STAGES.index)
    argv = command(folder, demo_base, "killed")
    kills = [kill_at(stage, argv, folder / "killed") for stage in stages]
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    story = f"seed {seed}, killed at {list(zip(stages, kills, strict=True))}"
    assert done.returncode == 0, f"{story}\n{done.stdout}\n{done.stderr}"
    assert any(kills), story
    expected, found = contents(finished), contents(folder / "killed")
    assert sorted(found) == sorted(expected), story
    assert [name for name in expected if found[name] != expected[name]] == [], story


def test_uniform_text_gets_a_smaller_vocabulary(tmp_path: Path) -> None:
    """Where the text has too few different parts, the tokenizer has as many pieces as it gives."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("ja ja ja nej\n" * 300)
    spec = importlib.util.spec_from_file_location("base_model", PROJECT / "demo" / "base_model.py")
    assert spec
    assert spec.loader
    base_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base_model)
    size = base_model.train_tokenizer([tmp_path / "text" / "a.txt"], tmp_path / "tokenizer")
    assert 256 < size < base_model.VOCAB_SIZE
    import sentencepiece

    assert sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).get_piece_size() == size
