"""The conversion scripts as the chain runs them: flags, exit codes, what is on disk, that mistakes publish nothing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from megatron_llm.model import canonical_state
from megatron_llm.model.llama import Llama
from megatron_llm.tokenizer.build import build
from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import megatron, megatron_layout
from tests.engine.small_llama import (
    ENGINE,
    make_config,
    make_hf,
    make_state,
    make_tokenizer,
    make_training_checkpoint,
    run,
    same,
)

CONVERT = "weights_conversion/hf_to_megatron.py"
SHARD = "tools/checkpoint_util.py"
EXPORT = "weights_conversion/megatron_to_hf.py"


def shard_flags(source, target, tp, pp, *more):
    """checkpoint_util's flags in the order of the published recipe."""
    sizes = ("--target_tensor_parallel_size", tp, "--target_pipeline_parallel_size", pp)
    return (*sizes, "--load_dir", source, "--save_dir", target, "--model_type", "llama2", *more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_way_round_is_exact(tmp_path, dtype):
    """HF -> release -> TP 2 x PP 2 -> merged -> HF gives the tensors, geometry and tokenizer that went in."""
    config = make_config(rope_theta=5e5)
    state = make_hf(tmp_path / "base", config, dtype)
    code, out, err = run(CONVERT, "llama2", f"--out={tmp_path / 'megatron'}", f"--model-path={tmp_path / 'base'}")
    assert code == 0, err
    assert str(tmp_path / "megatron/release") in out
    tracker = tmp_path / "megatron/latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "release"
    language = torch.load(tmp_path / "megatron/release/mp_rank_00/model_optim_rng.pt", weights_only=False)["model"]
    assert "transformer" in language["language_model"]
    tokenizer = (tmp_path / "base/tokenizer.model").read_bytes()
    assert (tmp_path / "megatron/tokenizer.model").read_bytes() == tokenizer
    flags = shard_flags(tmp_path / "megatron", tmp_path / "sharded", 2, 2, "--true_vocab_size", 420)
    assert run(SHARD, *flags)[0] == 0
    assert len(list((tmp_path / "sharded/release").glob("mp_rank_??_00?/model_optim_rng.pt"))) == 4
    assert run(SHARD, *shard_flags(tmp_path / "sharded", tmp_path / "merged", 1, 1))[0] == 0
    where = (f"--input_dir={tmp_path / 'merged'}", f"--output_dir={tmp_path / 'hf'}")
    code, out, err = run(EXPORT, *where, "--vocab_file", tmp_path / "megatron/tokenizer.model")
    assert code == 0, err
    found_config, found = hf_weights.load(tmp_path / "hf")
    assert found_config == config
    assert same(found, state)
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == tokenizer
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_a_training_checkpoint_keeps_iteration_and_consumed_samples(tmp_path):
    """Iteration 60 of our own checkpoints becomes iter_0000060 in a Megatron layout (cast if asked) and an HF one."""
    config = make_config()
    state = make_state(config)
    make_training_checkpoint(tmp_path / "checkpoints", 60, config, state)
    make_training_checkpoint(tmp_path / "checkpoints", 120, config, make_state(config, seed=1))
    flags = shard_flags(tmp_path / "checkpoints", tmp_path / "merged", 1, 1, "--true_vocab_size", 420)
    assert run(SHARD, *flags, "--load_iters", 60)[0] == 0
    found_config, found, args = megatron.load(tmp_path / "merged", 60)
    assert found_config == config
    assert same(found, state)
    assert (args.iteration, args.consumed_train_samples, args.consumed_valid_samples) == (60, 960, 32)
    assert run(SHARD, *flags, "--bf16")[0] == 0
    _, newest, args = megatron.load(tmp_path / "merged")
    assert (args.iteration, args.params_dtype) == (120, torch.bfloat16)
    assert torch.equal(newest["lm_head.weight"], make_state(config, seed=1)["lm_head.weight"].bfloat16())
    vocab_file = make_tokenizer(tmp_path / "tokenizer")
    where = (f"--input_dir={tmp_path / 'merged'}", f"--output_dir={tmp_path / 'hf'}")
    code, _, err = run(EXPORT, *where, "--load_iters", 60, "--vocab_file", vocab_file, "--max_shard_size", "60KB")
    assert code == 0, err
    assert same(hf_weights.load(tmp_path / "hf")[1], state)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1


def test_a_damaged_training_checkpoint_is_not_merged(tmp_path):
    """A named iteration that does not verify exits 3; without a name the newest that verifies is taken."""
    config = make_config()
    for iteration in (60, 120):
        make_training_checkpoint(tmp_path / "checkpoints", iteration, config, make_state(config))
    damaged = next((tmp_path / "checkpoints/iter_0000120").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    flags = shard_flags(tmp_path / "checkpoints", tmp_path / "merged", 1, 1)
    code, _, err = run(SHARD, *flags, "--load_iters", 120)
    assert code == 3
    assert "iter_0000120 does not verify" in err
    assert not (tmp_path / "merged").exists()
    assert run(SHARD, *flags)[0] == 0
    assert (tmp_path / "merged/iter_0000060").is_dir()


def test_a_training_checkpoint_holds_what_our_model_has(tmp_path):
    """The names that the weight formats call canonical are those of the engine's model."""
    for tied in (False, True):
        config = make_config(tie_embed_logits=tied)
        shapes = {name: tuple(tensor.shape) for name, tensor in Llama(config).state_dict().items()}
        assert shapes == {name: tuple(tensor.shape) for name, tensor in make_state(config).items()}


def test_the_same_conversion_gives_the_same_bytes(tmp_path):
    """Running again, over the output or beside it, changes no byte."""
    make_hf(tmp_path / "base", make_config())
    for out in ("a", "b", "b"):
        assert run(CONVERT, "llama2", f"--out={tmp_path / out}", f"--model-path={tmp_path / 'base'}")[0] == 0
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*"))
    assert names == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*"))
    for name in names:
        if (tmp_path / "a" / name).is_file():
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_as_a_command(tmp_path):
    """Started as the launcher starts it, a missing model is one error line and exit code 3, without a traceback."""
    command = [
        sys.executable,
        ENGINE / CONVERT,
        "llama2",
        f"--out={tmp_path / 'out'}",
        f"--model-path={tmp_path / 'no'}",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 3
    assert done.stderr == (
        f"error: {tmp_path / 'no'} holds no config.json; give the folder of a Hugging Face model, or ORG/NAME\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window_size": 16}),
        ("llama2", {"rope_scaling_type": "llama3", "rope_scaling_factor": 8.0, "rope_original_max_positions": 32}),
    ],
)
def test_settings_that_llama_2_does_not_have_survive(tmp_path, family, changes):
    """Mistral's window and Llama 3's rotary scaling go to Megatron, over TP 2 x PP 2 and back without a change."""
    config = make_config(**changes)
    state = make_hf(tmp_path / "base", config)
    assert run(CONVERT, family, f"--out={tmp_path / 'megatron'}", f"--model-path={tmp_path / 'base'}")[0] == 0
    assert run(SHARD, *shard_flags(tmp_path / "megatron", tmp_path / "sharded", 2, 2))[0] == 0
    where = (f"--input_dir={tmp_path / 'sharded'}", f"--output_dir={tmp_path / 'hf'}")
    assert run(EXPORT, *where, "--vocab_file", tmp_path / "megatron/tokenizer.model")[0] == 0
    found_config, found = hf_weights.load(tmp_path / "hf")
    assert found_config == config
    assert same(found, state)
    other = "llama2" if family == "mistral" else "mistral"
    code, _, err = run(CONVERT, other, f"--out={tmp_path / 'other'}", f"--model-path={tmp_path / 'base'}")
    assert (code, f"not {other}" in err) == (2, True)


def test_from_hugging_face_straight_to_shards(tmp_path):
    """checkpoint_util reads a Hugging Face folder, and casts up and down: bf16 -> fp32 loses nothing."""
    config = make_config()
    state = make_hf(tmp_path / "base", config, torch.bfloat16)
    flags = shard_flags(tmp_path / "base", tmp_path / "sharded", 4, 1, "--true_vocab_size", 420, "--fp32")
    code, _, err = run(SHARD, *flags)
    assert code == 0, err
    found_config, _, args = megatron.load(tmp_path / "sharded")
    assert (found_config, args.params_dtype) == (config, torch.float32)
    assert run(SHARD, *shard_flags(tmp_path / "sharded", tmp_path / "merged", 1, 2, "--bf16"))[0] == 0
    assert same(megatron.load(tmp_path / "merged")[1], state)


@pytest.mark.parametrize("source", ["base", "checkpoints", "sharded"])
def test_checkpoint_util_writes_hugging_face_folders(tmp_path, source):
    """--saver hf gives, from each kind of source, the bytes of the folder that megatron_to_hf writes."""
    config = make_config()
    state = make_hf(tmp_path / "base", config)
    make_training_checkpoint(tmp_path / "checkpoints", 60, config, state)
    assert run(SHARD, *shard_flags(tmp_path / "base", tmp_path / "sharded", 2, 2))[0] == 0
    flags = ("--saver", "hf", "--load_dir", tmp_path / source, "--save_dir", tmp_path / "hf", "--model_type", "llama2")
    vocab_file = () if source == "base" else ("--vocab_file", tmp_path / "base/tokenizer.model")
    code, out, err = run(SHARD, *flags, *vocab_file, "--true_vocab_size", 420)
    assert code == 0, err
    assert f"wrote {tmp_path / 'hf'} from" in out
    names = sorted(path.name for path in (tmp_path / "base").iterdir())
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == names
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_hugging_face_as_the_target_refuses_what_has_no_meaning(tmp_path):
    """A split, a full folder, no tokenizer, and a loader or family that is not the source's: said, nothing written."""
    make_hf(tmp_path / "base", make_config())
    assert run(SHARD, *shard_flags(tmp_path / "base", tmp_path / "megatron", 1, 1))[0] == 0
    for path in (tmp_path / "megatron").glob("tokenizer*"):
        path.unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    hf = ("--saver", "hf", "--model_type", "llama2")
    for flags, message in (
        ((*hf, "--load_dir", "base", "--save_dir", "hf", "--target_tensor_parallel_size", 2), "is not split"),
        ((*hf, "--load_dir", "base", "--save_dir", "full"), "full is not empty"),
        (
            (*hf, "--load_dir", "megatron", "--save_dir", "hf"),
            "megatron has no tokenizer.model or tokenizer.json; give --vocab_file",
        ),
        ((*hf, "--load_dir", "base", "--save_dir", "hf", "--loader", "megatron"), "is read by --loader hf"),
        (("--model_type", "falcon", "--load_dir", "base", "--save_dir", "hf"), "a different model; give llama2"),
    ):
        named = [tmp_path / word if word in ("base", "megatron", "hf", "full") and flags[i - 1].startswith("--")
                 and flags[i - 1].endswith("_dir") else word for i, word in enumerate(flags)]  # fmt: skip
        code, _, err = run(SHARD, *named)
        assert code in (2, 3), err
        assert message in err
        assert not (tmp_path / "hf").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_the_published_way_out(tmp_path):
    """checkpoint_util --load_iters, then megatron_to_hf with two flags: the tokenizer is what training recorded. It
    lies beside the merged weights, so that nothing else is needed of the folder that training read."""
    config = make_config()
    vocab_file = make_tokenizer(tmp_path / "tokenizer")
    extra = {"vocab_file": str(vocab_file), "consumed_train_samples": 4}
    megatron.save(
        tmp_path / "checkpoints", 60, config, make_state(config), tp=2, pp=1, dtype=torch.float32, extra_args=extra
    )
    flags = shard_flags(tmp_path / "checkpoints", tmp_path / "merged", 1, 1, "--load_iters", 60)
    assert run(SHARD, *flags)[0] == 0
    content = vocab_file.read_bytes()
    vocab_file.unlink()
    where = (f"--input_dir={tmp_path / 'merged'}", f"--output_dir={tmp_path / 'hf'}")
    code, _, err = run(EXPORT, *where, "--model", "llama2", "--num_output_shards", 3)
    assert code == 0, err
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == content
    assert 3 <= len(list((tmp_path / "hf").glob("model-*.safetensors"))) <= 4
    assert same(hf_weights.load(tmp_path / "hf")[1], make_state(config))
    (tmp_path / "merged/tokenizer.model").unlink()
    for more, message in (
        ((), "merged has no tokenizer.model or tokenizer.json; give --vocab_file"),
        (("--model", "falcon"), "--model falcon but"),
        (("--num_output_shards", 0, "--vocab_file", tmp_path / "hf"), "--num_output_shards 0: must be at least 1"),
    ):
        code, _, err = run(EXPORT, where[0], f"--output_dir={tmp_path / 'other'}", *more)
        assert code in (2, 3), err
        assert message in err
        assert not (tmp_path / "other").exists()


def test_upstreams_flags_and_defaults(tmp_path):
    """Sizes that are not given are the source's; upstream's flags about its processes are accepted and said to do
    nothing."""
    config = make_config()
    state = make_hf(tmp_path / "base", config)
    assert run(SHARD, *shard_flags(tmp_path / "base", tmp_path / "sharded", 2, 2))[0] == 0
    flags = ("--loader", "megatron", "--saver", "megatron", "--max_queue_size", 50, "--no_checking", "--fp16")
    folders = ("--load_dir", tmp_path / "sharded", "--save_dir", tmp_path / "again", "--model_type", "llama2")
    code, out, err = run(SHARD, *flags, *folders)
    assert code == 0, err
    assert out.count("has no effect") == 2
    assert len(list((tmp_path / "again/release").glob("mp_rank_??_00?"))) == 4
    _, found, args = megatron.load(tmp_path / "again")
    assert (args.tensor_model_parallel_size, args.params_dtype) == (2, torch.float16)
    assert same(found, {name: tensor.half() for name, tensor in state.items()})


@pytest.mark.parametrize("kind", ["rows", "swapped", "bit"])
def test_a_layout_that_is_cut_wrongly_is_not_published(tmp_path, monkeypatch, kind):
    """If a rank got other rows, up and gate changed places, or a bit flipped, the read-back finds it."""
    make_hf(tmp_path / "base", make_config())
    right = megatron_layout.rank_state

    def wrong(config, state, tp, pp, rank):
        local = right(config, state, tp, pp, rank)
        if kind == "rows" and rank == (1, 0):
            local[canonical_state.EMBEDDING] = local[canonical_state.EMBEDDING].roll(1, 0)
        elif kind == "swapped":
            name = f"layers.1.{megatron_layout.UP_GATE}"
            local[name] = torch.cat(local[name].chunk(2)[::-1])
        elif kind == "bit" and rank == (0, 1):
            local[f"layers.0.{megatron_layout.DOWN}"][3, 3] += 1e-3
        return local

    monkeypatch.setattr(megatron_layout, "rank_state", wrong)
    code, _, err = run(SHARD, *shard_flags(tmp_path / "base", tmp_path / "sharded", 2, 2))
    assert (code, "reads back different from what was written" in err) == (2, True)
    assert list((tmp_path / "sharded").iterdir()) == []


def test_an_export_folder_that_is_not_empty(tmp_path, monkeypatch):
    """By hand it is refused and left as it is; a launcher may replace its own unfinished output."""
    make_hf(tmp_path / "base", make_config())
    where = (f"--input_dir={tmp_path / 'base'}", f"--output_dir={tmp_path / 'hf'}")
    flags = (*where, "--vocab_file", tmp_path / "base/tokenizer.model")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/mine.txt").write_text("x")
    code, _, err = run(EXPORT, *flags)
    assert (code, "is not empty; give another folder" in err) == (2, True)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine.txt"]
    (tmp_path / "claim.json").write_text('{"attempt": "1"}')
    monkeypatch.setenv("SNAKMODEL_CLAIM", str(tmp_path / "claim.json"))
    monkeypatch.setenv("SNAKMODEL_ATTEMPT", "1")
    assert run(EXPORT, *flags)[0] == 0
    assert not (tmp_path / "hf/mine.txt").exists()


def test_mistakes_are_named_and_publish_nothing(tmp_path):
    """A wrong size, family, tokenizer, layout or vocabulary exits 2 with what to do and leaves no output."""
    make_hf(tmp_path / "base", make_config())
    convert = (f"--out={tmp_path / 'out'}", f"--model-path={tmp_path / 'base'}")
    code, _, err = run(CONVERT, "llama2", "--size=7", *convert)
    assert code == 2
    assert "--size=7 but the model has 0.0" in err
    code, _, err = run(CONVERT, "falcon", *convert)
    assert (code, "is a llama model, not falcon; give llama2" in err) == (2, True)
    make_hf(tmp_path / "small", make_config(vocab_size=430))
    config_path = tmp_path / "small/config.json"
    state = make_state(make_config(vocab_size=400))
    hf_weights._write_weights(tmp_path / "small", make_config(vocab_size=400), state, torch.float32, 10**9)
    config_path.write_text(config_path.read_text().replace('"vocab_size": 430', '"vocab_size": 400'))
    code, _, err = run(CONVERT, "llama2", f"--out={tmp_path / 'out'}", f"--model-path={tmp_path / 'small'}")
    assert (code, "420 pieces but the model's vocabulary is 400" in err) == (2, True)
    assert not (tmp_path / "out").exists()
    assert run(CONVERT, "llama2", f"--out={tmp_path / 'ok'}", f"--model-path={tmp_path / 'base'}")[0] == 0
    code, _, err = run(SHARD, *shard_flags(tmp_path / "ok", tmp_path / "out", 8, 1))
    assert (code, "tensor parallel size 8 does not divide num_attention_heads_kv = 4" in err) == (2, True)
    code, _, err = run(SHARD, *shard_flags(tmp_path / "ok", tmp_path / "out", 1, 1, "--true_vocab_size", 400))
    assert (code, "has a vocabulary of 420" in err) == (2, True)
    code, _, err = run(
        EXPORT, f"--input_dir={tmp_path / 'none'}", f"--output_dir={tmp_path / 'out'}", "--vocab_file", "x"
    )
    assert code == 3
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_whose_true_size_is_unknown_is_cut(tmp_path):
    """A padded file without true_vocab_size is cut to --true_vocab_size; without the flag its padding would stay."""
    config = make_config()
    state = make_state(config)
    megatron.save(tmp_path / "in", "release", config, state, tp=1, pp=1, dtype=torch.float32, extra_args={})
    path = tmp_path / "in/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["args"] = argparse.Namespace(**{k: v for k, v in vars(content["args"]).items() if k != "true_vocab_size"})
    torch.save(content, path)
    assert run(SHARD, *shard_flags(tmp_path / "in", tmp_path / "cut", 2, 1, "--true_vocab_size", 420))[0] == 0
    found_config, found, _ = megatron.load(tmp_path / "cut")
    assert found_config == config
    assert same(found, state)


@pytest.mark.parametrize("tied", [False, True])
def test_room_for_new_tokens(tmp_path, tied):
    """A larger --true_vocab_size adds rows that are the mean of all others; the old ones stay to the bit."""
    config = make_config(tie_embed_logits=tied)
    state = make_state(config, torch.bfloat16)
    megatron.save(tmp_path / "in", "release", config, state, tp=2, pp=1, dtype=torch.bfloat16, extra_args={})
    code, out, err = run(SHARD, *shard_flags(tmp_path / "in", tmp_path / "out", 1, 2, "--true_vocab_size", 425))
    assert code == 0, err
    assert "--true_vocab_size 425: 5 new rows, each the mean of the 420 old ones" in out
    found_config, found, args = megatron.load(tmp_path / "out")
    assert (found_config.vocab_size, args.true_vocab_size) == (425, 425)
    for name in ("embedding.weight", *(() if tied else ("lm_head.weight",))):
        assert torch.equal(found[name][:420], state[name])
        mean = state[name].float().mean(0).bfloat16()
        assert torch.equal(found[name][420:], mean.expand(5, -1))
    assert torch.equal(found["layers.3.mlp.w2.weight"], state["layers.3.mlp.w2.weight"])


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_special_tokens_in_an_export(tmp_path, kind):
    """New tokens get the ids that the data have, and others take roles, in the tokenizer and in config.json."""
    make_hf(tmp_path / "base", make_config())
    vocab_file = tmp_path / "base" / kind
    new = build(
        "SentencePieceTokenizer" if kind.endswith("model") else "HuggingFaceTokenizer",
        vocab_file,
        vocab_extra_ids_list="<|im_start|>,<|im_end|>",
    ).new_ids
    size = max(new.values()) + 1
    config = make_config(vocab_size=size)
    megatron.save(
        tmp_path / "in", "release", config, make_state(config), tp=1, pp=1, dtype=torch.float32, extra_args={}
    )
    where = (f"--input_dir={tmp_path / 'in'}", f"--output_dir={tmp_path / 'hf'}", "--vocab_file", vocab_file)
    extra = ("--vocab_extra_ids_list", "<|im_start|>,<|im_end|>", "--cache_dir", "x")
    roles = ("--override_special_tokens", "eos=<|im_end|>", "pad=<PAD>")
    code, _, err = run(EXPORT, *where, *extra, *roles)
    assert code == 0, err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in new} == new
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<PAD>")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == new["<|im_end|>"]
    plain = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer("rødgrød med fløde <|im_end|>", add_special_tokens=False)["input_ids"] == [
        *plain("rødgrød med fløde ", add_special_tokens=False)["input_ids"],
        new["<|im_end|>"],
    ]
    for flags, message in (
        (("--override_special_tokens", "eos=<|none|>"), "the tokenizer has no such token"),
        (("--override_special_tokens", "end=</s>"), "give ROLE=TOKEN"),
        (("--vocab_extra_ids_list", "<a>,<b>,<c>"), "in the model only"),
    ):
        code, _, err = run(EXPORT, *where[:1], f"--output_dir={tmp_path / 'no'}", *where[2:], *flags)
        assert code == 2
        assert message in err
        assert not (tmp_path / "no").exists()


def test_a_superseded_attempt_publishes_nothing(tmp_path, monkeypatch):
    """When the claim file names another attempt, the conversion exits 1 and its output folder does not appear."""
    make_hf(tmp_path / "base", make_config())
    (tmp_path / "claim.json").write_text('{"attempt": "2"}')
    monkeypatch.setenv("SNAKMODEL_CLAIM", str(tmp_path / "claim.json"))
    monkeypatch.setenv("SNAKMODEL_ATTEMPT", "1")
    code, _, err = run(CONVERT, "llama2", f"--out={tmp_path / 'out'}", f"--model-path={tmp_path / 'base'}")
    assert code == 1
    assert "superseded" in err
    assert not list((tmp_path / "out").glob("*"))
