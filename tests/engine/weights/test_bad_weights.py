"""What the weight scripts answer to files and sizes that do not fit: the reason, and nothing published."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from megatron_llm.weights import hf as hf_weights
from tests.engine.small_llama import Shell, make_config, make_hf, make_state, make_training_checkpoint, run

CONVERT = "weights_conversion/hf_to_megatron.py"
RESHARD = "tools/checkpoint_util.py"
EXPORT = "weights_conversion/megatron_to_hf.py"
PUSH = "tools/push_to_hub.py"
VERIFY = "verify_correctness.py"


@pytest.fixture
def base(tmp_path):
    """A Hugging Face folder in several shards."""
    config = make_config()
    make_hf(tmp_path / "base", config)
    (tmp_path / "base/model.safetensors").unlink()
    hf_weights._write_weights(tmp_path / "base", config, make_state(config), torch.float32, 60_000)
    return tmp_path / "base"


def shard(base):
    return sorted(base.glob("model-*.safetensors"))[1]


def lose_a_shard(base):
    shard(base).unlink()


def forget_a_shard(base):
    path, gone = base / "model.safetensors.index.json", shard(base).name
    index = json.loads(path.read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}
    path.write_text(json.dumps(index))


def truncate_a_shard(base):
    shard(base).write_bytes(shard(base).read_bytes()[:-100])


def cut_a_header(base):
    shard(base).write_bytes(shard(base).read_bytes()[:5])


def another_architecture(base):
    path = base / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "GPTNeoXForCausalLM"))


def hostile_weights(base):
    """The same model as a .bin, in which one entry would run a command."""
    tensors = {name: tensor for path in base.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in (*base.glob("*.safetensors"), base / "model.safetensors.index.json"):
        path.unlink()
    torch.save(tensors | {"x": Shell(f"touch {base / 'it-ran'}")}, base / "pytorch_model.bin")


BROKEN = {
    lose_a_shard: (3, "which is missing (1 of "),
    forget_a_shard: (2, "tensors are missing, the first is "),
    truncate_a_shard: (2, "cannot be read, it may be truncated"),
    cut_a_header: (2, "cannot be read, it may be truncated"),
    another_architecture: (2, "architecture GPTNeoXForCausalLM is not supported; supported are LlamaForCausalLM"),
    hostile_weights: (2, "cannot be read, it may be truncated or hold more than weights"),
}


@pytest.mark.parametrize("script", [CONVERT, RESHARD, PUSH])
@pytest.mark.parametrize("damage", list(BROKEN))
def test_a_damaged_model_is_not_converted(base, tmp_path, damage, script):
    """Every script that reads a Hugging Face folder names what is wrong with it, and writes nothing."""
    damage(base)
    out = tmp_path / "out"
    code, _, err = run(
        script,
        *{
            CONVERT: ("llama2", f"--out={out}", f"--model-path={base}"),
            RESHARD: ("--load_dir", base, "--save_dir", out, "--model_type", "llama2"),
            PUSH: (base, "--output_folder", out),
        }[script],
    )
    expected, message = BROKEN[damage]
    assert (code, message in err) == (expected, True), err
    assert err.startswith("error: ")
    assert str(base) in err
    assert not out.exists()
    assert not (base / "it-ran").exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1), "tensor parallel size 3 does not divide num_attention_heads = 8"),
        ((8, 1), "tensor parallel size 8 does not divide num_attention_heads_kv = 4"),
        ((1, 3), "pipeline parallel size 3 does not divide num_layers = 4"),
        ((0, 1), "tensor parallel size 0 does not divide"),
    ],
)
def test_sizes_that_do_not_divide(base, tmp_path, sizes, message):
    """The size and the model's number that it does not divide are named; nothing is written."""
    target = ("--target_tensor_parallel_size", sizes[0], "--target_pipeline_parallel_size", sizes[1])
    folders = ("--load_dir", base, "--save_dir", tmp_path / "out", "--model_type", "llama2")
    code, _, err = run(RESHARD, *target, *folders)
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_a_wrong_size(base, tmp_path):
    """--size 13 of a model that is much smaller: refused with the true number, before anything is written."""
    code, _, err = run(CONVERT, "llama2", "--size=13", f"--out={tmp_path / 'out'}", f"--model-path={base}")
    assert (code, "--size=13 but the model has 0.000 billion parameters" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def hostile_megatron(folder, base, proof):
    """A converted model whose file would run a command."""
    assert run(CONVERT, "llama2", f"--out={folder}", f"--model-path={base}")[0] == 0
    path = folder / "release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    torch.save(content | {"optimizer": Shell(f"touch {proof}")}, path)


def hostile_checkpoint(folder, _base, proof):
    """A training checkpoint whose .metadata would run a command, with a state.json that agrees with it."""
    config = make_config()
    make_training_checkpoint(folder, 60, config, make_state(config))
    path = folder / "iter_0000060/.metadata"
    path.write_bytes(pickle.dumps(Shell(f"touch {proof}")))
    state = json.loads((path.parent / "state.json").read_text())
    state["files"] = {name: entry for name, entry in state["files"].items() if name != ".metadata"}
    (path.parent / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("make", [hostile_megatron, hostile_checkpoint])
@pytest.mark.parametrize("script", [RESHARD, EXPORT, VERIFY])
def test_a_pickle_that_would_run_code(base, tmp_path, make, script):
    """In a .pt or in a DCP .metadata: every reader refuses it by name; nothing runs, nothing is written."""
    proof, out = tmp_path / "it-ran", tmp_path / "out"
    make(tmp_path / "load", base, proof)
    (tmp_path / "text.txt").write_text("Der var engang en fattig gåsepige.\n" * 9)
    flags = {
        RESHARD: ("--load_dir", tmp_path / "load", "--save_dir", out, "--model_type", "llama2"),
        EXPORT: (f"--input_dir={tmp_path / 'load'}", f"--output_dir={out}", "--vocab_file", base),
        VERIFY: (
            *("--model_name=llama2", "--load", tmp_path / "load", "--huggingface_cache", base, "--report", out),
            *("--input", tmp_path / "text.txt", "--vocab_file", base / "tokenizer.model", "--seq_length", 16),
        ),
    }
    code, _, err = run(script, *flags[script])
    assert code == 2, err
    assert (
        ".pt is not loaded, because it holds more than weights" in err
        or ".metadata does not describe a training checkpoint" in err
    )
    assert not proof.exists()
    assert not out.exists()
