"""python Megatron-LLM/weights_conversion/megatron_to_hf.py --input_dir=RUN/merged --load_iters 60 --output_dir=RUN/hf/iter_0000060 --vocab_file TOK

A Megatron checkpoint in any layout (or a training checkpoint) -> a Hugging Face folder with tokenizer, written beside,
read back and compared tensor by tensor, then renamed into place.
"""  # noqa: E501 (the command to type is one line)

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_llm import any_weights, hf_weights
from megatron_llm.files import run_main
from megatron_llm.megatron_weights import DTYPES


def parse_args() -> argparse.Namespace:
    """Upstream's flags, and the iteration, dtype and shard size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", type=Path, required=True, help="folder with latest_checkpointed_iteration.txt")
    parser.add_argument("--load_iters", type=int, help="iteration to export; by default the tracker's")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--vocab_file", type=Path, required=True, help="tokenizer.model, tokenizer.json, or the model's folder"
    )
    parser.add_argument("--max_shard_size", default="10GB")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="by default as stored")
    return parser.parse_args()


def main() -> None:
    """Load, write beside, read back, publish."""
    args = parse_args()
    loaded = any_weights.load(args.input_dir, args.load_iters)
    dtype = DTYPES[args.dtype] if args.dtype else loaded.dtype
    hf_weights.export(
        args.output_dir,
        loaded.config,
        loaded.state,
        dtype=dtype,
        vocab_file=args.vocab_file,
        max_shard_size=args.max_shard_size,
    )
    print(f"wrote {args.output_dir} from {loaded.folder} ({dtype}); read back equal, tokenizer checked")


if __name__ == "__main__":
    run_main(main)
