"""Hugging Face folders: read what Transformers writes, write what Transformers and sentencepiece agree with."""

from __future__ import annotations

import json

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from megatron_llm.tokenizer import files as tokenizer_files
from megatron_llm.tokenizer import hf_export
from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import hf_config
from run_contract.errors import InputsMissing, UserError
from tests.engine.small_llama import LINES, VOCAB, make_config, make_hf, make_state, make_tokenizer, same


def reference(folder, **changes):
    """A folder written by Transformers itself; returns its state dict."""
    values = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }
    model = LlamaForCausalLM(LlamaConfig(**(values | changes)))
    model.save_pretrained(folder, max_shard_size="20KB" if changes.get("num_hidden_layers", 2) > 2 else "1GB")
    return model.state_dict()


def edit(folder, **changes):
    """Change keys of a folder's config.json; None removes a key."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.mark.parametrize(("layers", "tied"), [(2, False), (3, False), (2, True)])
def test_reads_what_transformers_writes(tmp_path, layers, tied):
    """One file or shards with an index, tied or not: every tensor arrives under its canonical name."""
    theirs = reference(tmp_path, num_hidden_layers=layers, tie_word_embeddings=tied)
    assert (tmp_path / "model.safetensors.index.json").exists() == (layers == 3)
    config, state = hf_weights.load(tmp_path)
    assert (config.num_layers, config.num_attention_heads_kv, config.kv_channels) == (layers, 2, 8)
    assert (config.layernorm_epsilon, config.tie_embed_logits, config.rope_theta) == (1e-6, tied, 10000.0)
    for name, tensor in state.items():
        assert torch.equal(tensor, theirs[hf_weights.hf_name(name)])
    assert ("lm_head.weight" in state) != tied
    assert torch.equal(state["layers.1.mlp.w3.weight"], theirs["model.layers.1.mlp.up_proj.weight"])


def test_reads_pickled_weights_without_running_them(tmp_path):
    """pytorch_model.bin shards with an index are read; a hostile one is refused."""
    theirs = reference(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = list(theirs)
    parts = {"pytorch_model-1.bin": names[:5], "pytorch_model-2.bin": names[5:]}
    for file, members in parts.items():
        torch.save({name: theirs[name] for name in members}, tmp_path / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    _, state = hf_weights.load(tmp_path)
    assert torch.equal(state["final_layernorm.weight"], theirs["model.norm.weight"])
    torch.save({"x": print}, tmp_path / "pytorch_model-2.bin")
    with pytest.raises(UserError, match=r"pytorch_model-2.bin cannot be read"):
        hf_weights.load(tmp_path)


def test_both_spellings_of_the_rotary_settings(tmp_path):
    """Transformers 5's rope_parameters and 4's rope_theta and rope_scaling give the same geometry."""
    reference(tmp_path)
    edit(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0})
    new = hf_config.load(tmp_path)
    assert (new.rope_theta, new.rope_scaling_factor) == (500.0, 2.0)
    edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert hf_config.load(tmp_path) == new
    edit(tmp_path, rope_scaling=None)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"rope_scaling": {', '"unused": {'))
    assert hf_config.load(tmp_path).rope_scaling_factor == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["OPTForCausalLM"]}, "architecture OPTForCausalLM is not supported; supported are Llama"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks the key 'low_freq_factor'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 8.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 8.0}}, "rope type 'yarn'"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"hidden_size": None}, "lacks the key 'hidden_size'"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"num_hidden_layers": 3}, r"9 tensors are missing, the first is layers.2.attention.wk.weight"),
        ({"num_hidden_layers": 1}, "9 tensors do not belong"),
        ({"vocab_size": 100}, r"embedding.weight has shape \(99, 32\), but its configuration says \(100, 32\)"),
    ],
)
def test_models_that_do_not_fit_are_refused(tmp_path, changes, message):
    """Another architecture, rotary type or geometry is named in the message."""
    reference(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        hf_weights.load(tmp_path)


def test_reads_a_mistral_that_transformers_wrote(tmp_path):
    """A Mistral folder gives the window and every tensor; without a window it is a plain Llama geometry."""
    for window in (16, None):
        settings = {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "sliding_window": window,
        }
        sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
        model = MistralForCausalLM(MistralConfig(**settings, **sizes))
        model.save_pretrained(tmp_path / str(window))
        config, state = hf_weights.load(tmp_path / str(window))
        assert config.sliding_window_size == window
        theirs = model.state_dict()
        assert all(torch.equal(tensor, theirs[hf_weights.hf_name(name)]) for name, tensor in state.items())


def test_an_index_that_forgets_a_shard(tmp_path):
    """Tensors of a shard that the index does not name are missing, and the first of them is named."""
    reference(tmp_path, num_hidden_layers=3)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    gone = index["weight_map"]["model.layers.2.self_attn.q_proj.weight"]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"tensors are missing, the first is .*weight"):
        hf_weights.load(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    """No folder, no weights, an absent shard and a cut-off file each say which."""
    with pytest.raises(InputsMissing, match=r"config.json is missing"):
        hf_weights.load(tmp_path / "nowhere")
    reference(tmp_path, num_hidden_layers=3)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"{shards[1].name} cannot be read"):
        hf_weights.load(tmp_path)
    shards[1].unlink()
    with pytest.raises(InputsMissing, match=f"names {shards[1].name}, which is missing"):
        hf_weights.load(tmp_path)
    for path in tmp_path.glob("model*"):
        path.unlink()
    with pytest.raises(InputsMissing, match="holds no weights"):
        hf_weights.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embed_logits": True},
        {"rope_theta": 5e5, "rope_scaling_factor": 4.0},
        {
            "rope_theta": 5e5,
            "rope_scaling_factor": 8.0,
            "rope_scaling_type": "llama3",
            "rope_original_max_positions": 32,
        },
        {"sliding_window_size": 16},
    ],
)
def test_transformers_reads_what_is_written(tmp_path, changes, dtype):
    """AutoConfig, AutoModelForCausalLM and GenerationConfig find the geometry, the dtype and every tensor."""
    config = make_config(**changes)
    state = make_hf(tmp_path / "hf", config, dtype)
    theirs = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (theirs.vocab_size, theirs.head_dim, theirs.num_key_value_heads) == (VOCAB, 6, 4)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters.get("factor", 1.0) == config.rope_scaling_factor
    assert getattr(theirs, "sliding_window", None) == config.sliding_window_size
    assert (theirs.model_type == "mistral") == (config.sliding_window_size is not None)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.dtype) == (1, 2, dtype)
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == 2
    model, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(notes.values())
    tensors = model.state_dict()
    assert all(torch.equal(tensors[hf_weights.hf_name(name)], tensor) for name, tensor in state.items())
    found_config, found = hf_weights.load(tmp_path / "hf")
    assert found_config == config
    assert same(found, state)


def test_shards_keep_to_the_maximum_size(tmp_path):
    """Each shard's tensors stay within the limit, the index names every tensor, and Transformers reads them."""
    config = make_config()
    state = make_state(config)
    folder = tmp_path / "hf"
    vocab_file = make_tokenizer(tmp_path)
    hf_weights.save(folder, config, state, dtype=torch.float32, vocab_file=vocab_file, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 63_000 for path in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == len(state)
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in state.values())
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(theirs[hf_weights.hf_name(name)], tensor) for name, tensor in state.items())
    assert same(hf_weights.load(folder)[1], state)


def test_sizes_are_decimal_as_on_the_hub():
    """2GB is 2e9 bytes, 2GiB is 2 * 2**30; nonsense is refused."""
    assert [hf_weights.parse_size(text) for text in ("2GB", "1.5 MB", "2GiB", "700")] == [
        2 * 10**9,
        1500000,
        2**31,
        700,
    ]
    for text in ("lots", "0GB", "-1GB"):
        with pytest.raises(UserError, match="is not a size"):
            hf_weights.parse_size(text)


AWKWARD = (
    *LINES,
    *(
        " ",
        "  ",
        "   indrykket",
        "slut  ",
        "a\tb\nc\r\n",
        "\n\n",
        "\u2581under\u2581streg",
        "x" * 300,
        "ÆØÅ æøå é e\u0301",
    ),
    *(
        "👩‍👩‍👧 🇩🇰",
        "日本語",
        "\x00\x01\x7f\u0085\u2028",
        "\ufeff\u00a0\u3000",
        "1234567890",
        "<0x0A>",
        "< s >",
        "[INST]",
    ),
)


def test_auto_tokenizer_gives_sentencepieces_ids(tmp_path):
    """The exported ids equal sentencepiece's (after <s>) on Danish, emoji, spaces and controls, and decode back."""
    make_hf(tmp_path / "hf", make_config())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "hf/tokenizer.model"))
    for text in AWKWARD:
        assert theirs(text)["input_ids"] == [1, *ours.encode(text)], repr(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), repr(text)
    assert theirs("hej").keys() == {"input_ids", "attention_mask"}
    for text in LINES:
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (VOCAB, 1, 2, 0)


def test_the_known_difference_is_only_control_text(tmp_path):
    """The literal text of a control piece becomes that token in Hugging Face and stays text in sentencepiece."""
    make_hf(tmp_path / "hf", make_config())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "hf/tokenizer.model"))
    for literal, number in (("<unk>", 0), ("<s>", 1), ("</s>", 2)):
        assert number in theirs(f"en {literal} to", add_special_tokens=False)["input_ids"]
        assert number not in ours.encode(f"en {literal} to")


@pytest.mark.parametrize(
    ("changes", "options", "name"),
    [
        ({}, {}, "PreTrainedTokenizerFast"),
        ({}, {"add_dummy_prefix": False}, "LlamaTokenizer"),
        ({"sliding_window_size": 16}, {}, "LlamaTokenizer"),
    ],
)
def test_the_tokenizers_class_is_the_one_that_gives_the_right_ids(tmp_path, capsys, changes, options, name):
    """LlamaTokenizer where Transformers loads it with sentencepiece's ids, also of leading spaces; else the class that
    takes tokenizer.json as it is. Either way add_bos_token is explicit, and the choice is said."""
    settings = {"vocab_size": VOCAB, "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
    vocab_file = train(tmp_path / "tok", model_type="bpe", **(settings | options))
    config = make_config(**changes)
    hf_weights.save(tmp_path / "hf", config, make_state(config), dtype=torch.float32, vocab_file=vocab_file)
    written = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert (written["tokenizer_class"], written["add_bos_token"], written["add_eos_token"]) == (name, True, False)
    said = capsys.readouterr().out
    assert f"tokenizer class {name}: the ids of tokenizer.model" in said
    assert ("tokenizer class LlamaTokenizer: different ids on '  to mellemrum" in said) == (name != "LlamaTokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
    for text in AWKWARD:
        assert theirs(text)["input_ids"] == [1, *ours.encode(text)], repr(text)
    for text in LINES:
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)), repr(text)


def train(folder, **options):
    """A tokenizer with other settings than Llama's."""
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3),
        model_prefix=str(folder / "tokenizer"),
        num_threads=1,
        minloglevel=2,
        **({"vocab_size": 130} | options),
    )
    return folder / "tokenizer.model"


def test_other_settings_are_matched_or_refused(tmp_path):
    """NFKC with collapsed spaces gives the same ids too; a Unigram model is refused."""
    collapsing = train(tmp_path / "bpe", model_type="bpe", normalization_rule_name="nmt_nfkc")
    hf_export.save(tmp_path / "bpe", _copy(collapsing), 512)
    unigram = train(tmp_path / "unigram", model_type="unigram")
    with pytest.raises(UserError, match="Unigram"):
        hf_export.save(tmp_path / "unigram", _copy(unigram), 512)


def _copy(path):
    copy = path.with_name("original.model")
    copy.write_bytes(path.read_bytes())
    return copy


def test_a_tokenizer_that_would_differ_is_not_written(tmp_path, monkeypatch):
    """If the built tokenizer gave other ids (here: merges in the wrong order), saving stops and shows the text."""
    right = hf_export._merges
    monkeypatch.setattr(hf_export, "_merges", lambda scores: right(scores)[::-1])
    with pytest.raises(UserError, match="the exported tokenizer differs on 'Rødgrød"):
        make_hf(tmp_path / "hf", make_config())


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    """420 pieces do not fit a vocabulary of 419; a missing file is named."""
    config = make_config(vocab_size=419)
    vocab_file = make_tokenizer(tmp_path)
    with pytest.raises(UserError, match="420 pieces but the model's vocabulary is 419"):
        hf_weights.save(tmp_path / "hf", config, make_state(config), dtype=torch.float32, vocab_file=vocab_file)
    with pytest.raises(InputsMissing, match=r"none.model is missing"):
        tokenizer_files.check_fits(tmp_path / "none.model", 500)


def test_a_difference_after_writing_is_found(tmp_path):
    """check_written compares every tensor and the geometry with what was to be written."""
    config = make_config()
    state = make_hf(tmp_path / "hf", config)
    hf_weights.check_written(tmp_path / "hf", config, state, torch.float32)
    state["layers.3.mlp.w2.weight"] = state["layers.3.mlp.w2.weight"] + 1e-3
    with pytest.raises(UserError, match=r"layers.3.mlp.w2.weight reads back different"):
        hf_weights.check_written(tmp_path / "hf", config, state, torch.float32)
    with pytest.raises(UserError, match="reads back as"):
        hf_weights.check_written(tmp_path / "hf", make_config(rope_theta=1.0), state, torch.float32)


def test_locating_a_model(tmp_path, monkeypatch):
    """A folder is taken as it is, a Hub name is downloaded into the cache, and nothing at all is an error."""
    reference(tmp_path / "base")
    asked = []

    def download(name, *, cache_dir, allow_patterns):
        asked.append((name, cache_dir))
        return str(tmp_path / "base")

    monkeypatch.setattr(hf_weights.huggingface_hub, "snapshot_download", download)
    assert hf_weights.locate("llama2", None, str(tmp_path / "base"), None) == tmp_path / "base"
    assert hf_weights.locate("llama2", 7, None, tmp_path / "base") == tmp_path / "base"
    assert asked == []
    hf_weights.locate("llama2", 7, None, tmp_path)
    hf_weights.locate("llama2", None, "org/name", None)
    assert asked == [("meta-llama/Llama-2-7b-hf", tmp_path), ("org/name", None)]
    with pytest.raises(InputsMissing, match=r"nowhere holds no config.json"):
        hf_weights.locate("llama2", 7, str(tmp_path / "nowhere"), None)
    with pytest.raises(UserError, match="no model is named"):
        hf_weights.locate("llama2", None, None, None)


def test_a_tokenizer_json_is_exported_as_it_is(tmp_path):
    """A byte-level tokenizer.json: the exported folder gives its ids, its sentence tokens, and fits or does not."""
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    vocab_file = tmp_path / "base" / "tokenizer.json"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.save(str(vocab_file))
    with pytest.raises(InputsMissing, match=r"tokenizer_config\.json is missing"):
        hf_export.save(tmp_path / "out", vocab_file, 64)
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"eos_token": "<|end|>", "tokenizer_class": "Other"}')
    hf_export.save(tmp_path / "out", vocab_file, 64)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    for line in LINES:
        assert loaded(line)["input_ids"] == tokenizer.encode(line).ids
    assert (loaded.eos_token, loaded.model_max_length) == ("<|end|>", 64)
    assert tokenizer_files.sentence_ids(vocab_file) == (None, 0)
    assert tokenizer_files.file_of(tmp_path / "out") == tmp_path / "out" / "tokenizer.json"
    tokenizer_files.check_fits(vocab_file, 300)
    with pytest.raises(UserError, match="has 300 pieces but the model's vocabulary is 299"):
        tokenizer_files.check_fits(vocab_file, 299)
