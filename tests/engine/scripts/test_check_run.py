"""What the engine would refuse is known before anything runs."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.small_llama import ENGINE, make_config, make_hf, make_tokenizer, run

SCRIPT = "tools/check_run.py"
TRAIN = {
    "--train_iters": 10, "--global_batch_size": 8, "--micro_batch_size": 2, "--seq_length": 16, "--lr": 1e-3,
    "--save": "s", "--load": "l", "--data_path": "d", "--use_checkpoint_args": None, "--model_name": "llama2",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder of a tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    make_hf(folder, make_config())
    return folder


def ask(monkeypatch, base, commands, ranks=2, device="a100"):
    """Exit code, problems and facts."""
    request = {"commands": commands, "base": str(base), "ranks": ranks, "device": device}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    code, out, err = run(SCRIPT)
    assert err == ""
    answer = json.loads(out)
    return code, answer["problems"], answer["facts"]


def train(**changes):
    """finetune.py's command line with some flags changed; None stands for a flag without a value."""
    flags = TRAIN | {f"--{name}": value for name, value in changes.items()}
    words = [word for name, value in flags.items() for word in ([name] if value is None else [name, str(value)])]
    return {"train": ["Megatron-LLM/finetune.py", *words]}


def test_nothing_to_refuse(monkeypatch, base):
    """A sound run has no problems; its size and the GPU's peak are told."""
    config = make_config()
    code, problems, facts = ask(monkeypatch, base, train())
    assert (code, problems) == (0, [])
    matrices = 4 * (32 * 48 * 3 + 32 * 48 * 2 + 32 * 24 * 2) + 420 * 32  # attention 48 and 24 wide, MLP 48
    attention = 2 * config.num_layers * config.num_attention_heads * config.kv_channels * 16
    assert facts == {
        "parameters": matrices + 420 * 32 + 9 * 32,
        "training_flops": 10 * 8 * 3 * 2 * 16 * (matrices + attention),
        "peak_tflops": 312.0,
    }
    assert ask(monkeypatch, base, {}, device="abacus") == (0, [], facts | {"training_flops": 0, "peak_tflops": None})


@pytest.mark.parametrize(
    ("changes", "ranks", "said"),
    [
        ({"micro_batch_size": 3}, 2, "--global_batch_size 8 is not a multiple of 6 (--micro_batch_size 3 x 2"),
        ({"min_lr": 1}, 2, "--min_lr 1.0 and --lr 0.001: --min_lr must be at least 0 and at most --lr"),
        ({"lr": "fast"}, 2, "argument --lr: invalid float value: 'fast'"),
        ({"lrr": 1}, 2, "unrecognized arguments: --lrr 1"),
        ({"seq_length": 128}, 2, "--seq_length 128 is more than the model's max_position_embeddings 64"),
        ({"tensor_model_parallel_size": 3}, 3, "--tensor_model_parallel_size 3 does not divide num_attention_heads 8"),
        ({"pipeline_model_parallel_size": 3}, 3, "--pipeline_model_parallel_size 3 does not divide the model's 4"),
        ({"tensor_model_parallel_size": 4}, 2, "2 ranks are not a multiple of 4"),
        ({"pipeline_model_parallel_size": 2, "micro_batch_size": 8}, 2, "needs at least 2: change --global_batch"),
        ({"lr_warmup_iters": 20}, 2, "the warm-up takes 160 samples and the decay ends at 80"),
        ({"bf16": None, "fp16": None}, 2, "--fp16 and --bf16 exclude each other"),
        (
            {"keep_every": 5},
            2,
            "--keep_every says which checkpoints are kept beside the newest ones; give --keep_last too",
        ),
        ({"split": "most,few"}, 2, "--split most,few: give one to three proportions of the documents"),
    ],
)
def test_a_training_that_would_be_refused(monkeypatch, base, changes, ranks, said):
    """Flags, ranks, batch, schedule and the model's geometry are judged by the engine's own checks."""
    code, problems, facts = ask(monkeypatch, base, train(**changes), ranks)
    assert (code, facts, len(problems)) == (2, {}, 1)
    assert problems[0].startswith("train: ")
    assert said in problems[0]


def test_other_commands(monkeypatch, base, tmp_path):
    """Every script's flags are parsed by itself, and what it would check of model and tokenizer is checked."""
    convert = ["Megatron-LLM/weights_conversion/hf_to_megatron.py", "llama2", "--out=o", f"--model-path={base}"]
    shard = ["Megatron-LLM/tools/checkpoint_util.py", "--load_dir", "l", "--save_dir", "s", "--model_type", "llama2"]
    words = ["--input", "i", "--output_prefix", "o", "--tokenizer_type", "SentencePieceTokenizer"]
    tokenize = ["Megatron-LLM/tools/preprocess_data.py", *words, "--vocab_file"]
    push = ["Megatron-LLM/tools/push_to_hub.py", "m", "--output_folder", "o"]
    vocabulary = str(make_tokenizer(tmp_path))
    sound = {"convert": convert, "shard": shard, "tokenize": [*tokenize, vocabulary, "--no_new_tokens"], "push": push}
    assert ask(monkeypatch, base, sound)[:2] == (0, [])
    wrong = {
        "convert": [*convert, "--size=7"],
        "convert again": [convert[0], "mistral", *convert[2:]],
        "shard": [*shard, "--target_tensor_parallel_size", "8"],
        "tokenize": [*tokenize, vocabulary],
        "tokenize again": [*tokenize, str(tmp_path / "none.model")],
        "merge": [*shard, "--load_iters", "last"],
        "push": [*push, "--max_shard_size", "large"],
        "index": ["Megatron-LLM/tools/build_index.py", "--seq_length", "0", "--train_iters", "1", "--data_path", "d"],
    }
    code, problems, _ = ask(monkeypatch, base, wrong)
    said = {
        "convert": "--size=7 but the model has 0.000 billion parameters",
        "convert again": "is a llama model, not mistral; give llama2",
        "shard": "tensor parallel size 8 does not divide num_attention_heads_kv = 4",
        "tokenize": "makes 425 kinds of tokens, but the model's embedding has only 420",
        "tokenize again": "none.model cannot be read",
        "merge": "argument --load_iters: invalid int value: 'last'",
        "push": "shard size 'large' is not a size",
        "index": "--seq_length 0: must be at least 1",
    }
    assert code == 2
    assert [problem.partition(": ")[0] for problem in problems] == list(wrong)
    for problem, expected in zip(problems, said.values(), strict=True):
        assert expected in problem


def break_config(key, value):
    """Change one key of config.json."""

    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def only(name, content=b"x"):
    """Replace the weights by another file."""

    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return change


def as_bin(**more):
    """The same weights in a pytorch_model.bin, with further tensors."""

    def change(folder):
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors") | more, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (break_config("architectures", ["Qwen2ForCausalLM"]), "architecture Qwen2ForCausalLM is not supported"),
        (break_config("architectures", ["GemmaForCausalLM"]), "architecture GemmaForCausalLM is not supported"),
        (break_config("quantization_config", {"bits": 4}), "quantization_config = {'bits': 4} is not supported"),
        (break_config("hidden_act", "gelu"), "hidden_act = 'gelu' is not supported"),
        (break_config("rope_parameters", {"rope_type": "yarn", "factor": 2}), "rope type 'yarn' is not supported"),
        (break_config("intermediate_size", 64), "has shape (48, 32), but its configuration says (64, 32)"),
        (break_config("num_hidden_layers", 5), "9 tensors are missing, the first is layers.4."),
        (only("model-q4.gguf"), "holds no weights; expected model.safetensors or pytorch_model.bin or an .index.json "
         "beside shards; model-q4.gguf is a GGUF file"),
        (only("llama.pth"), "llama.pth is a PyTorch file in another layout"),
        (only("adapter_model.safetensors"), "adapter_model.safetensors is part of an adapter, not a whole model"),
        (only("model.safetensors", b"\x08\0\0\0\0\0\0\0{}"), "model.safetensors cannot be read"),
        (as_bin(**{"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}), "1 tensors do not belong to this kind"),
    ],
)  # fmt: skip
def test_a_base_model_that_cannot_be_used(monkeypatch, base, tmp_path, change, said):
    """Architecture, format, quantisation, and tensors that config.json does not describe, without reading a weight."""
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    change(folder)
    code, problems, _ = ask(monkeypatch, folder, {})
    assert (code, len(problems)) == (2, 1)
    assert problems[0].startswith(f"model.base: {folder}")
    assert said in problems[0]


def test_weights_in_pickled_files(monkeypatch, base, tmp_path):
    """The shapes in pytorch_model.bin are checked too."""
    shutil.copytree(base, tmp_path / "base")
    as_bin()(tmp_path / "base")
    assert ask(monkeypatch, tmp_path / "base", {})[0] == 0


@pytest.mark.parametrize("text", ["", "[]", '{"commands": {}}'])
def test_a_request_that_is_none(monkeypatch, text):
    """Another program's mistake is named; there is no traceback."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code, out, err = run(SCRIPT)
    assert (code, out) == (2, "")
    assert "standard input is not a request" in err


@pytest.mark.parametrize(
    "script",
    [path for path in sorted(ENGINE.rglob("*.py")) if "def make_parser" in path.read_text(encoding="utf-8")],
    ids=lambda path: path.name,
)
def test_no_script_takes_shortened_flags(script: Path) -> None:
    """A flag that is cut short is refused everywhere, since a later version could read it as another flag."""
    assert not runpy.run_path(str(script))["make_parser"]().allow_abbrev
