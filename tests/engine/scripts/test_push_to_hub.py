"""Copies are cast, checked and published whole, with a model card. Uploads: test_push_upload.py."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_llm.weights import hf as hf_weights
from tests.engine.small_llama import make_config, make_hf, run

SCRIPT = "tools/push_to_hub.py"
TOKEN = "hf_thisIsNotToBeSeen"


def test_a_copy_cast_to_bf16(tmp_path):
    """--dtype and --max_shard_size give cast tensors in shards, with tokenizer and card; Transformers reads them."""
    state = make_hf(tmp_path / "iter_0000060", make_config())
    flags = ("--output_folder", tmp_path / "pushed", "--dtype", "bf16", "--max_shard_size", "30KB")
    code, out, err = run(SCRIPT, tmp_path / "iter_0000060", *flags)
    assert code == 0, out + err
    shards = sorted((tmp_path / "pushed").glob("model-*.safetensors"))
    assert len(shards) > 1
    tensors = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert all(torch.equal(tensors[hf_weights.hf_name(name)], tensor.bfloat16()) for name, tensor in state.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pushed").dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "pushed")) == 420
    assert "# iter_0000060" in (tmp_path / "pushed/README.md").read_text()
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "pushed").glob("*.json"))


def test_the_same_copy_has_the_same_bytes(tmp_path):
    """Writing again changes no byte, and the copy without a cast has the source's weights."""
    make_hf(tmp_path / "hf", make_config())
    for out in ("a", "b", "b"):
        assert run(SCRIPT, tmp_path / "hf", "--output_folder", tmp_path / out)[0] == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    weights = (tmp_path / "hf/model.safetensors").read_bytes()
    assert (tmp_path / "a/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "flags", [["--auth_token", TOKEN], [f"--auth_token={TOKEN}"], ["--unsafe"], ["--trust_remote_code"]]
)
def test_refused_flags(tmp_path, flags):
    """Flags that would leak a token or run code exit 2 with the reason; nothing is written, no token repeated."""
    make_hf(tmp_path / "hf", make_config())
    code, out, err = run(SCRIPT, tmp_path / "hf", "--output_folder", tmp_path / "out", *flags)
    assert code == 2
    assert "is refused: " in err
    assert TOKEN not in out + err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_rope_scaling(tmp_path, kind):
    """Either kind and its factor land in config.json in both spellings, and Transformers computes with them."""
    make_hf(tmp_path / "hf", make_config())
    flags = ("--output_folder", tmp_path / "out", "--rope_scaling_type", kind, "--rope_scaling_factor")
    code, out, err = run(SCRIPT, tmp_path / "hf", *flags, 2)
    assert code == 0, out + err
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["rope_parameters"] == {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    assert raw["rope_scaling"] == {"rope_type": kind, "type": kind, "factor": 2.0}
    tokens = torch.arange(100).view(1, 100)
    plain, scaled = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits for name in ("hf", "out"))
    assert not torch.allclose(plain, scaled)
    code, _, err = run(SCRIPT, tmp_path / "hf", *flags, 0.5)
    assert (code, "--rope_scaling_factor 0.5: must be at least 1" in err) == (2, True)


def test_mistakes(tmp_path):
    """No destination, the source as destination, a missing model and a missing token file are named."""
    make_hf(tmp_path / "hf", make_config())
    code, _, err = run(SCRIPT, tmp_path / "hf")
    assert (code, "nothing to do" in err) == (2, True)
    code, _, err = run(SCRIPT, tmp_path / "hf", "--output_folder", tmp_path / "hf")
    assert (code, "is the source itself" in err) == (2, True)
    assert run(SCRIPT, tmp_path / "none", "--output_folder", tmp_path / "out")[0] == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    code, _, err = run(SCRIPT, tmp_path / "hf", "--output_folder", tmp_path / "mine")
    assert (code, "mine holds thesis.txt, which is not part of an earlier copy" in err) == (2, True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    flags = ("--hf_repo_name", "org/model", "--token_file", tmp_path / "none")
    code, _, err = run(SCRIPT, tmp_path / "hf", *flags)
    assert (code, "--token_file is a file" in err) == (3, True)
