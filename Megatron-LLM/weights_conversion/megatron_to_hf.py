"""python Megatron-LLM/weights_conversion/megatron_to_hf.py --input_dir=RUN/merged --load_iters 60 --output_dir=RUN/hf/iter_0000060 [--vocab_file TOK]

Converts a Megatron checkpoint in any layout (or a training checkpoint) to a Hugging Face folder with its tokenizer. The
folder is written beside its final place, read back and compared tensor by tensor, and then renamed into place.
"""  # noqa: E501 (the command to type is one line)

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megatron_llm.model import canonical_state
from megatron_llm.model.config import ModelConfig
from megatron_llm.tokenizer import files as tokenizer_files
from megatron_llm.tokenizer.special_tokens import ROLES, SpecialTokens
from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import load_any
from megatron_llm.weights.megatron import DTYPES
from run_contract.entry_point import run_main
from run_contract.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    """The parser of upstream's flags, and of the iteration, dtype and shard size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input_dir", type=Path, required=True, help="folder with latest_checkpointed_iteration.txt")
    parser.add_argument("--load_iters", type=int, help="iteration to export; by default the tracker's")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--vocab_file",
        type=Path,
        help="tokenizer.model, tokenizer.json, or the model's folder; by default the one in --input_dir, else the one "
        "that training recorded",
    )
    shards = parser.add_mutually_exclusive_group()
    shards.add_argument("--max_shard_size", default="10GB")
    shards.add_argument("--num_output_shards", type=int, help="about so many files of equal size instead")
    parser.add_argument(
        "--model", choices=("llama", "llama2", "codellama", "mistral", "falcon"), help="compared with the checkpoint"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="by default as stored")
    parser.add_argument(
        "--vocab_extra_ids_list", help="comma-separated tokens that training added, as preprocess_data.py had them"
    )
    parser.add_argument(
        "--override_special_tokens",
        nargs="*",
        default=[],
        metavar="ROLE=TOKEN",
        help=f"other tokens in the tokenizer's special roles, such as eos=<|im_end|>; roles: {', '.join(ROLES)}",
    )
    parser.add_argument("--cache_dir", help="no effect: the tokenizer is never downloaded, see --vocab_file")
    return parser


def max_shard_size(args: argparse.Namespace, config: ModelConfig, dtype: torch.dtype) -> str:
    """The maximum size of a shard: --max_shard_size, or the size that follows from --num_output_shards."""
    count = args.num_output_shards
    if count is None:
        return str(args.max_shard_size)
    if count < 1:
        raise UserError(f"--num_output_shards {count}: must be at least 1")
    return str(-(-canonical_state.parameters(config) * dtype.itemsize // count))


def main() -> None:
    """Load the checkpoint, write the folder, read it back, and publish it."""
    args = make_parser().parse_args()
    loaded = load_any.load(args.input_dir, args.load_iters)
    load_any.check_family(loaded, args.model, "--model")
    dtype = DTYPES[args.dtype] if args.dtype else loaded.dtype
    vocab_file = tokenizer_files.find(args.vocab_file, args.input_dir, loaded.args.get("vocab_file"))
    tokenizer_files.say_if_another(vocab_file, args.input_dir)
    hf_weights.export(
        args.output_dir,
        loaded.config,
        loaded.state,
        dtype=dtype,
        vocab_file=vocab_file,
        max_shard_size=max_shard_size(args, loaded.config, dtype),
        special=SpecialTokens.of(
            vocab_file, args.vocab_extra_ids_list, args.override_special_tokens, loaded.config.vocab_size
        ),
    )
    print(f"wrote {args.output_dir} from {loaded.folder} ({dtype}); read back equal, tokenizer checked")


if __name__ == "__main__":
    run_main(main)
