"""Megatron folders: names, spellings, padding and args on disk; nothing in a file may run."""

from __future__ import annotations

import argparse
import pickle
import random
import sys
import types
from enum import Enum

import numpy as np
import pytest
import torch

from megatron_llm.weights import megatron
from run_contract.errors import InputsMissing, UserError
from tests.engine.small_llama import Shell, make_config, make_state, same


def save(root, iteration="release", *, tp=1, pp=1, spelling="trainer", config=None, dtype=torch.float32, extra=None):
    """A random checkpoint; returns its geometry and state."""
    config = config or make_config()
    state = make_state(config, dtype)
    megatron.save(root, iteration, config, state, tp=tp, pp=pp, dtype=dtype, extra_args=extra or {}, spelling=spelling)
    return config, state


def rewrite(path, change):
    """Apply `change` to a file's content and write it back."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize("spelling", ["converter", "trainer"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2)])
def test_written_layouts_read_back_equal(tmp_path, tp, pp, spelling):
    """Geometry, every tensor's bits and consumed samples survive any layout in both spellings."""
    config, state = save(tmp_path, 60, tp=tp, pp=pp, spelling=spelling, extra={"consumed_train_samples": 960})
    found_config, found, args = megatron.load(tmp_path)
    assert found_config == config
    assert same(found, state)
    assert (args.consumed_train_samples, args.iteration) == (960, 60)
    names = sorted(path.name for path in (tmp_path / "iter_0000060").iterdir())
    expected = [f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") for t in range(tp) for p in range(pp)]
    assert names == expected
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "60"


def test_release_in_the_converters_spelling(tmp_path):
    """The converted file has upstream's nesting, key names and args, with the vocabulary padded to 512."""
    save(tmp_path, spelling="converter", dtype=torch.bfloat16)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    content = torch.load(tmp_path / "release/mp_rank_00/model_optim_rng.pt", weights_only=False)
    assert content.keys() == {"args", "checkpoint_version", "iteration", "model"}
    assert (content["checkpoint_version"], content["iteration"]) == (3.0, "release")
    language = content["model"]["language_model"]
    assert language.keys() == {"embedding", "transformer", "lm_head"}
    assert language["embedding"]["word_embeddings.weight"].shape == (512, 32)
    assert language["lm_head"].shape == (512, 32)
    assert {name for name in language["transformer"] if name.startswith("layers.1.")} == {
        "layers.1.input_layernorm.weight",
        "layers.1.attention.query_key_value.weight",
        "layers.1.attention.dense.weight",
        "layers.1.post_attention_layernorm.weight",
        "layers.1.mlp.dense_h_to_4h.weight",
        "layers.1.mlp.dense_4h_to_h.weight",
    }
    assert "final_layernorm.weight" in language["transformer"]
    args = content["args"]
    assert (args.num_layers, args.encoder_num_layers, args.num_attention_heads_kv) == (4, 4, 4)
    assert (args.padded_vocab_size, args.true_vocab_size, args.make_vocab_size_divisible_by) == (512, 420, 128)
    assert (args.glu_activation, args.position_embedding_type, args.params_dtype) == (
        "swiglu",
        "rotary",
        torch.bfloat16,
    )
    fields = {"tokenizer_type", "use_rms_norm", "tie_embed_logits", "parallel_attn", "parallel_layernorm", "iteration"}
    fields |= {"layernorm_epsilon", "rope_theta", "rope_scaling_factor", "tensor_model_parallel_size", "seq_length"}
    fields |= {"pipeline_model_parallel_size", "bias_gelu_fusion", "bias_droput_fusion", "use_flash_attn"}
    fields |= {"hidden_dropout", "sliding_window_size", "consumed_train_samples", "consumed_valid_samples"}
    fields |= {"hidden_size", "ffn_hidden_size", "kv_channels", "num_attention_heads", "max_position_embeddings"}
    assert fields <= vars(args).keys()


def test_shards_in_the_trainers_spelling(tmp_path):
    """Sharded files nest word_embeddings, say encoder and self_attention; a tied model's last stage has the head."""
    config = make_config(tie_embed_logits=True)
    save(tmp_path, tp=2, pp=2, config=config)
    folder = tmp_path / "release"
    first = torch.load(folder / "mp_rank_00_000/model_optim_rng.pt", weights_only=False)["model"]
    last = torch.load(folder / "mp_rank_00_001/model_optim_rng.pt", weights_only=False)["model"]
    assert first["language_model"]["embedding"]["word_embeddings"]["weight"].shape == (256, 32)
    assert "layers.1.self_attention.query_key_value.weight" in first["language_model"]["encoder"]
    assert "layers.2.self_attention.query_key_value.weight" not in last["language_model"]["encoder"]
    assert last["word_embeddings_for_head"]["weight"].shape == (256, 32)
    assert "lm_head" not in last["language_model"]


def test_the_same_weights_give_the_same_bytes(tmp_path):
    """Two runs in two folders write byte-identical files, each no larger than its own tensors."""
    for name in ("a", "b"):
        save(tmp_path / name, 7, tp=4)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    content = torch.load(tmp_path / "a/iter_0000007/mp_rank_00/model_optim_rng.pt", weights_only=False)
    language = content["model"]["language_model"]
    tensors = [*language["encoder"].values(), language["lm_head"], language["embedding"]["word_embeddings"]["weight"]]
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * 4 for tensor in tensors)


@pytest.mark.parametrize("place", ["args", "model", "rng_state"])
def test_a_hostile_file_does_not_run(tmp_path, place):
    """A pickle that would run a shell command is refused with the reason, and the command does not run."""
    save(tmp_path)
    path = tmp_path / "release/mp_rank_00/model_optim_rng.pt"
    proof = tmp_path / "it-ran"
    rewrite(path, lambda content: content.update({place: Shell(f"touch {proof}")}))
    assert not proof.exists()
    with pytest.raises(UserError, match="more than weights and plain data"):
        megatron.load(tmp_path)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()


def test_a_bare_pickle_does_not_run(tmp_path):
    """The old file format, which is a pickle from its first byte, is refused unread."""
    save(tmp_path)
    proof = tmp_path / "it-ran"
    path = tmp_path / "release/mp_rank_00/model_optim_rng.pt"
    path.write_bytes(pickle.dumps(Shell(f"touch {proof}")))
    with pytest.raises(UserError, match="cannot be read"):
        megatron.load(tmp_path)
    assert not proof.exists()


def test_a_file_of_upstreams_trainer_is_read(tmp_path, monkeypatch):
    """Enums of megatron.model.enums, NumPy and Python RNG state, optimizer entries and model_rng.pt are no obstacle."""
    for name in ("megatron", "megatron.model", "megatron.model.enums"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    enums = sys.modules["megatron.model.enums"]
    for name in ("PositionEmbeddingType", "ModelType"):
        enum = Enum(name, {"rotary": 1, "encoder_or_decoder": 2}, module="megatron.model.enums")
        setattr(enums, name, enum)
    config, state = save(tmp_path, 500, tp=2)

    def like_upstream(content):
        content["args"].position_embedding_type = enums.PositionEmbeddingType.rotary
        content["args"].model_type = enums.ModelType.encoder_or_decoder
        numpy_state = np.random.RandomState(1).get_state()
        content["rng_state"] = [{"random_rng_state": random.getstate(), "np_rng_state": numpy_state}]
        content["opt_param_scheduler"] = {"num_steps": np.int64(5), "min_lr": 1e-8}
        content["optimizer"] = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}

    for rank in ("mp_rank_00", "mp_rank_01"):
        path = tmp_path / "iter_0000500" / rank / "model_optim_rng.pt"
        rewrite(path, like_upstream)
        path.rename(path.with_name("model_rng.pt"))
    for name in ("megatron", "megatron.model", "megatron.model.enums"):
        monkeypatch.delitem(sys.modules, name)
    found_config, found, args = megatron.load(tmp_path, 500)
    assert found_config == config
    assert same(found, state)
    assert args.position_embedding_type.value == 1


def test_a_model_without_a_true_vocabulary_keeps_its_padding(tmp_path):
    """Upstream's converter records no true_vocab_size and no kv heads: padded size and plain attention are taken."""
    save(tmp_path, config=make_config(num_attention_heads_kv=8))
    path = tmp_path / "release/mp_rank_00/model_optim_rng.pt"
    rewrite(
        path, lambda content: [delattr(content["args"], name) for name in ("true_vocab_size", "num_attention_heads_kv")]
    )
    config, state, _ = megatron.load(tmp_path)
    assert (config.vocab_size, config.num_attention_heads_kv) == (512, 8)
    assert torch.equal(state["embedding.weight"][420:], state["embedding.weight"][419:420].expand(92, -1))


@pytest.mark.parametrize("fields", [("true_vocab_size", "padded_vocab_size"), ("num_layers",)])
def test_fields_that_upstream_leaves_out(tmp_path, fields):
    """The vocabulary is then the stored rows, and encoder_num_layers says the depth."""
    _, state = save(tmp_path, tp=2)
    for rank in (0, 1):
        path = tmp_path / f"release/mp_rank_0{rank}/model_optim_rng.pt"
        rewrite(path, lambda content: [delattr(content["args"], name) for name in fields])
    config, found, _ = megatron.load(tmp_path)
    assert config.vocab_size == (512 if "padded_vocab_size" in fields else 420)
    assert config.num_layers == 4
    assert torch.equal(found["lm_head.weight"][:420], state["lm_head.weight"])


def test_a_falcon_of_upstreams_converter(tmp_path):
    """Its args lack the vocabulary, the MLP's width, the head's size, epsilon, theta and whether it is tied."""
    falcon = {"use_rms_norm": False, "glu_activation": None, "parallel_attn": True, "parallel_layernorm": True}
    config = make_config(vocab_size=512, kv_channels=4, ffn_hidden_size=128, tie_embed_logits=True, **falcon)
    _, state = save(tmp_path, config=config, spelling="converter")
    written = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 8, "num_attention_heads_kv": 4}
    written |= {"parallel_layernorm": True, "tokenizer_type": "FalconTokenizer", "use_flash_attn": True}
    written |= {"hidden_dropout": 0.0, "parallel_attn": True, "max_position_embeddings": 64, "seq_length": 64}
    written |= {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "iteration": "release"}
    written |= {"bias_gelu_fusion": False, "bias_droput_fusion": False, "position_embedding_type": "rotary"}
    path = tmp_path / "release/mp_rank_00/model_optim_rng.pt"
    rewrite(path, lambda content: content.update(args=argparse.Namespace(**written)))
    found_config, found, _ = megatron.load(tmp_path)
    assert found_config == config
    assert same(found, state)


def test_what_is_missing_is_named(tmp_path):
    """No tracker, no such iteration, and a missing rank each name the path or rank."""
    with pytest.raises(InputsMissing, match=r"latest_checkpointed_iteration.txt is missing"):
        megatron.load(tmp_path)
    save(tmp_path, 60, tp=2, pp=2)
    with pytest.raises(InputsMissing, match=r"iter_0000061 is missing; .* holds iter_0000060"):
        megatron.load(tmp_path, 61)
    (tmp_path / "iter_0000060/mp_rank_00_001/model_optim_rng.pt").unlink()
    with pytest.raises(InputsMissing, match=r"mp_rank_00_001 holds neither"):
        megatron.load(tmp_path, 60)
    (tmp_path / "iter_0000060/mp_rank_00_001").rmdir()
    with pytest.raises(InputsMissing, match="tensor rank 0, pipeline rank 1"):
        megatron.load(tmp_path, 60)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    """Truncated files, other checkpoint versions, other models and wrong shapes stop with a message."""
    save(tmp_path)
    path = tmp_path / "release/mp_rank_00/model_optim_rng.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read, it may be truncated"):
        megatron.load(tmp_path)
    changes = {
        "checkpoint_version": (lambda content: content.update(checkpoint_version=2.0), "checkpoint_version 2.0"),
        "mixed": (lambda content: setattr(content["args"], "parallel_attn", True), "swiglu with parallel_attn = True"),
        "shape": (lambda content: setattr(content["args"], "hidden_size", 64), "shape"),
        "layers": (lambda content: setattr(content["args"], "num_layers", 5), "lacks the tensor layers.4"),
        "heads": (lambda content: setattr(content["args"], "num_attention_heads", 5), "not a multiple"),
        "fields": (lambda content: delattr(content["args"], "hidden_size"), "hidden_size"),
        "nesting": (lambda content: content["model"]["language_model"].update(embedding={}), "tensor embedding.weight"),
        "no head": (lambda content: content["model"]["language_model"].pop("lm_head"), "lacks the tensor lm_head"),
        "empty": (
            lambda content: content.update(model={"language_model": {"encoder": {}, "embedding": {"x": 1}}}),
            "laid",
        ),
        "args": (lambda content: content.update(args=argparse.Namespace), "lacks 'args'|more than weights"),
    }
    for change, message in changes.values():
        path.write_bytes(whole)
        rewrite(path, change)
        with pytest.raises(UserError, match=message):
            megatron.load(tmp_path)


def test_nothing_is_published_on_an_error_and_the_tracker_names_the_newest(tmp_path):
    """A layout that cannot be made leaves no folder; merging 120 before 60 leaves the tracker at 120."""
    with pytest.raises(UserError, match="tensor parallel size 3"):
        save(tmp_path, 10, tp=3)
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, 120)
    save(tmp_path, 60)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "120"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["iter_0000060", "iter_0000120"]
