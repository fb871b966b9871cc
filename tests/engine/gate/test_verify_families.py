"""Mistral, Llama 3.1 and Falcon through conversion and the logits gate, against Transformers' own models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_llm.data.indexed_dataset import IndexedDatasetWriter
from tests.engine.small_llama import make_config, make_hf, run
from tests.engine.weights.test_hf_falcon import make_falcon

LLAMA3 = {"rope_scaling_type": "llama3", "rope_scaling_factor": 8.0, "rope_original_max_positions": 32}


def verify(folder, family):
    """Convert folder/hf and run the gate on random tokens; returns exit code, output and the report."""
    base, megatron = folder / "hf", folder / "megatron"
    code, _, err = run("weights_conversion/hf_to_megatron.py", family, f"--out={megatron}", f"--model-path={base}")
    assert code == 0, err
    ids = np.random.RandomState(0).randint(0, 99, 500).astype(np.uint16)
    with IndexedDatasetWriter(folder / "d.bin", folder / "d.idx", ids.dtype) as dataset:
        dataset.add(ids, np.array([len(ids)], np.int32))
    flags = ["--load", megatron, "--huggingface_cache", base, "--data_path", folder / "d", "--seq_length", 48]
    flags += ["--iterations", 2, "--max_tolerance", 1e-4, "--report", folder / "report.json"]
    code, out, err = run("verify_correctness.py", f"--model_name={family}", *flags)
    return code, out + err, json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", {"sliding_window_size": 16}), ("llama2", {"max_position_embeddings": 256, **LLAMA3})],
)
def test_settings_beyond_llama_2(tmp_path, family, changes):
    """A window shorter than the text, and Llama 3.1's rotary scaling, agree with Transformers within 1e-4."""
    make_hf(tmp_path / "hf", make_config(**changes))
    code, said, _ = verify(tmp_path, family)
    assert code == 0, said


def test_a_forgotten_window_fails(tmp_path):
    """If the window were lost on the way, the gate would say so."""
    make_hf(tmp_path / "hf", make_config(sliding_window_size=16))
    assert verify(tmp_path, "mistral")[0] == 0
    path = tmp_path / "megatron/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["args"].sliding_window_size = None
    torch.save(content, path)
    flags = ["--load", tmp_path / "megatron", "--huggingface_cache", tmp_path / "hf", "--data_path", tmp_path / "d"]
    code, out, _ = run("verify_correctness.py", "--model_name=mistral", *flags, "--seq_length", 48)
    assert (code, "differ from here on: layer 0" in out) == (1, True)


@pytest.mark.parametrize("variant", ["7b", "40b", "11b"])
def test_falcon(tmp_path, variant):
    """7B's single kv head, 40B's two norms and 11B's one agree with Transformers within 1e-4."""
    make_falcon(tmp_path / "hf", variant)
    code, said, _ = verify(tmp_path, "falcon")
    assert code == 0, said
