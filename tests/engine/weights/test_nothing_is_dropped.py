"""What a model's folder says is read, refused by name, or said to stay behind: nothing is dropped without a word."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import hf_config, load_any
from megatron_llm.weights import megatron as megatron_weights
from megatron_llm.weights import meta as meta_weights
from run_contract.errors import UserError
from tests.engine.small_llama import make_config, make_hf, make_state, make_tokenizer, run, same
from tests.engine.weights.test_hf_falcon import make_falcon
from tests.engine.weights.test_megatron import rewrite
from tests.engine.weights.test_meta import make_meta, meta_config

CONVERT = "weights_conversion/hf_to_megatron.py"
RESHARD = "tools/checkpoint_util.py"
EXPORT = "weights_conversion/megatron_to_hf.py"
PUSH = "tools/push_to_hub.py"
HEAD, NORM = "lm_head.weight", "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tied and an untied Hugging Face model in bf16."""
    folder = tmp_path_factory.mktemp("models")
    for name, tied in (("tied", True), ("untied", False)):
        make_hf(folder / name, make_config(tie_embed_logits=tied), torch.bfloat16)
    return folder


@pytest.fixture
def base(folders, tmp_path):
    """A copy of the untied model."""
    return shutil.copytree(folders / "untied", tmp_path / "base")


def change_tensors(folder, change):
    """Apply `change` to the weights of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    """Write other values into config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_stored_output_layer_of_a_tied_model(folders, tmp_path):
    """The same numbers as the embedding, in whichever dtype: the model is tied. Others: refused, with both remedies,
    by each program that reads the folder; with tie_word_embeddings false it is kept."""
    folder = shutil.copytree(folders / "tied", tmp_path / "base")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    for copy in (embedding.clone(), embedding.float()):
        change_tensors(folder, lambda tensors, copy=copy: tensors.update({HEAD: copy}))
        config, state = hf_weights.load(folder)
        assert config.tie_embed_logits
        assert "lm_head.weight" not in state
    other = embedding.clone()
    other[-1, -1] += 1
    change_tensors(folder, lambda tensors: tensors.update({HEAD: other}))
    out = tmp_path / "out"
    for script, flags in (
        (CONVERT, ("llama2", f"--out={out}", f"--model-path={folder}")),
        (RESHARD, ("--load_dir", folder, "--save_dir", out, "--model_type", "llama2")),
        (PUSH, (folder, "--output_folder", out)),
    ):
        code, _, err = run(script, *flags)
        assert code == 2
        assert f"{folder}: config.json says tie_word_embeddings, but lm_head.weight is stored and differs" in err
        assert not out.exists()
    change_config(folder, tie_word_embeddings=False)
    assert torch.equal(hf_weights.load(folder)[1]["lm_head.weight"], other)


def test_a_falcons_output_layer_and_additional_tensors(tmp_path):
    """Falcon is tied by default: another lm_head, and any tensor that is not the model's, are refused."""
    make_falcon(tmp_path, "7b")
    extra = {"transformer.h.0.self_attention.dense.bias": torch.ones(32, dtype=torch.bfloat16)}
    change_tensors(tmp_path, lambda tensors: tensors.update(extra))
    with pytest.raises(UserError, match=r"1 tensors do not belong .* transformer\.h\.0\.self_attention\.dense\.bias"):
        hf_weights.load(tmp_path)
    change_tensors(tmp_path, lambda tensors: (tensors.pop(*extra), tensors.update({HEAD: torch.ones(99, 32)})))
    with pytest.raises(UserError, match=r"lm_head.weight is stored and differs from transformer\.word_embeddings"):
        hf_weights.load(tmp_path)


def test_a_tensor_in_a_wider_dtype_keeps_its_precision(base):
    """One fp32 norm in a bf16 folder: everything is kept in fp32 rather than rounded to the embedding's dtype; fp16
    beside bf16 is fp32 too."""
    precise = torch.full((32,), 1 + 2**-20)
    change_tensors(base, lambda tensors: tensors.update({NORM: precise}))
    out = base.parent / "out"
    code, said, err = run(CONVERT, "llama2", f"--out={out}", f"--model-path={base}")
    assert code == 0, err
    assert "torch.float32" in said
    assert torch.equal(megatron_weights.load(out)[1]["layers.1.input_layernorm.weight"], precise)
    change_tensors(base, lambda tensors: tensors.update({NORM: precise.half()}))
    assert hf_weights.load(base)[1]["embedding.weight"].dtype == torch.float32
    change_tensors(base, lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(UserError, match=rf"{NORM} holds torch.int8: quantised weights are not supported"):
        hf_weights.load(base)


def test_weights_in_two_places(base):
    """An adapter, a single file beside an index, and a tensor in two shards: each is refused, since one would lose."""
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config.json changes the weights beside it; merge"):
        hf_weights.load(base)
    (base / "adapter_config.json").unlink()
    config, state = hf_weights.load(base)
    hf_weights._write_weights(base, config, dict(state), torch.bfloat16, 60_000)
    with pytest.raises(UserError, match=r"holds model.safetensors and model.safetensors.index.json"):
        hf_weights.load(base)
    (base / "model.safetensors").unlink()
    first, second = sorted(base.glob("model-*.safetensors"))[:2]
    save_file(load_file(second) | {NORM: torch.ones(32, dtype=torch.bfloat16)}, second)
    save_file(load_file(first) | {NORM: torch.ones(32, dtype=torch.bfloat16)}, first)
    with pytest.raises(UserError, match=rf"{NORM} is in another file"):
        hf_weights.load(base)


def test_buffers_are_not_weights(base):
    """The rotary buffers that old versions of Transformers stored follow from config.json."""
    state = dict(hf_weights.load(base)[1])
    change_tensors(base, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    assert same(hf_weights.load(base)[1], state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e6}, "rope_theta is 10000.0 and 1000000.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_type is 'default' and 'linear'"),
        ({"rope_parameters": {"rope_type": "linear", "type": "llama3"}}, "rope_type is 'linear' and 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5 and 1.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "for full_attention layers are not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
    ],
)
def test_settings_that_would_be_lost_are_refused(base, changes, message):
    """Two spellings that contradict each other, and what our rotary embeddings and layers do not do."""
    change_config(base, **changes)
    with pytest.raises(UserError, match=message):
        hf_weights.load(base)


def test_what_transformers_takes_for_a_mistral_by_default(tmp_path):
    """Without these keys in config.json a Mistral has a window of 4096, eight kv heads and 131072 positions."""
    make_hf(tmp_path / "base", make_config(sliding_window_size=16))
    path = tmp_path / "base/config.json"
    raw = json.loads(path.read_text())
    left_out = {"sliding_window", "num_key_value_heads", "max_position_embeddings"}
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in left_out}))
    config = hf_config.load(tmp_path / "base")
    assert (config.sliding_window_size, config.num_attention_heads_kv) == (4096, 8)
    assert config.max_position_embeddings == 131072
    change_config(tmp_path / "base", sliding_window=None)
    assert hf_config.load(tmp_path / "base").sliding_window_size is None
    assert hf_config.not_carried(tmp_path / "base") == [
        "MistralForCausalLM without a window is written as LlamaForCausalLM, which computes the same"
    ]


def test_what_stays_behind_is_said(base, tmp_path):
    """Keys of config.json that nothing keeps are named with their values by every program; without any, nothing is
    said, and Transformers' own notes about itself are none."""
    assert hf_config.not_carried(base) == []
    change_config(base, transformers_version="4.31.0", _name_or_path="x", pretraining_tp=1)
    assert hf_config.not_carried(base) == []
    change_config(base, pad_token_id=0, layer_types=["full_attention"], eos_token_id=[2, 3])
    expected = "layer_types = ['full_attention']; pad_token_id = 0; eos_token_id = [2, 3]"
    for script, flags in (
        (CONVERT, ("llama2", f"--out={tmp_path / 'a'}", f"--model-path={base}")),
        (RESHARD, ("--load_dir", base, "--save_dir", tmp_path / "b", "--model_type", "llama2")),
        (PUSH, (base, "--output_folder", tmp_path / "c")),
    ):
        code, out, err = run(script, *flags)
        assert code == 0, err
        assert f"{base}/config.json: not carried along: {expected}" in out


def test_the_tokenizers_files_go_along(base, tmp_path):
    """Over conversion and sharding to the export without --vocab_file: the files themselves, generation_config.json
    with what it says, and tokens that only tokenizer.json has are named, or exported from there."""
    generation = {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(generation))
    raw = json.loads((base / "tokenizer.json").read_text())
    added = {"id": 420, "content": "<pad>", "special": True}
    raw["added_tokens"].append({**raw["added_tokens"][0], **added})
    (base / "tokenizer.json").write_text(json.dumps(raw))
    assert run(CONVERT, "llama2", f"--out={tmp_path / 'megatron'}", f"--model-path={base}")[0] == 0
    flags = ("--save_dir", tmp_path / "cut", "--model_type", "llama2", "--target_tensor_parallel_size", 2)
    assert run(RESHARD, "--load_dir", tmp_path / "megatron", *flags)[0] == 0
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (base / name).read_bytes()
    code, out, err = run(EXPORT, f"--input_dir={tmp_path / 'cut'}", f"--output_dir={tmp_path / 'hf'}")
    assert code == 0, err
    assert "lacks 1 tokens of the tokenizer.json beside it, the first is '<pad>': they are not exported" in out
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == generation
    again = (f"--input_dir={tmp_path / 'cut'}", f"--output_dir={tmp_path / 'again'}")
    code, _, err = run(EXPORT, *again, "--vocab_file", tmp_path / "cut/tokenizer.json")
    assert (code, "has 421 pieces but the model's vocabulary is 420" in err) == (2, True)


def test_a_tokenizer_of_another_name_is_carried(base, tmp_path):
    """--vocab_file of checkpoint_util, whatever it is called, is where megatron_to_hf looks; without any it is said;
    and another one that is given to megatron_to_hf is said to differ."""
    (tmp_path / "my.spm").write_bytes((base / "tokenizer.model").read_bytes())
    for path in base.glob("tokenizer*"):
        path.unlink()
    flags = ("--load_dir", base, "--save_dir", tmp_path / "cut", "--model_type", "llama2")
    code, out, _ = run(RESHARD, *flags)
    assert (code, f"{base} has no tokenizer; none is copied" in out) == (0, True)
    assert run(RESHARD, *flags, "--vocab_file", tmp_path / "my.spm")[0] == 0
    where = (f"--input_dir={tmp_path / 'cut'}", f"--output_dir={tmp_path / 'hf'}")
    assert run(EXPORT, *where)[0] == 0
    other = tmp_path / "cut/tokenizer.model"
    other.write_bytes(other.read_bytes() + b"\0")
    code, out, _ = run(EXPORT, where[0], f"--output_dir={tmp_path / 'b'}", "--vocab_file", tmp_path / "my.spm")
    assert f"the tokenizer is {tmp_path / 'my.spm'}, which differs from {other} beside the weights" in out


def test_commands_that_fill_one_folder_leave_each_others_files_alone(base, tmp_path, monkeypatch):
    """Merging several iterations at once: the tracker and the tokenizer are replaced without removing the temporary
    file of another task, and no task leaves one behind."""
    (tmp_path / "claim.json").write_text('{"attempt": "1"}')
    monkeypatch.setenv("SNAKMODEL_CLAIM", str(tmp_path / "claim.json"))
    monkeypatch.setenv("SNAKMODEL_ATTEMPT", "1")
    (tmp_path / "cut").mkdir()
    theirs = [tmp_path / "cut" / f".{name}.tmp-2" for name in (megatron_weights.TRACKER, "tokenizer.model")]
    for path in theirs:
        path.write_text("another task's")
    flags = ("--load_dir", base, "--save_dir", tmp_path / "cut", "--model_type", "llama2")
    assert run(RESHARD, *flags)[0] == 0
    assert sorted((tmp_path / "cut").glob(".*")) == sorted(theirs)


def test_a_size_of_less_than_half_a_billion(base, tmp_path):
    """--size=0 names such a model, and no other is near 0; it is not divided by."""
    flags = (f"--out={tmp_path / 'out'}", f"--model-path={base}")
    assert run(CONVERT, "llama2", "--size=0", *flags)[0] == 0
    code, _, err = run(CONVERT, "llama2", "--size=1", *flags)
    assert (code, "--size=1 but the model has 0.000 billion" in err) == (2, True)


def megatron(folder, *, tp=1, pp=1, **changes):
    """A random Megatron checkpoint; returns its first file."""
    config = make_config(**changes)
    dtype = torch.float32
    megatron_weights.save(folder, "release", config, make_state(config), tp=tp, pp=pp, dtype=dtype, extra_args={})
    return sorted(folder.glob("release/*/model_optim_rng.pt"))[0]


def put(*keys, value):
    """A change to a file's content: the value at the end of the keys."""

    def change(content):
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


LANGUAGE = ("model", "language_model")
ROWS = torch.ones(512, 32)


@pytest.mark.parametrize(
    ("changes", "change", "message"),
    [
        ({"tie_embed_logits": True}, put(*LANGUAGE, "lm_head", value=ROWS), "the first is lm_head.weight; by its args"),
        ({}, put(*LANGUAGE, "lm_head", value={"weight": ROWS}), "lm_head.weight in the model is not known here"),
        ({}, put(*LANGUAGE, "pooler", value={"dense.weight": ROWS}), "pooler in the model is not known here"),
        ({}, put("model", "word_embeddings_for_head", value={"weight": ROWS}), "first is word_embeddings_for_head"),
        (
            {},
            put(*LANGUAGE, "embedding", "position_embeddings", value={"weight": ROWS}),
            "position_embeddings in the model is not known here",
        ),
        ({}, put(*LANGUAGE, "encoder", "layers.4.mlp.dense_4h_to_h.weight", value=ROWS), "has 1 tensors that do not"),
        ({}, put(*LANGUAGE, "encoder", "layers.0.mlp.extra", value=ROWS.char()), "holds torch.int8: quantised"),
    ],
)
def test_parts_of_a_megatron_file_that_would_be_lost(tmp_path, changes, change, message):
    """An output layer beside tied args, another form of it, heads, position embeddings and layers too many."""
    rewrite(megatron(tmp_path, **changes), change)
    with pytest.raises(UserError, match=message):
        megatron_weights.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_embedding_type", "absolute"),
        ("use_bias", True),
        ("use_post_ln", True),
        ("apply_residual_connection_post_layernorm", True),
        ("use_rms_norm", False),
        ("padded_vocab_size", 400),
    ],
)
def test_arguments_of_another_model(tmp_path, name, value):
    """What upstream's args say beyond what is computed here, and fewer tokens than are stored, is refused by name."""

    def change(content):
        setattr(content["args"], name, value)
        if name == "padded_vocab_size":
            del content["args"].true_vocab_size

    rewrite(megatron(tmp_path), change)
    with pytest.raises(UserError, match=name):
        megatron_weights.load(tmp_path)


def test_a_wider_tensor_and_a_buffer_in_a_megatron_file(tmp_path):
    """An fp32 norm beside bf16 weights is not rounded; a rotary buffer is no weight; files of two iterations are not
    one checkpoint."""
    path = megatron(tmp_path, tp=2)
    for file in tmp_path.glob("release/*/model_optim_rng.pt"):
        rewrite(file, put(*LANGUAGE, "encoder", "layers.0.self_attention.rotary_emb.inv_freq", value=torch.ones(3)))
        rewrite(file, put(*LANGUAGE, "encoder", "final_layernorm.weight", value=torch.ones(32, dtype=torch.float64)))
    found = megatron_weights.load(tmp_path)[1]
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}
    rewrite(path, put("iteration", value=7))
    with pytest.raises(
        UserError, match=r"its files are of the iterations \['7', 'release'\], so they are not one checkpoint"
    ):
        megatron_weights.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "setting", "changes"),
    [
        ("codellama", "rope_theta 10000.0, where codellama has 1000000.0", {}),
        ("llama", "layernorm_epsilon 1e-05, where llama has 1e-06", {}),
        ("mistral", "sliding_window_size None, where mistral has 4096", {}),
        ("codellama", None, {"rope_theta": 1e6}),
        ("llama2", None, {}),
    ],
)
def test_what_upstreams_resharder_leaves_out(tmp_path, name, setting, changes):
    """In a file that upstream's checkpoint_util wrote, the default of a setting that it does not carry is refused for
    the models that have another; in a file of its trainer the same value is what was trained with."""
    path = megatron(tmp_path / "in", **changes)
    flags = ("--load_dir", tmp_path / "in", "--save_dir", tmp_path / "out", "--model_type", name)
    assert run(RESHARD, *flags)[0] == 0
    rewrite(path, lambda content: setattr(content["args"], "perform_initialization", False))
    code, _, err = run(RESHARD, *flags)
    assert code == (2 if setting else 0)
    assert setting is None or f"--model_type {name} but {tmp_path / 'in/release'} has {setting}" in err
    loaded = load_any.load(tmp_path / "in")
    if setting:
        with pytest.raises(UserError, match="--model_name"):
            load_any.check_family(loaded, name, "--model_name")


def test_metas_files_hold_nothing_else(tmp_path):
    """Another tensor, a second dtype, and copies that differ between the files are refused; so is a factor that
    contradicts params.json."""
    config = meta_config()
    folder = tmp_path / "meta"
    make_meta(folder, config, make_state(config), 2, use_scaled_rope=True, rope_scaling_factor=8)
    with pytest.raises(UserError, match=r"--rope_scaling_factor 32.0 but .*params.json says 8; leave the flag out"):
        meta_weights.load(folder, "llama2", 32.0)
    path = folder / "consolidated.01.pth"
    whole = torch.load(path)
    for change, message in (
        (
            {"layers.0.attention.wq.bias": torch.ones(3)},
            "1 tensors of a different kind of model, the first is layers.0.att",
        ),
        ({"norm.weight": whole["norm.weight"].half()}, "has tensors of torch.float16 and torch.float32"),
    ):
        torch.save(whole | change, path)
        with pytest.raises(UserError, match=message):
            meta_weights.load(folder, "llama2")
    torch.save(whole | {"norm.weight": whole["norm.weight"] + 1}, path)
    state = meta_weights.load(folder, "llama2")[1]
    with pytest.raises(UserError, match=r"norm.weight differs between files that each hold the whole of it"):
        dict(state)


def test_a_scaling_type_without_a_factor(base, tmp_path):
    """push_to_hub refuses --rope_scaling_type alone, and says which scaling of the source its flags replace."""
    out = ("--output_folder", tmp_path / "out")
    code, _, err = run(PUSH, base, *out, "--rope_scaling_type", "dynamic")
    assert (code, "--rope_scaling_type dynamic needs --rope_scaling_factor" in err) == (2, True)
    scaled = make_config(rope_scaling_factor=4.0)
    vocab_file = make_tokenizer(tmp_path / "tok")
    hf_weights.save(tmp_path / "hf", scaled, make_state(scaled), dtype=torch.float32, vocab_file=vocab_file)
    code, said, err = run(PUSH, tmp_path / "hf", *out, "--rope_scaling_factor", 2)
    assert code == 0, err
    assert "config.json: rope_scaling {'rope_type': 'linear', 'factor': 4.0, 'type': 'linear'} becomes" in said
