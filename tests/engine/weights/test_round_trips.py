"""Transformers' own models -> Megatron -> every layout -> merged -> Hugging Face: the same bits and logits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from tests.engine.hf_reference import hf_model
from tests.engine.small_llama import make_config, run

CONVERT = "weights_conversion/hf_to_megatron.py"
RESHARD = "tools/checkpoint_util.py"
EXPORT = "weights_conversion/megatron_to_hf.py"
FALCON = {
    "use_rms_norm": False,
    "glu_activation": None,
    "parallel_attn": True,
    "tie_embed_logits": True,
    "kv_channels": 4,
    "ffn_hidden_size": 128,
}
MODELS = {
    "llama2 gqa": {},
    "llama2 mha": {"num_attention_heads_kv": 8},
    "llama2 tied": {"tie_embed_logits": True},
    "llama2 odd vocabulary": {"vocab_size": 131},
    "codellama theta": {"rope_theta": 1e6},
    "llama2 llama3-rope": {"rope_scaling_type": "llama3", "rope_scaling_factor": 8.0, "vocab_size": 257},
    "mistral window": {"sliding_window_size": 16},
    "falcon 7b": {**FALCON, "num_attention_heads_kv": 1},
    "falcon 40b": {**FALCON, "parallel_layernorm": True},
}


def weights(folder):
    """Every tensor of a Hugging Face folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def succeed(script, *flags):
    """Run a script, which must exit 0."""
    code, out, err = run(script, *flags)
    assert code == 0, out + err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_layout_gives_back_the_model(tmp_path, name, dtype):
    """Over TP 1, 2, 4 x PP 1, 2, as far as TP divides the kv heads, no bit of a weight changes, and no logit."""
    config = make_config(**MODELS[name])
    torch.manual_seed(0)
    hf_model(config).to(dtype).save_pretrained(tmp_path / "base")
    Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate("abcdef")}, merges=[])).save(
        str(tmp_path / "base/tokenizer.json")
    )
    (tmp_path / "base/tokenizer_config.json").write_text('{"eos_token": "f"}')
    family = name.split()[0]
    succeed(CONVERT, family, f"--out={tmp_path / 'megatron'}", f"--model-path={tmp_path / 'base'}")
    base = weights(tmp_path / "base")
    tokens = torch.arange(40).view(1, 40) % 100
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()(tokens).logits
    for tp in (1, 2, 4):
        for pp in (1, 2):
            if config.num_attention_heads_kv % tp:
                continue
            there = tmp_path / f"{tp}-{pp}"
            one, several = (
                ("--target_tensor_parallel_size", t, "--target_pipeline_parallel_size", p, "--model_type", family)
                for t, p in ((1, 1), (tp, pp))
            )
            succeed(RESHARD, *several, "--load_dir", tmp_path / "megatron", "--save_dir", there / "cut")
            assert len(list((there / "cut/release").iterdir())) == tp * pp
            succeed(RESHARD, *one, "--load_dir", there / "cut", "--save_dir", there / "merged")
            flags = (f"--output_dir={there / 'hf'}", "--vocab_file", tmp_path / "base")
            succeed(EXPORT, f"--input_dir={there / 'merged'}", *flags)
            found = weights(there / "hf")
            assert found.keys() == base.keys()
            for key, tensor in base.items():
                assert found[key].dtype == dtype
                assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key
            assert torch.equal(AutoModelForCausalLM.from_pretrained(there / "hf").eval()(tokens).logits, logits)
