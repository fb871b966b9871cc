"""Falcon: 7B's and 40B's variants between Hugging Face and Megatron, and folders without a SentencePiece tokenizer."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import megatron
from run_contract.errors import UserError
from tests.engine.small_llama import run

VARIANTS = {
    "7b": {"multi_query": True, "new_decoder_architecture": False},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "11b": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
}


def make_falcon(folder, variant, **changes):
    """A tiny random Falcon in bf16 with a tokenizer.json; returns the model."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    settings = {"bias": False, "alibi": False, "parallel_attn": True, "bos_token_id": 11, "eos_token_id": 11}
    model = FalconForCausalLM(FalconConfig(**sizes, **settings, **VARIANTS[variant], **changes))
    for name, tensor in model.named_parameters():
        torch.nn.init.normal_(tensor, mean=1.0 if "ln" in name or "layernorm" in name else 0.0, std=0.3)
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate("abcdefghijkl")}, merges=[])).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "l"}')
    return model


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_heads_are_told_apart_as_transformers_does(tmp_path, variant):
    """The canonical q, k and v of a hidden state are what Transformers' own splitting of the fused tensor gives."""
    model = make_falcon(tmp_path, variant).float()
    config, state = hf_weights.load(tmp_path)
    assert config.parallel_layernorm == (variant == "40b")
    assert config.num_attention_heads_kv == (1 if variant == "7b" else 2)
    attention = model.transformer.h[1].self_attention
    x = torch.randn(1, 5, 32)
    theirs = attention._split_heads(attention.query_key_value(x))
    for name, heads in zip(("wq", "wk", "wv"), theirs, strict=True):
        ours = (x @ state[f"layers.1.attention.{name}.weight"].float().T).view(1, 5, -1, 8)
        repeated = ours.repeat_interleave(heads.shape[2] // ours.shape[2], 2)
        torch.testing.assert_close(heads, repeated)


@pytest.mark.parametrize(("variant", "tp", "pp"), [("7b", 1, 2), ("40b", 2, 2), ("11b", 2, 1)])
def test_round_trip(tmp_path, variant, tp, pp):
    """HF -> Megatron -> TP x PP -> HF gives every bit and equal logits, and copies the tokenizer."""
    model = make_falcon(tmp_path / "base", variant)
    convert = ("falcon", f"--out={tmp_path / 'megatron'}", f"--model-path={tmp_path / 'base'}")
    code, _, err = run("weights_conversion/hf_to_megatron.py", *convert)
    assert code == 0, err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "megatron" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    sizes = ("--target_tensor_parallel_size", tp, "--target_pipeline_parallel_size", pp)
    shard = (*sizes, "--load_dir", tmp_path / "megatron", "--save_dir", tmp_path / "cut", "--model_type", "falcon")
    code, _, err = run("tools/checkpoint_util.py", *shard)
    assert code == 0, err
    rank = f"mp_rank_{tp - 1:02d}" + (f"_{pp - 1:03d}" if pp > 1 else "")
    content = megatron.read_file(tmp_path / "cut/release" / rank / "model_optim_rng.pt")
    names = set(content["model"]["language_model"]["encoder"])
    assert {"layers.0.input_layernorm.bias", "final_layernorm.bias"} <= names
    assert ("layers.0.mlp_layernorm.weight" in names) == (variant == "40b")
    assert "layers.0.post_attention_layernorm.weight" not in names
    assert ("word_embeddings_for_head" in content["model"]) == (pp > 1)
    assert (content["args"].glu_activation, content["args"].parallel_attn) == (None, True)
    where = (f"--input_dir={tmp_path / 'cut'}", f"--output_dir={tmp_path / 'hf'}", f"--vocab_file={tmp_path / 'base'}")
    code, _, err = run("weights_conversion/megatron_to_hf.py", *where)
    assert code == 0, err
    back, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(notes.values())
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    tokens = torch.arange(20).view(1, 20)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(back.eval()(tokens).logits, base.eval()(tokens).logits)
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 11


@pytest.mark.parametrize("changes", [{"alibi": True}, {"bias": True}, {"parallel_attn": False}])
def test_variants_that_are_not_supported(tmp_path, changes):
    """ALiBi, biases and sequential attention are refused by name."""
    make_falcon(tmp_path, "7b")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (name,) = changes
    with pytest.raises(UserError, match=rf"config.json: {name} = .* is not supported; it must be"):
        hf_weights.load(tmp_path)


def test_one_kv_head_is_not_split(tmp_path):
    """Falcon 7B's single key/value head cannot be cut over two tensor ranks."""
    make_falcon(tmp_path / "base", "7b")
    sizes = ("--target_tensor_parallel_size", 2, "--target_pipeline_parallel_size", 1)
    shard = (*sizes, "--load_dir", tmp_path / "base", "--save_dir", tmp_path / "cut", "--model_type", "falcon")
    code, _, err = run("tools/checkpoint_util.py", *shard)
    assert (code, "tensor parallel size 2 does not divide num_attention_heads_kv = 1" in err) == (2, True)
