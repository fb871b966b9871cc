"""The logits gate: agrees with Transformers when the weights are right, fails for every way to convert them wrongly."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from megatron_llm.data.indexed_dataset import IndexedDatasetWriter
from megatron_llm.tokenizer import build as tokenizer
from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import megatron as megatron_weights
from megatron_llm.weights import megatron_layout
from tests.engine.small_llama import (
    LINES,
    make_config,
    make_hf,
    make_state,
    make_tokenizer,
    make_training_checkpoint,
    run,
)

SCRIPT = "verify_correctness.py"


def megatron(root, config, state, extra=None, *, tp=1, pp=1):
    """A Megatron checkpoint of these weights."""
    megatron_weights.save(root, "release", config, state, tp=tp, pp=pp, dtype=torch.float32, extra_args=extra or {})


def write_text(folder):
    """A jsonl file of the Danish lines."""
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES * 4), encoding="utf-8")
    return path


def verify(folder, load, *more, source=None):
    """Run the gate on a folder that holds `hf`, with the text unless `source` names other data."""
    flags = ["--model_name=llama2", "--load", load, "--huggingface_cache", folder / "hf", "--huggingface_device", "cpu"]
    flags += source or ["--input", write_text(folder)]
    flags += ["--tokenizer_type", "SentencePieceTokenizer", "--vocab_file", make_tokenizer(folder / "tok")]
    flags += ["--seq_length", 48, "--iterations", 3, "--report", folder / "report.json"]
    return run(SCRIPT, *flags, *more)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads_kv": 8, "kv_channels": 4},
        {"tie_embed_logits": True, "rope_theta": 5e5, "rope_scaling_factor": 4.0},
        {"layernorm_epsilon": 1e-2, "num_attention_heads_kv": 1},
    ],
)
def test_right_weights_pass_within_a_ten_thousandth(tmp_path, changes):
    """GQA, MHA, MQA, tied embeddings, theta, linear scaling and epsilon: the largest logit error stays under 1e-4."""
    config = make_config(**changes)
    state = make_hf(tmp_path / "hf", config)
    megatron(tmp_path / "megatron", config, state)
    code, out, err = verify(tmp_path, tmp_path / "megatron", "--tolerance", 0.01, "--max_tolerance", 1e-4)
    assert code == 0, out + err
    assert out.count("iteration ") == 3
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["passed"], report["batches"], report["first_parting"]) == (True, 3, None)
    assert report["max_error"] < 1e-4
    assert report["argmax_agreement"] == 1.0


def test_every_source_of_weights_and_tokens(tmp_path):
    """Sharded Megatron layouts and training checkpoints; Arrow, tokenised and plain text; all pass and agree."""
    config = make_config()
    state = make_hf(tmp_path / "hf", config)
    megatron(tmp_path / "sharded", config, state, tp=2, pp=2)
    make_training_checkpoint(tmp_path / "checkpoints", 60, config, state)
    arrow = tmp_path / "text.arrow"
    table = pa.table({"text": list(LINES) * 4})
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    plain = tmp_path / "text.txt"
    plain.write_text("\n".join(LINES * 4) + "\n", encoding="utf-8")
    encoder = tokenizer.build("SentencePieceTokenizer", make_tokenizer(tmp_path / "tok"), no_new_tokens=True)
    ids = [np.array(encoder.encode(line), np.uint16) for line in LINES * 4]
    with IndexedDatasetWriter(tmp_path / "d.bin", tmp_path / "d.idx", np.dtype(np.uint16)) as dataset:
        dataset.add(np.concatenate(ids), np.array([len(row) for row in ids], np.int32))
    reports = []
    for load, source in (
        ("sharded", ["--input", arrow]),
        ("checkpoints", ["--input", plain]),
        ("checkpoints", ["--data_path", tmp_path / "d"]),
    ):
        code, out, err = verify(tmp_path, tmp_path / load, source=source)
        assert code == 0, out + err
        reports.append((tmp_path / "report.json").read_text())
    assert len(set(reports)) == 1


def shifted_groups(weight, size):
    """Every kv head moved to the next group."""
    return weight.roll(size, dims=0)


def broken(kind, config, state):
    """The weights as a faulty conversion would leave them."""
    changed = dict(state)
    for number in range(config.num_layers):
        q, k, w1, w3 = (
            f"layers.{number}.{name}.weight" for name in ("attention.wq", "attention.wk", "mlp.w1", "mlp.w3")
        )
        if kind == "rotary":
            changed[q], changed[k] = (megatron_layout.interleave(state[name], config.kv_channels) for name in (q, k))
        elif kind == "up-gate":
            changed[w1], changed[w3] = state[w3], state[w1]
        elif kind == "kv groups":
            changed[k] = shifted_groups(state[k], config.kv_channels)
    return changed


@pytest.mark.parametrize("kind", ["rotary", "up-gate", "kv groups"])
def test_wrong_conversions_fail_at_the_first_layer(tmp_path, kind):
    """Halves taken for pairs, up swapped with gate, kv heads of another group: exit 1, and layer 0 is named."""
    config = make_config()
    state = make_hf(tmp_path / "hf", config)
    megatron(tmp_path / "megatron", config, broken(kind, config, state))
    code, out, _ = verify(tmp_path, tmp_path / "megatron")
    assert code == 1
    assert "hidden states differ from here on: layer 0" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["passed"], report["first_parting"]) == (False, "layer 0")
    assert report["mean_error"] > 0.01


def test_small_logits_do_not_hide_a_wrong_conversion(tmp_path):
    """With weights a tenth as large, one layer's swapped up and gate err by less than 0.01, and still fail."""
    config = make_config()
    state = make_state(config)
    small = {name: tensor if "norm" in name else 0.1 * tensor for name, tensor in state.items()}
    vocab_file = make_tokenizer(tmp_path / "tok")
    hf_weights.save(tmp_path / "hf", config, small, dtype=torch.float32, vocab_file=vocab_file)
    w1, w3 = "layers.0.mlp.w1.weight", "layers.0.mlp.w3.weight"
    megatron(tmp_path / "right", config, small)
    assert verify(tmp_path, tmp_path / "right")[0] == 0
    megatron(tmp_path / "wrong", config, {**small, w1: small[w3], w3: small[w1]})
    assert verify(tmp_path, tmp_path / "wrong")[0] == 1
    assert json.loads((tmp_path / "report.json").read_text())["mean_error"] < 0.01


@pytest.mark.parametrize("extra", [{"rope_theta": 1e6}, {"rope_scaling_factor": 2.0}, {"layernorm_epsilon": 0.5}])
def test_wrong_settings_fail(tmp_path, extra):
    """The same tensors with another theta, scaling or epsilon in the checkpoint's args exit 1."""
    config = make_config()
    megatron(tmp_path / "megatron", replace(config, **extra), make_hf(tmp_path / "hf", config))
    assert verify(tmp_path, tmp_path / "megatron")[0] == 1


def test_the_layer_that_is_wrong_is_named(tmp_path):
    """A fault in layer 2, the embedding or the output layer alone is located."""
    config = make_config()
    state = make_hf(tmp_path / "hf", config)
    for name, where in (
        ("layers.2.attention.wo.weight", "layer 2"),
        ("embedding.weight", "embedding"),
        ("lm_head.weight", "output"),
    ):
        megatron(tmp_path / "megatron", config, {**state, name: state[name].flip(0)})
        code, out, _ = verify(tmp_path, tmp_path / "megatron")
        assert (code, f"differ from here on: {where}\n" in out) == (1, True)


def test_nan_and_the_maximum_fail(tmp_path):
    """NaN logits are not within a tolerance, and a small mean error does not excuse a large maximum."""
    config = make_config()
    state = make_hf(tmp_path / "hf", config)
    head = state["lm_head.weight"].clone()
    head[7] *= 1.02
    megatron(tmp_path / "megatron", config, {**state, "lm_head.weight": head})
    assert verify(tmp_path, tmp_path / "megatron")[0] == 0
    assert verify(tmp_path, tmp_path / "megatron", "--max_tolerance", 1e-4)[0] == 1
    head[7] = float("nan")
    megatron(tmp_path / "megatron", config, {**state, "lm_head.weight": head})
    assert verify(tmp_path, tmp_path / "megatron")[0] == 1


def test_sixteen_bits(tmp_path):
    """--bf16 runs both models in bf16, with its own default tolerance."""
    config = make_config()
    state = make_hf(tmp_path / "hf", config)
    megatron(tmp_path / "megatron", config, state)
    losses = []
    for flags, tolerance in (([], 0.01), (["--bf16"], 0.1)):
        assert verify(tmp_path, tmp_path / "megatron", *flags)[0] == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["tolerance"] == tolerance
        losses.append(report["comparisons"][0]["our_loss"])
    assert 0 < abs(losses[0] - losses[1]) < 0.1


def test_the_published_flags_are_accepted_and_contradictions_refused(tmp_path):
    """Step 4's model flags run as published; an epsilon that is not the checkpoint's exits 2."""
    config = make_config()
    megatron(tmp_path / "megatron", config, make_hf(tmp_path / "hf", config))
    common = ["--hidden_dropout", 0.0, "--attention_dropout", 0.0, "--no_bias_gelu_fusion"]
    llama = ["--use_rms_norm", "--glu_activation", "swiglu", "--no_tie_embed_logits", "--no_new_tokens"]
    flags = [*common, *llama, "--model_size=7"]
    assert verify(tmp_path, tmp_path / "megatron", *flags, "--layernorm_epsilon", 1e-5)[0] == 0
    code, _, err = verify(tmp_path, tmp_path / "megatron", *flags, "--layernorm_epsilon", 1e-6)
    assert (code, "--layernorm_epsilon 1e-06 but" in err) == (2, True)
    code, _, err = verify(tmp_path, tmp_path / "megatron", "--model_name=falcon")
    assert (code, "--model_name falcon but" in err) == (2, True)
    code, _, err = verify(tmp_path, tmp_path / "megatron", "--seq_length", 65)
    assert (code, "--seq_length 65 but" in err, "has 64 positions" in err) == (2, True, True)
    assert verify(tmp_path, tmp_path / "megatron", "--huggingface_device", "cpu:0,1,2,3")[0] == 0
    code, _, err = verify(tmp_path, tmp_path / "megatron", "--huggingface_device", "nowhere,1")
    assert (code, "'nowhere,1' is not a device" in err) == (2, True)
    tied = replace(config, tie_embed_logits=True)
    megatron(tmp_path / "tied", tied, {k: v for k, v in make_state(config).items() if k != "lm_head.weight"})
    code, _, err = verify(tmp_path, tmp_path / "tied", *flags)
    assert (code, "--no_tie_embed_logits True but" in err) == (2, True)


def test_rows_are_as_long_as_the_checkpoints_samples(tmp_path):
    """Without --seq_length, as published: the checkpoint's, and at most its positions."""
    config = make_config()
    (tmp_path / "short.txt").write_text("hej\n")
    flags = ["--model_name=llama2", "--huggingface_cache", tmp_path / "hf", "--input", tmp_path / "short.txt"]
    flags += ["--vocab_file", make_tokenizer(tmp_path / "tok"), "--load"]
    for seq_length, expected in ((24, 25), (64, 65), (200, 65)):
        megatron(tmp_path / "megatron", config, make_state(config), {"seq_length": seq_length})
        code, _, err = run(SCRIPT, *flags, tmp_path / "megatron")
        assert (code, f"one row needs {expected};" in err) == (2, True)


def test_the_data_must_be_the_tokenizers(tmp_path):
    """A manifest beside --data_path that names another tokenizer than --vocab_file is refused; without one it is said
    that nothing is compared."""
    config = make_config()
    megatron(tmp_path / "megatron", config, make_hf(tmp_path / "hf", config))
    vocab_file = make_tokenizer(tmp_path / "tok")
    prefix = tmp_path / "d" / "_text_document"
    flags = ("--tokenizer_type=SentencePieceTokenizer", "--vocab_file", vocab_file, "--no_new_tokens")
    code, _, err = run(
        "tools/preprocess_data.py", "--input", write_text(tmp_path), f"--output_prefix={tmp_path}/d/", *flags
    )
    assert code == 0, err
    source = ["--data_path", prefix]
    assert verify(tmp_path, tmp_path / "megatron", source=source)[0] == 0
    path = prefix.with_name("_text_document.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"tokenizer_fingerprint": "another"}))
    code, _, err = verify(tmp_path, tmp_path / "megatron", source=source)
    assert (code, f"{prefix} was not tokenised with --vocab_file" in err) == (2, True)
    path.unlink()
    code, out, _ = verify(tmp_path, tmp_path / "megatron", source=source)
    assert (code, "it is not checked that the data fits --vocab_file" in out) == (0, True)


def test_unusable_inputs_are_named(tmp_path):
    """Too little text, ids beyond the vocabulary, another vocabulary and missing files each stop with a reason."""
    config = make_config()
    state = make_hf(tmp_path / "hf", config)
    megatron(tmp_path / "megatron", config, state)
    short = tmp_path / "short.txt"
    short.write_text("hej\n")
    code, _, err = verify(tmp_path, tmp_path / "megatron", source=["--input", short])
    assert (code, "one row needs 49" in err) == (2, True)
    code, _, err = verify(tmp_path, tmp_path / "megatron", source=["--input", tmp_path / "none.arrow"])
    assert (code, "none.arrow is missing" in err) == (3, True)
    code, _, err = verify(tmp_path, tmp_path / "megatron", "--load_iters", 60)
    assert (code, "iter_0000060 is missing" in err) == (3, True)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"txt": "hej"}\n')
    code, _, err = verify(tmp_path, tmp_path / "megatron", source=["--input", wrong])
    assert (code, "wrong.jsonl, line 1: it has no 'text', only ['txt']" in err) == (2, True)
    small = make_config(vocab_size=300)
    cut = {name: tensor[:300] if tensor.shape[0] == 420 else tensor for name, tensor in state.items()}
    megatron(tmp_path / "small", small, cut)
    code, _, err = verify(tmp_path, tmp_path / "small")
    assert (code, "the model's vocabulary has only 300 tokens; give the model's own tokenizer" in err) == (2, True)


def test_the_tokenizer_of_the_export(tmp_path):
    """On real text its ids are sentencepiece's; another tokenizer in the folder fails the gate and is shown."""
    config = make_config()
    megatron(tmp_path / "megatron", config, make_hf(tmp_path / "hf", config))
    source = write_text(tmp_path)
    source.write_text(source.read_text() + json.dumps({"text": "et <s> midt i teksten"}) + "\n")
    flags = ["--compare_tokenizer", "--tolerance", 0.01]
    code, out, err = verify(tmp_path, tmp_path / "megatron", *flags, source=["--input", source])
    assert code == 0, out + err
    found = json.loads((tmp_path / "report.json").read_text())["tokenizer"]
    assert (found["texts"], found["control_text"], found["first_difference"]) == (41, 1, None)
    assert found["tokens"] > 500
    pieces = "in a document, the text of these pieces becomes the piece itself: <unk> <s> </s>"
    assert pieces in found["known_differences"]
    assert "loaded by LlamaTokenizer instead of AutoTokenizer, ' ' has different ids" in found["known_differences"]
    path = tmp_path / "hf/tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["merges"] = raw["model"]["merges"][::-1]
    path.write_text(json.dumps(raw))
    code, out, _ = verify(tmp_path, tmp_path / "megatron", *flags, source=["--input", source])
    assert (code, "FAILED: the tokenizer gives different ids" in out) == (1, True)
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is False


def test_divergence_from_the_base(tmp_path):
    """--divergence writes the table of the loaded weights against --base_model's, and needs it."""
    config = make_config()
    state = make_hf(tmp_path / "hf", config)
    make_hf(tmp_path / "base", config)
    megatron(tmp_path / "megatron", config, state)
    code, out, err = verify(
        tmp_path, tmp_path / "megatron", "--base_model", tmp_path / "base", "--divergence", tmp_path / "d.json"
    )
    assert code == 0, out + err
    assert {one["mean_absolute_change"] for one in json.loads((tmp_path / "d.json").read_text())} == {0.0}
    code, _, err = verify(tmp_path, tmp_path / "megatron", "--divergence", tmp_path / "d.json")
    assert (code, "--divergence needs --base_model" in err) == (2, True)
