"""python Megatron-LLM/weights_conversion/megatron_to_hf.py --input_dir=RUN/merged --load_iters 60 --output_dir=RUN/hf/iter_0000060 --vocab_file TOK

A Megatron checkpoint in any layout (or a training checkpoint) -> a Hugging Face folder with tokenizer, written beside,
read back and compared tensor by tensor, then renamed into place.
"""  # noqa: E501 (the command to type is one line)

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_llm import any_weights, hf_weights
from megatron_llm.files import CLAIM, UserError, publishing, run_main
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


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds something, unless a launcher runs this: it only repeats what is its own."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not os.environ.get(CLAIM):
        raise UserError(f"--output_dir {folder} is not empty; give another folder, or move it away")


def main() -> None:
    """Load, write beside, read back, publish."""
    args = parse_args()
    check_empty(args.output_dir)
    loaded = any_weights.load(args.input_dir, args.load_iters)
    dtype = DTYPES[args.dtype] if args.dtype else loaded.dtype
    with publishing(args.output_dir) as (temporary,):
        hf_weights.save(
            temporary,
            loaded.config,
            loaded.state,
            dtype=dtype,
            vocab_file=args.vocab_file,
            max_shard_size=args.max_shard_size,
        )
        hf_weights.check_written(temporary, loaded.config, loaded.state, dtype)
    print(f"wrote {args.output_dir} from {loaded.folder} ({dtype}); read back equal, tokenizer checked")


if __name__ == "__main__":
    run_main(main)
