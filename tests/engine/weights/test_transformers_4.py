"""Exported folders in Transformers 4, whose spelling of config.json is another: the same logits and token ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine.small_llama import LINES, make_config, make_hf

PACKAGES = (
    "transformers==4.57.1",
    "huggingface_hub==0.36.0",
    "tokenizers==0.22.1",
    *(
        "requests",
        "certifi",
        "charset-normalizer",
        "idna",
        "urllib3",
    ),  # what newer versions of huggingface_hub no longer need
)
EXPORTS = {
    "llama": {"rope_theta": 5e5},
    "linear": {"rope_scaling_factor": 4.0},
    "llama3": {"rope_scaling_type": "llama3", "rope_scaling_factor": 8.0, "rope_original_max_positions": 32},
    "mistral": {"sliding_window_size": 16},
    "tied": {"tie_embed_logits": True},
}
TEXTS = [*LINES, "   tre mellemrum", " \n ny linje"]
READ = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4."), transformers.__version__
root, names, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
found = {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{root}/{name}", torch_dtype="auto")
    logits = model.float().eval()(torch.arange(48).view(1, 48)).logits.detach()
    tokenizer = AutoTokenizer.from_pretrained(f"{root}/{name}")
    stored = str(model.config.torch_dtype)
    found[name] = {"dtype": stored, "logits": logits.tolist(), "ids": [tokenizer(text)["input_ids"] for text in texts]}
json.dump(found, open(f"{root}/found.json", "w"))
"""


def test_transformers_4_reads_what_is_written(tmp_path, install_apart):
    """Theta, linear and Llama 3's scaling, Mistral's window, tied embeddings, the dtype and the tokenizer arrive."""
    for name, changes in EXPORTS.items():
        make_hf(tmp_path / name, make_config(**changes), torch.bfloat16)
    command = [sys.executable, "-c", READ, str(tmp_path), json.dumps(list(EXPORTS)), json.dumps(TEXTS)]
    environment = {**os.environ, "PYTHONPATH": str(install_apart(*PACKAGES)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    for name, theirs in json.loads((tmp_path / "found.json").read_text()).items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).float().eval()
        logits = model(torch.arange(48).view(1, 48)).logits
        torch.testing.assert_close(torch.tensor(theirs["logits"]), logits, atol=1e-4, rtol=0)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
        assert theirs["dtype"] == "torch.bfloat16"
