"""python Megatron-LLM/tools/checkpoint_util.py --target_tensor_parallel_size 4 --target_pipeline_parallel_size 1 --load_dir RUN/megatron --save_dir RUN/sharded --model_type llama2 --true_vocab_size 32000 --bf16

A Megatron checkpoint in any layout, a training checkpoint or a Hugging Face folder -> the same iteration in another
TP x PP layout, read back and compared before it is published. (To Hugging Face: weights_conversion/megatron_to_hf.py.)
"""  # noqa: E501 (the command to type is one line)

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_llm import any_weights, megatron_weights
from megatron_llm.any_weights import Loaded
from megatron_llm.files import UserError, run_main
from megatron_llm.reshard import EMBEDDING, HEAD, LazyState

CARRIED = ("seq_length", "tokenizer_type", "consumed_train_samples", "consumed_valid_samples")
"""Arguments of the source that the new layout keeps."""


def parse_args() -> argparse.Namespace:
    """Upstream's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target_tensor_parallel_size", type=int, required=True)
    parser.add_argument("--target_pipeline_parallel_size", type=int, required=True)
    parser.add_argument("--load_dir", type=Path, required=True)
    parser.add_argument("--load_iters", type=int, help="iteration to read; by default the tracker's")
    parser.add_argument("--save_dir", type=Path, required=True)
    parser.add_argument("--model_type", required=True, choices=("llama", "llama2", "codellama", "mistral", "falcon"))
    parser.add_argument(
        "--true_vocab_size", type=int, help="vocabulary without padding; compared with the checkpoint's"
    )
    dtype = parser.add_mutually_exclusive_group()
    dtype.add_argument("--bf16", dest="dtype", action="store_const", const="bf16", help="cast; by default as stored")
    dtype.add_argument("--fp16", dest="dtype", action="store_const", const="fp16")
    dtype.add_argument("--fp32", dest="dtype", action="store_const", const="fp32")
    return parser.parse_args()


def with_true_vocabulary(loaded: Loaded, size: int) -> Loaded:
    """Cut a vocabulary whose true size the checkpoint does not record; raise UserError when the sizes contradict."""
    found = loaded.config.vocab_size
    if size == found:
        return loaded
    if size > found or loaded.args.get("true_vocab_size"):
        raise UserError(f"--true_vocab_size {size} but {loaded.folder} has a vocabulary of {found}; give {found}")

    def cut(name: str) -> Tensor:
        return loaded.state[name][:size] if name in (EMBEDDING, HEAD) else loaded.state[name]

    return replace(loaded, config=replace(loaded.config, vocab_size=size), state=LazyState(loaded.state, cut))


def main() -> None:
    """Load, cut, publish."""
    args = parse_args()
    loaded = any_weights.load(args.load_dir, args.load_iters)
    if args.true_vocab_size is not None:
        loaded = with_true_vocabulary(loaded, args.true_vocab_size)
    final = megatron_weights.save(
        args.save_dir,
        loaded.iteration,
        loaded.config,
        loaded.state,
        tp=args.target_tensor_parallel_size,
        pp=args.target_pipeline_parallel_size,
        dtype=megatron_weights.DTYPES[args.dtype] if args.dtype else loaded.dtype,
        extra_args={name: loaded.args[name] for name in CARRIED if loaded.args.get(name) is not None},
    )
    print(f"wrote {final} from {loaded.folder}")


if __name__ == "__main__":
    run_main(main)
