"""Meta's own files: every way they are cut, their rotary layout, and folders that do not fit together."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_llm.model.llama import Llama
from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import megatron
from megatron_llm.weights import meta as meta_weights
from run_contract.errors import InputsMissing, UserError
from tests.engine.small_llama import make_config, make_state, make_tokenizer, run, same

ROWS = ("wq", "wk", "wv", "w1", "w3", "output")


def pairs(weight, size):
    """Rows of every head as Meta has them: the two halves' rows in turn."""
    heads = weight.reshape(-1, 2, size // 2, weight.shape[1])
    return torch.stack([heads[:, 0], heads[:, 1]], dim=2).reshape(weight.shape)


def make_meta(folder, config, state, shards, embedding_axis=1, **params):
    """A folder in Meta's layout, cut over so many files."""
    folder.mkdir()
    for number in range(shards):
        part = {"rope.freqs": torch.ones(3)}
        for name, whole in state.items():
            theirs = meta_weights.meta_name(name)
            tensor = pairs(whole, config.kv_channels) if name.endswith(("wq.weight", "wk.weight")) else whole
            if tensor.dim() > 1:
                stem = theirs.split(".")[-2]
                axis = embedding_axis if stem == "tok_embeddings" else 0 if stem in ROWS else 1
                tensor = tensor.chunk(shards, axis)[number].clone()
            part[theirs] = tensor
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    values = {"dim": config.hidden_size, "n_layers": config.num_layers, "n_heads": config.num_attention_heads}
    values |= {"n_kv_heads": config.num_attention_heads_kv, "norm_eps": config.layernorm_epsilon, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(values | {"multiple_of": 256} | params))


def meta_config(**changes):
    """A geometry that params.json can say: its heads fill the hidden size."""
    return make_config(**({"kv_channels": 4, "max_position_embeddings": 4096} | changes))


@pytest.mark.parametrize(("shards", "axis"), [(1, 1), (2, 1), (4, 1), (4, 0)])
def test_every_cut_gives_the_same_tensors(tmp_path, shards, axis):
    """One, two and four files, the embedding cut by columns (Llama 1 and 2) or rows (Llama 3); geometry and bits."""
    config = meta_config(rope_theta=5e5, layernorm_epsilon=1e-6)
    state = make_state(config, torch.bfloat16)
    make_meta(tmp_path / "meta", config, state, shards, axis, rope_theta=5e5)
    found_config, found = meta_weights.load(tmp_path / "meta", "llama2")
    assert found_config == config
    assert same(found, state)


def test_the_rotary_layout_is_metas(tmp_path):
    """Scores by Meta's formula (complex pairs of rows) on Meta's rows equal those by two halves on our rows."""
    config = meta_config()
    make_meta(tmp_path / "meta", config, make_state(config), 2)
    meta = [torch.load(tmp_path / f"meta/consolidated.{n:02d}.pth") for n in (0, 1)]
    _, ours = meta_weights.load(tmp_path / "meta", "llama2")
    x = torch.randn(1, 12, config.hidden_size)
    frequencies = 10000.0 ** (-torch.arange(0, 4, 2).float() / 4)
    turns = torch.polar(torch.ones(12, 2), torch.outer(torch.arange(12).float(), frequencies))

    def theirs(name):
        weight = torch.cat([shard[f"layers.0.attention.{name}.weight"] for shard in meta])
        heads = (x @ weight.T).view(1, 12, -1, 4)
        turned = torch.view_as_complex(heads.reshape(*heads.shape[:3], 2, 2)) * turns[:, None]
        return torch.view_as_real(turned).flatten(3).transpose(1, 2)

    def mine(name):
        heads = (x @ ours[f"layers.0.attention.{name}.weight"].T).view(1, 12, -1, 4).transpose(1, 2)
        first, second = heads.chunk(2, -1)
        return torch.cat([first * turns.real - second * turns.imag, second * turns.real + first * turns.imag], -1)

    scores = [turned("wq") @ turned("wk").repeat_interleave(2, 1).transpose(2, 3) for turned in (theirs, mine)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-3)


def test_as_a_command(tmp_path):
    """hf_to_megatron takes the folder, copies the tokenizer (also from one folder up) and checks --size."""
    config = meta_config()
    state = make_state(config)
    make_meta(tmp_path / "meta", config, state, 2)
    make_tokenizer(tmp_path)
    flags = ("llama2", f"--out={tmp_path / 'out'}", f"--model-path={tmp_path / 'meta'}")
    code, _, err = run("weights_conversion/hf_to_megatron.py", *flags)
    assert code == 0, err
    found_config, found, _ = megatron.load(tmp_path / "out")
    assert found_config == config
    assert same(found, state)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()
    code, _, err = run("weights_conversion/hf_to_megatron.py", *flags, "--size=7")
    assert (code, "--size=7 but the model has 0.000 billion" in err) == (2, True)


def test_a_tied_model(tmp_path):
    """Without output.weight the embedding is the output layer."""
    config = meta_config(tie_embed_logits=True)
    state = make_state(config)
    make_meta(tmp_path / "meta", config, state, 1)
    found_config, found = meta_weights.load(tmp_path / "meta", "llama2")
    assert found_config == config
    assert same(found, state)


def test_folders_that_do_not_fit_together(tmp_path):
    """A missing file, a truncated one, a hostile one and other parameters are each named."""
    config = meta_config()
    folder = tmp_path / "meta"
    make_meta(folder, config, make_state(config), 4)
    last = folder / "consolidated.03.pth"
    whole = last.read_bytes()
    last.write_bytes(whole[:-2000])
    with pytest.raises(UserError, match=r"consolidated.03.pth cannot be read"):
        meta_weights.load(folder, "llama2")
    torch.save({"x": print}, last)
    with pytest.raises(UserError, match=r"consolidated.03.pth cannot be read, it may be truncated or hold more than"):
        meta_weights.load(folder, "llama2")
    last.unlink()
    with pytest.raises(UserError, match=r"the 3 parts of .* do not make .*; check that no consolidated"):
        meta_weights.load(folder, "llama2")
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(
        InputsMissing, match=r"consolidated.01.pth is missing, and the next file is consolidated.02.pth"
    ):
        meta_weights.load(folder, "llama2")
    (folder / "consolidated.02.pth").unlink()
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(InputsMissing, match=r"no consolidated"):
        meta_weights.load(folder, "llama2")


@pytest.mark.parametrize(("dim", "layers", "factor"), [(4096, 32, 8.0), (3072, 28, 32.0)])
def test_scaled_rotary_embeddings_of_the_published_models(dim, layers, factor):
    """Llama 3.1's 8B and Llama 3.2's 3B are told apart by their sizes, since params.json has no factor."""
    params = {"dim": dim, "n_layers": layers, "use_scaled_rope": True}
    assert meta_weights._rope_scaling(params, Path("x"), None) == {
        "rope_scaling_type": "llama3",
        "rope_scaling_factor": factor,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_original_max_positions": 8192,
    }


def test_scaled_rotary_embeddings_of_another_size(tmp_path):
    """Without a factor they are refused with the flag that helps; with it, or one in params.json, the model has it,
    and its logits are those of Transformers' Llama of the same settings."""
    config = meta_config(max_position_embeddings=131072, rope_scaling_type="llama3", rope_scaling_factor=32.0)
    state = make_state(config)
    make_meta(tmp_path / "meta", config, state, 1, use_scaled_rope=True)
    flags = ("llama2", f"--out={tmp_path / 'out'}", f"--model-path={tmp_path / 'meta'}")
    code, _, err = run("weights_conversion/hf_to_megatron.py", *flags)
    assert (code, "give --rope_scaling_factor 8 (as in Llama 3.1 and 3.3) or 32" in err) == (2, True)
    assert not (tmp_path / "out").exists()
    code, _, err = run("weights_conversion/hf_to_megatron.py", *flags, "--rope_scaling_factor", 32)
    assert code == 0, err
    found_config, found, _ = megatron.load(tmp_path / "out")
    assert found_config == config
    assert same(found, state)
    tokens = torch.arange(40).view(1, 40)
    vocab_file = make_tokenizer(tmp_path / "tok")
    hf_weights.save(tmp_path / "hf", found_config, found, dtype=torch.float32, vocab_file=vocab_file)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.config.rope_parameters["factor"] == 32.0
    ours = Llama(found_config)
    ours.load_state_dict(dict(found))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    make_meta(tmp_path / "said", config, state, 1, use_scaled_rope=True, rope_scaling_factor=32)
    assert meta_weights.load(tmp_path / "said", "llama2")[0] == config
    make_meta(tmp_path / "plain", config, state, 1)
    with pytest.raises(UserError, match="has no use_scaled_rope"):
        meta_weights.load(tmp_path / "plain", "llama2", 8.0)


def test_an_output_layer_that_is_a_copy_of_the_embedding_is_tied(tmp_path):
    """Llama 3.2's file has output.weight, equal to the embedding: the model is tied all the same; else it is not."""
    config = meta_config()
    state = make_state(config)
    make_meta(tmp_path / "copy", config, {**state, "lm_head.weight": state["embedding.weight"]}, 1)
    found_config, found = meta_weights.load(tmp_path / "copy", "llama2")
    assert found_config.tie_embed_logits
    assert same(found, {name: tensor for name, tensor in state.items() if name != "lm_head.weight"})
    make_meta(tmp_path / "own", config, state, 1)
    assert not meta_weights.load(tmp_path / "own", "llama2")[0].tie_embed_logits


def test_llama_3s_tokenizer_is_copied_as_it_is(tmp_path):
    """Its tokenizer.model is no SentencePiece model: it is copied, checked by its size, and refused for an export."""
    config = meta_config()
    make_meta(tmp_path / "meta", config, make_state(config), 1)
    path = tmp_path / "meta/tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(bytes([n])) + f" {n}\n".encode() for n in range(256)))
    flags = ("llama2", f"--out={tmp_path / 'out'}", f"--model-path={tmp_path / 'meta'}")
    code, _, err = run("weights_conversion/hf_to_megatron.py", *flags)
    assert code == 0, err
    assert (tmp_path / "out/tokenizer.model").read_bytes() == path.read_bytes()
    where = (f"--input_dir={tmp_path / 'out'}", f"--output_dir={tmp_path / 'hf'}", "--vocab_file", path)
    code, _, err = run("weights_conversion/megatron_to_hf.py", *where)
    assert (code, "is Llama 3's, not a SentencePiece model; give the tokenizer.json" in err) == (2, True)
    assert not (tmp_path / "hf").exists()
    path.write_bytes(path.read_bytes() * 2)
    code, _, err = run("weights_conversion/hf_to_megatron.py", "llama2", f"--out={tmp_path / 'b'}", flags[2])
    assert (code, "512 pieces but the model's vocabulary is 420" in err) == (2, True)
