"""The chain from raw text to a pushed folder with base models other than Llama 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from snakmodel.config.sections import PROJECT
from tests.engine.hub_server import WRITER, Hub

LINES = [f"Nummer {i} er en lille fin sætning om dag {i * 7} i den {i % 13}. have." for i in range(300)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 1}


def sentencepiece_model(folder: Path) -> int:
    """A Llama-style tokenizer.model; returns its number of pieces."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=331,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return 331


def json_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer.json; returns its number of pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def make_base(folder: Path, kind: str, vocab_size: int) -> None:
    """A tiny random model."""
    torch.manual_seed(0)
    if kind == "falcon":
        settings = {"bias": False, "alibi": False, "parallel_attn": True, "new_decoder_architecture": False}
        model: Any = FalconForCausalLM(FalconConfig(vocab_size=vocab_size, **SIZES, **settings, eos_token_id=0))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(vocab_size=vocab_size, **LLAMA, sliding_window=16))
    else:
        rope = {"rope_type": "default", "rope_theta": 1e6 if kind == "codellama" else 1e4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **LLAMA, rope_parameters=rope))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a tokenizer.model, a base that has it, and a run of the stages before the weights."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("\n".join(LINES) + "\n")
    (folder / "tokenizer").mkdir()
    make_base(folder / "base", "llama2", sentencepiece_model(folder / "tokenizer"))
    done = submit(folder, folder, "llama2", "--until", "index")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def submit(shared: Path, folder: Path, kind: str, *flags: str, **training: Any) -> subprocess.CompletedProcess[str]:
    """Run the chain on this machine, in folder/run, with the base model folder/base."""
    recipe: dict[str, Any] = yaml.safe_load((PROJECT / "recipes" / "demo.yaml").read_text())
    recipe["data"] = {"path": str(shared / "text"), "shards": 1}
    recipe["dedup"]["ranges"] = 1
    recipe["model"] = {"family": kind, "base": str(folder / "base")}
    recipe["tokenizer"]["file"] = str(shared / "tokenizer" / "tokenizer.model")
    if kind == "falcon":
        recipe["tokenizer"].update(type="HuggingFaceTokenizer", file=str(folder / "base" / "tokenizer.json"))
    recipe["training"].update(train_iters=4, save_interval=4, eval_interval=4, eval_iters=1, global_batch_size=4)
    recipe["training"].update(micro_batch_size=2, seq_length=32, lr_warmup_iters=1, split="80,20,0", **training)
    more = folder / "more.yaml"
    recipe |= yaml.safe_load(more.read_text()) if more.exists() else {}
    recipe["export"] = {"verify_batches": 1, **recipe.get("export", {})}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cluster = {"runs": str(folder), "logs": str(folder / "logs"), "stages": {"train": {"ranks_per_node": 2}}}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    files = ["--recipe", str(folder / "recipe.yaml"), "--cluster", str(folder / "cluster.yaml")]
    command = [sys.executable, "jobs/submit_all.py", *files, "--scheduler", "local", "--run-dir", str(folder / "run")]
    return subprocess.run([*command, *flags], cwd=PROJECT, capture_output=True, text=True, timeout=600)


def logs(folder: Path) -> str:
    """The ends of all logs, for a failing test's message."""
    return "".join(path.read_text(errors="replace")[-800:] for path in sorted(folder.glob("logs/*/*/*.out")))


def check(folder: Path, exported: Path, kind: str, iterations: tuple[int, ...] = (4,)) -> None:
    """Both gates passed, and the exported model is of the base's kind, and moved."""
    for report in ("megatron/verify.json", *(f"hf/reports/iter_{number:07d}.json" for number in iterations)):
        found = json.loads((folder / "run" / report).read_text())
        assert found["passed"]
        assert found["max_error"] <= 1e-4
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model) is type(base)
    assert model.config.tie_word_embeddings == base.config.tie_word_embeddings == (kind == "falcon")
    assert getattr(model.config, "sliding_window", None) == (16 if kind == "mistral" else None)
    assert model.config.rope_parameters["rope_theta"] == base.config.rope_parameters["rope_theta"]
    for (name, new), old in zip(model.state_dict().items(), base.state_dict().values(), strict=True):
        assert new.shape == old.shape
        assert not torch.equal(new, old), f"{name} did not move"


@pytest.mark.parametrize("kind", ["mistral", "falcon"])
def test_the_chain_with_another_base(shared: Path, tmp_path: Path, kind: str) -> None:
    """Converted, gated, trained, exported, gated and pushed to a folder; Falcon's embeddings are tied."""
    (tmp_path / "base").mkdir()
    shutil.copytree(shared / "run", tmp_path / "run")
    own_tokenizer = kind == "falcon"
    make_base(tmp_path / "base", kind, json_tokenizer(tmp_path / "base") if own_tokenizer else 331)
    done = submit(shared, tmp_path, kind, "--restart-from", *(["tokenize"] if own_tokenizer else []), "convert")
    assert done.returncode == 0, done.stdout + done.stderr + logs(tmp_path)
    check(tmp_path, tmp_path / "run/pushed/iter_0000004", kind)


def test_codellama_to_the_hub(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every saved iteration is pushed to a Hub: the last to a private repository's main branch, the other as a
    revision; the token is in no file of the run and no log."""
    hub = Hub()
    for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": WRITER, "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (tmp_path / "base").mkdir()
    make_base(tmp_path / "base", "codellama", 331)
    shutil.copytree(shared / "run", tmp_path / "run")
    (tmp_path / "more.yaml").write_text(
        yaml.safe_dump({"export": {"iterations": "all"}, "push": {"repository": "org/model", "license": "llama2"}})
    )
    done = submit(shared, tmp_path, "codellama", "--restart-from", "convert", save_interval=2)
    hub.shutdown()
    hub.server_close()
    assert done.returncode == 0, done.stdout + done.stderr + logs(tmp_path)
    check(tmp_path, tmp_path / "run/hf/iter_0000004", "codellama", (2, 4))
    assert hub.repos["org/model"]["private"] is True
    assert hub.repos["org/model"]["branches"].keys() == {"main", "iter_0000002"}
    for branch, name in (("main", "iter_0000004"), ("iter_0000002", "iter_0000002")):
        files = hub.files("org/model", branch)
        assert files["model.safetensors"] == (tmp_path / "run/hf" / name / "model.safetensors").read_bytes()
        assert b"license: llama2" in files["README.md"]
        assert files["loss.png"].startswith(b"\x89PNG")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if WRITER.encode() in path.read_bytes()]
    assert WRITER not in done.stdout + done.stderr
