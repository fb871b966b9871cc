"""The model card tells what a run counted, set and reached, and nothing about this machine."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import yaml

from tests.engine.small_llama import make_config, make_hf, run

SCRIPT = "tools/push_to_hub.py"


BASE = "/secret/hub/models--meta-llama--Llama-2-7b-hf/snapshots/Llama-2-7b-hf"


def make_run(root, base=BASE, **push):
    """A run's folder as far as the card reads it: two shards of two sources, six iterations."""
    training = {"train_iters": 6, "global_batch_size": 4, "seq_length": 8, "lr": 3e-3, "skip_spikes": None}
    recipe = {"model": {"base": base, "family": "llama2"}, "training": training, "push": push}
    recipe |= {
        "dedup": {"num_perm": 64, "threshold": 0.85, "b": None, "ranges": 16, "against": ["/secret/runs/last"]},
        "data": {"path": "/secret/text"},
    }
    (root / "checkpoints").mkdir(parents=True)
    (root / "run.yaml").write_text(yaml.safe_dump({"recipe": recipe, "stage_keys": {}}))
    counts = {
        "prepare": [
            {"documents": 1000, "sources": {"news": {"documents": 1000, "bytes": 5000}}},
            {
                "documents": 600,
                "sources": {"news": {"documents": 200, "bytes": 900}, "web": {"documents": 400, "bytes": 7}},
            },
        ],
        "dedup-components": [{"documents": 1600, "clusters": 37, "corpus": "abc"}],
        "dedup-filter": [
            {"documents": 900, "sources": {"news": 900}},
            {"documents": 500, "sources": {"news": 150, "web": 350}},
        ],
        "merge-tokens": [{"tokens": 123456, "sources": {"news": {"tokens": 123000}, "web": {"tokens": 456}}}],
    }  # fmt: skip
    for stage, tasks in counts.items():
        (root / "markers" / stage).mkdir(parents=True)
        for number, one in enumerate(tasks):
            marker = {"key": "k", "outputs": {}, "counts": one}
            (root / "markers" / stage / f"{number:05d}.json").write_text(json.dumps(marker))
    (root / "checkpoints/hardware.json").write_text('{"device": "NVIDIA H100", "ranks": 8, "torch": "2.13.0"}')
    lines = [{"iteration": n, "lm_loss": 9.0 - n, "tokens_per_second": 0.01} for n in range(1, 7)] + [
        {"iteration": 4, "validation_loss": 5.5}
    ]
    (root / "checkpoints/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def push(tmp_path, *flags):
    """Write a copy with its card; returns exit code, stderr and the card."""
    folder = tmp_path / "iter_0000004"
    if not folder.exists():
        make_hf(folder, make_config())
    code, _, err = run(SCRIPT, folder, "--output_folder", tmp_path / "out", *flags)
    card = tmp_path / "out/README.md"
    return code, err, card.read_text() if card.exists() else ""


def test_a_card_filled_from_the_run(tmp_path):
    """Licence, base model, each source before and after, tokens, dedup, losses, hyper-parameters and the curve."""
    code, err, card = push(tmp_path, "--run_dir", make_run(tmp_path / "run", language="da"), "--license", "llama2")
    assert code == 0, err
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "language": "da",
        "base_model": "meta-llama/Llama-2-7b-hf",
        "license": "llama2",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    for text in (
        "parameters (float32): Llama-2-7b-hf (llama2), continually pre-trained",
        "| news | 1,200 | 1,050 | 5,900 | 123,000 |",
        "| web | 400 | 350 | 7 | 456 |",
        "| all | 1,600 | 1,400 | 5,907 | 123,456 |",
        "removed 200 of 1,600 documents (12.5%)",
        "against last, num_perm 64, threshold 0.85",
        "clusters 37",
        "4 of 6 iterations, 128 tokens seen",
        "Training loss: 8.000 at first, 5.000 at last.",
        "Validation loss: 5.500",
        "| lr | 0.003 |",
        f"with the SnakModel Toolkit {importlib.metadata.version('snakmodel-toolkit')}.",
        "Hardware: 8 x NVIDIA H100, torch 2.13.0.",
        "Time: 3.56 hours of training iterations.",  # 4 iterations of 32 tokens at 0.01 tokens/s
        "![loss curve](loss.png)",
    ):
        assert text in card
    assert "secret" not in card
    assert "None" not in card
    assert str(tmp_path) not in card
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")


def test_too_many_sources_to_tell_apart(tmp_path):
    """Where a stage counted all sources together, in one shard at least, the card has the sums only."""
    marker = make_run(tmp_path / "run") / "markers/dedup-filter/00001.json"
    counts = {"documents": 500, "sources": {"(more than 1000 sources)": 500}}
    marker.write_text(json.dumps({"key": "k", "outputs": {}, "counts": counts}))
    code, err, card = push(tmp_path, "--run_dir", tmp_path / "run", "--license", "llama2")
    assert code == 0, err
    assert "| all | 1,600 | 1,400 | 5,907 | 123,456 |" in card
    assert "| news |" not in card


def test_without_a_run(tmp_path):
    """The card then describes the model alone; there is no curve, and the licence that nobody gave is unknown."""
    code, err, card = push(tmp_path)
    assert code == 0, err
    assert "# iter_0000004" in card
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "unknown"
    assert not (tmp_path / "out/loss.png").exists()


def test_the_licence_of_the_recipe(tmp_path):
    """Without --license the card has the recipe's."""
    root = make_run(tmp_path / "run")
    content = yaml.safe_load((root / "run.yaml").read_text())
    content["recipe"]["push"] = {"license": "apache-2.0"}
    (root / "run.yaml").write_text(yaml.safe_dump(content))
    code, err, card = push(tmp_path, "--run_dir", root)
    assert code == 0, err
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("run.yaml", None, 3),
        ("run.yaml", "recipe: 3\n", 2),
        ("checkpoints/metrics.jsonl", None, 3),
        ("checkpoints/metrics.jsonl", "{", 2),
        ("markers/merge-tokens/00000.json", None, 3),
        ("markers/prepare/00000.json", "{}", 2),
    ],
)
def test_a_run_that_is_not_whole_is_named(tmp_path, name, content, code):
    """A missing or unreadable file of the run is named, and nothing is published."""
    path = make_run(tmp_path / "run") / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    found, err, card = push(tmp_path, "--run_dir", tmp_path / "run")
    assert (found, card) == (code, "")
    assert name.removesuffix("/00000.json") in err
    assert "--run_dir" in err


def test_the_base_model_on_the_hub(tmp_path):
    """The recipe names it where the folder does not tell; a folder's own name is no name on the Hub."""
    for number, (base, given, expected) in enumerate(
        [("/models/Llama", None, None), ("/models/Llama", "meta-llama/Llama", "meta-llama/Llama"), (BASE, "a/b", "a/b")]
    ):
        root = make_run(tmp_path / f"run{number}", base, base_model=given)
        (root / "checkpoints/hardware.json").unlink()  # as older versions leave a run
        code, err, card = push(tmp_path / str(number), "--run_dir", root, "--license", "llama2")
        assert code == 0, err
        assert yaml.safe_load(card.split("---\n")[1]).get("base_model") == expected
        assert "Hardware" not in card
