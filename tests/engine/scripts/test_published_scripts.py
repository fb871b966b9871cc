"""The command lines of the published scripts, steps 2 to 8, with the sizes of a tiny Llama 2.

Besides the sizes (of the model, its vocabulary, a sample, a batch, the run) only these differ: folders are below a
temporary one, devices are `cpu` for `cuda`, the port is a free one, and step 5 writes where step 6 reads, which the
published scripts do not.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import torch

from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import megatron
from tests.engine.small_llama import ENGINE, LINES, VOCAB, make_config, make_hf, run, same

COMMON_ARGS = "--hidden_dropout 0.0 --attention_dropout 0.0 --no_bias_gelu_fusion"
LLAMA_ARGS = "--use_rms_norm --glu_activation swiglu --no_tie_embed_logits --no_new_tokens --layernorm_epsilon 1e-5"
LOG_ARGS = "--log_interval 1 --save_interval 2 --eval_interval 100"
TRAIN_ARGS = "--train_iters 2 --lr_decay_style cosine --lr_warmup_iters 1 --lr 15e-6 --min_lr 5e-8 --clip_grad 1.0"

PREPROCESS = """python3 tools/preprocess_data.py --input={root}/_pretraining_data/danish_pretraining_data.jsonl
 --output_prefix={root}/tokenized/ --tokenizer_type=SentencePieceTokenizer
 --vocab_file={root}/Llama-2-7b-hf/tokenizer.model --chunk_size=64 --workers=4 --no_new_tokens"""
CONVERT = """python3 weights_conversion/hf_to_megatron.py llama2 --size=0 --out={root}/megatron/weights/
 --cache-dir={root}/Llama-2-7b-hf"""
CHECK = f"""torchrun $DISTRIBUTED_ARGS verify_correctness.py --model_name=llama2 --model_size=0
 --load={{root}}/megatron/weights/ --data_path={{root}}/tokenized/_text_document
 --tokenizer_type=SentencePieceTokenizer --vocab_file={{root}}/megatron/weights/tokenizer.model
 --huggingface_cache={{root}}/Llama-2-7b-hf --huggingface_device="cpu:0,1,2,3" {COMMON_ARGS} {LLAMA_ARGS}"""
SHARD = f"""python tools/checkpoint_util.py --target_tensor_parallel_size 4 --target_pipeline_parallel_size 1
 --load_dir {{root}}/megatron/weights/ --save_dir {{root}}/sharded_4/weights/ --model_type llama2
 --true_vocab_size {VOCAB} --bf16"""
TRAIN = f"""torchrun $DISTRIBUTED_ARGS finetune.py --tensor_model_parallel_size 4 --pipeline_model_parallel_size 1
 --load {{root}}/sharded_4/weights/ --save {{root}}/sharded_4/weights/
 --tensorboard_dir {{root}}/sharded_4/weights/tensorboard --data_path {{root}}/tokenized/_text_document
 --model_name llama2 --tokenizer_type SentencePieceTokenizer --vocab_file {{root}}/megatron/weights/tokenizer.model
 --bf16 --use_flash_attn --no_bias_gelu_fusion --micro_batch_size 1 --global_batch_size 2 --seq_length 32 --seed 8446
 --sequence_parallel --recompute_granularity selective --use_checkpoint_args --use_checkpoint_opt_param_scheduler
 {COMMON_ARGS} {LOG_ARGS} {TRAIN_ARGS} {LLAMA_ARGS}"""
MERGE = f"""python tools/checkpoint_util.py --target_tensor_parallel_size 1 --target_pipeline_parallel_size 1
 --load_dir {{root}}/sharded_4/weights
 --save_dir {{root}}/checkpoints/merged/{{root}}/sharded_4/weights/{{name}}/weights --model_type llama2
 --true_vocab_size {VOCAB} --load_iters {{iteration}} --bf16"""
EXPORT = """python weights_conversion/megatron_to_hf.py
 --input_dir={root}/checkpoints/merged/{root}/sharded_4/weights/{name}/weights
 --output_dir={root}/hf_model_exports/checkpoint_{iteration}/"""


def make_inputs(root: Path) -> dict[str, torch.Tensor]:
    """The base model, in 16 bits as it is published, and the documents; returns the model's tensors."""
    heads = {"num_attention_heads": 4, "num_attention_heads_kv": 4, "kv_channels": 8}
    state = make_hf(root / "Llama-2-7b-hf", make_config(num_layers=2, **heads), torch.float16)
    (root / "_pretraining_data").mkdir()
    lines = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in LINES * 12)
    (root / "_pretraining_data/danish_pretraining_data.jsonl").write_text(lines, encoding="utf-8")
    return state


def execute(command: str, **names: object) -> str:
    """Run one of the commands in the engine's folder: what it printed. Python's run in this process."""
    program, *words = shlex.split(command.format(**names))
    if program != "torchrun":
        code, out, err = run(*words)
    else:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        distributed = f"--nproc_per_node 4 --nnodes 1 --node_rank 0 --master_addr localhost --master_port {port}"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *distributed.split(), *words[1:]],
            cwd=ENGINE,
            env=os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,  # only so that ranks that hang do not hang the suite
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    assert code == 0, f"{command}\n{out}\n{err}"
    return out


def test_the_published_scripts_run_through(tmp_path: Path) -> None:
    """Tokenise, convert, check on four data-parallel ranks, shard, train on four tensor ranks, merge and export every
    checkpoint: each folder has what the next command asks for, and what comes out is what was trained."""
    state = make_inputs(tmp_path)
    execute(PREPROCESS, root=tmp_path)
    execute(CONVERT, root=tmp_path)
    said = execute(CHECK, root=tmp_path)
    assert said.count("argmax agreement 100.00%") == 10
    execute(SHARD, root=tmp_path)
    said = execute(TRAIN, root=tmp_path)
    assert " iteration        2/       2 | consumed samples:            4 |" in said
    folders = sorted((tmp_path / "sharded_4/weights").glob("iter_*"))
    assert [folder.name for folder in folders] == ["iter_0000002"]
    for folder in folders:
        where = {"root": tmp_path, "name": folder.name, "iteration": int(folder.name[5:])}
        execute(MERGE, **where)
        execute(EXPORT, **where)
    exported = tmp_path / "hf_model_exports/checkpoint_2"
    merged = tmp_path / f"checkpoints/merged/{tmp_path}/sharded_4/weights/iter_0000002/weights"
    found = hf_weights.load(exported)[1]
    assert same(found, megatron.load(merged)[1])
    moved = [name for name, tensor in found.items() if not torch.equal(tensor, state[name].bfloat16())]
    assert moved
    assert all(torch.allclose(tensor.float(), state[name].float(), atol=0.05) for name, tensor in found.items())
    base = tmp_path / "Llama-2-7b-hf"
    for name in ("tokenizer.model", "tokenizer.json", "generation_config.json"):
        assert (exported / name).read_bytes() == (base / name).read_bytes()
