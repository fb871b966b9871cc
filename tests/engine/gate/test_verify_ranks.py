"""The logits gate over real ranks: the engine's tensor and pipeline parallel code against Transformers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_llm.data.indexed_dataset import IndexedDatasetWriter
from tests.engine import engine_ranks
from tests.engine.gate.test_verify_correctness import broken, megatron
from tests.engine.small_llama import ENGINE, LINES, make_config, make_hf, make_tokenizer, make_training_checkpoint, run
from tests.engine.weights.test_hf_falcon import make_falcon

SCRIPT = ENGINE / "verify_correctness.py"
TENSOR, PIPELINE = ("--tensor_model_parallel_size", 2), ("--pipeline_model_parallel_size", 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a Hugging Face model, and Megatron layouts of it that are right or wrong in one way each."""
    folder = tmp_path_factory.mktemp("ranks")
    config = make_config(vocab_size=421)
    state = make_hf(folder / "hf", config)
    megatron(folder / "right", config, state, tp=2, pp=2)
    for kind in ("rotary", "up-gate", "kv groups"):
        megatron(folder / kind, config, broken(kind, config, state))
    megatron(folder / "theta", replace(config, rope_theta=1e6), state)
    name = "layers.2.attention.wo.weight"
    megatron(folder / "layer 2", config, {**state, name: state[name].flip(0)})
    make_training_checkpoint(folder / "checkpoints", 60, config, state)
    (folder / "text.txt").write_text("\n".join(LINES * 4) + "\n", encoding="utf-8")
    return folder


def verify(models, load, size, *more):
    """Run the gate on so many ranks: exit codes, each rank's output, the report (None when none was written)."""
    report = models / "report.json"
    report.unlink(missing_ok=True)
    flags = ["--model_name=llama2", "--load", models / load, "--huggingface_cache", models / "hf"]
    flags += ["--input", models / "text.txt", "--vocab_file", make_tokenizer(models / "tok"), "--seq_length", 48]
    flags += ["--iterations", 3, "--report", report]
    codes, texts = engine_ranks.run_script(SCRIPT, models, [*flags, *more], size)
    return codes, texts, json.loads(report.read_text()) if report.exists() else None


@pytest.mark.parametrize(
    ("load", "size", "more"),
    [
        ("right", 2, TENSOR),
        ("right", 4, (*TENSOR, "--sequence_parallel", "--micro_batch_size", 2)),
        ("checkpoints", 4, PIPELINE),
        ("right", 4, (*TENSOR, *PIPELINE, "--sequence_parallel")),
    ],
)
def test_right_weights_pass(models, load, size, more):
    """Over data, tensor and pipeline ranks and several of these, with an odd vocabulary, of a Megatron layout and a
    training checkpoint, logits and loss are Transformers'."""
    codes, texts, report = verify(models, load, size, *more, "--max_tolerance", 1e-4)
    assert codes == [0] * size, texts
    assert texts[0].count("iteration ") == report["batches"] == 3
    assert (report["passed"], report["argmax_agreement"]) == (True, 1.0)
    assert report["max_error"] < 1e-4
    assert report["loss_difference"] < 1e-5
    assert not any("iteration" in text for text in texts[1:])


def test_data_ranks_share_the_batches_of_one_process(models):
    """Two ranks without parallel sizes, and three batches: the report is that of one process, batch for batch."""
    alone, shared = (verify(models, "right", size)[2] for size in (1, 2))
    assert len({batch["their_loss"] for batch in alone["comparisons"]}) == 3
    for mine, other in zip(shared.pop("comparisons"), alone.pop("comparisons"), strict=True):
        assert mine == pytest.approx(other, abs=1e-5)
    assert shared == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    ("load", "layout", "where"),
    [
        ("rotary", (), "layer 0"),
        ("up-gate", PIPELINE, "layer 0"),
        ("kv groups", TENSOR, "layer 0"),
        ("theta", PIPELINE, "layer 0"),
        ("layer 2", PIPELINE, "layer 2"),
    ],
)
def test_wrong_weights_fail_on_every_rank(models, load, layout, where):
    """A faulty conversion exits 1 on all ranks, and the first layer that parts is named, on whichever rank it is."""
    codes, texts, report = verify(models, load, 2, *layout)
    assert codes == [1, 1], texts
    assert f"hidden states differ from here on: {where}\n" in texts[0]
    assert (report["passed"], report["first_parting"]) == (False, where)


def test_sixteen_bits(models):
    """--bf16 runs as training does: fp32 weights, bfloat16 computation."""
    codes, texts, report = verify(models, "right", 2, *TENSOR, "--bf16")
    assert codes == [0, 0], texts
    assert report["max_error"] > 1e-4


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ((*TENSOR, *PIPELINE), 2, "2 ranks are not a multiple of --tensor_model_parallel_size 2 x --pipeline_model_pa"),
        (("--device", "cpu"), 2, "--device cpu: where there are several ranks, each has a device of its own"),
        ((*TENSOR, "--fp16"), 2, "--fp16: over several ranks"),
        ((*TENSOR, "--load_iters", 60), 3, "iter_0000060 is missing"),
        ((*TENSOR, "--sequence_parallel", "--seq_length", 47), 2, "2 does not divide seq_length 47"),
    ],
)
def test_mistakes_end_every_rank(models, more, code, message):
    """Wrong sizes and missing files exit alike on all ranks; one line says why, and nothing is written."""
    codes, texts, report = verify(models, "right", 2, *more)
    assert codes == [code] * 2, texts
    assert "".join(texts).count("error: ") == 1
    assert message in texts[0]
    assert "Traceback" not in "".join(texts)
    assert report is None


def test_a_rank_that_crashes_takes_the_others_with_it(models):
    """Rank 0 cannot use the device that is asked for: it shows why, and the rank that waits for it fails too."""
    codes, texts, report = verify(models, "right", 2, *TENSOR, "--huggingface_device", "meta")
    assert all(code != 0 for code in codes), texts
    assert "meta tensor" in texts[0]
    assert report is None


@pytest.mark.parametrize(("family", "layout"), [("falcon", TENSOR), ("mistral", (*TENSOR, "--sequence_parallel"))])
def test_other_families_over_tensor_ranks(tmp_path, family, layout):
    """Falcon 7B's one kv head, which every rank has, and Mistral's window."""
    if family == "falcon":
        make_falcon(tmp_path / "hf", "7b")
    else:
        make_hf(tmp_path / "hf", make_config(sliding_window_size=16))
    convert = (family, f"--out={tmp_path / 'right'}", f"--model-path={tmp_path / 'hf'}")
    code, _, err = run("weights_conversion/hf_to_megatron.py", *convert)
    assert code == 0, err
    ids = np.random.RandomState(0).randint(0, 99, 500).astype(np.uint16)
    with IndexedDatasetWriter(tmp_path / "d.bin", tmp_path / "d.idx", ids.dtype) as dataset:
        dataset.add(ids, np.array([len(ids)], np.int32))
    flags = [f"--model_name={family}", "--load", tmp_path / "right", "--huggingface_cache", tmp_path / "hf"]
    flags += ["--data_path", tmp_path / "d", "--seq_length", 48, "--iterations", 2, "--max_tolerance", 1e-4]
    codes, texts = engine_ranks.run_script(SCRIPT, tmp_path, [*flags, *layout], 2)
    assert codes == [0, 0], texts


def test_a_tied_model_over_tensor_ranks(tmp_path):
    """The embedding's rows, cut over two ranks, are the output layer too."""
    config = make_config(tie_embed_logits=True, vocab_size=421)
    megatron(tmp_path / "right", config, make_hf(tmp_path / "hf", config, torch.float32))
    (tmp_path / "text.txt").write_text("\n".join(LINES * 4) + "\n", encoding="utf-8")
    codes, texts, report = verify(tmp_path, "right", 2, *TENSOR, "--max_tolerance", 1e-4)
    assert codes == [0, 0], texts
    assert report["passed"]
