"""python Megatron-LLM/tools/checkpoint_util.py --target_tensor_parallel_size 4 --target_pipeline_parallel_size 1 --load_dir RUN/megatron --save_dir RUN/sharded --model_type llama2 --true_vocab_size 32000 --bf16

Converts a Megatron checkpoint in any layout, a training checkpoint or a Hugging Face folder to the same iteration in
another TP x PP layout, or (--saver hf) to a Hugging Face folder. The result is read back and compared before it is
published.
"""  # noqa: E501 (the command to type is one line)

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llm.model.canonical_state import EMBEDDING, HEAD, LazyState
from megatron_llm.tokenizer import files as tokenizer_files
from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import load_any, megatron
from megatron_llm.weights.load_any import Loaded
from run_contract.entry_point import run_main
from run_contract.errors import UserError

CARRIED = (
    *("seq_length", "tokenizer_type", "vocab_file", "no_new_tokens", "vocab_extra_ids_list"),
    *("consumed_train_samples", "consumed_valid_samples"),
)
"""Arguments of the source that the new checkpoint keeps."""
NO_EFFECT = {
    "max_queue_size": "there is no queue: one process reads and writes",
    "no_checking": "what was written is always read back and compared",
    "megatron_path": "no other code is loaded",
}
"""Upstream's flags that have no effect here -> the reason."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of upstream's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--target_tensor_parallel_size", type=int, help="by default the source's, else 1")
    parser.add_argument("--target_pipeline_parallel_size", type=int, help="by default the source's, else 1")
    parser.add_argument("--loader", choices=("megatron", "hf"), help="what --load_dir holds; by default found out")
    parser.add_argument("--saver", choices=("megatron", "hf"), default="megatron", help="what --save_dir will hold")
    parser.add_argument("--load_dir", type=Path, required=True)
    parser.add_argument("--load_iters", type=int, help="iteration to read; by default the tracker's")
    parser.add_argument("--save_dir", type=Path, required=True)
    parser.add_argument("--model_type", required=True, choices=("llama", "llama2", "codellama", "mistral", "falcon"))
    parser.add_argument(
        "--true_vocab_size",
        type=int,
        help="vocabulary without padding, compared with the checkpoint's; a larger one makes room for new tokens",
    )
    parser.add_argument(
        "--vocab_file",
        type=Path,
        help="tokenizer to write beside the weights; by default the one in --load_dir, else the one that training "
        "recorded",
    )
    dtype = parser.add_mutually_exclusive_group()
    dtype.add_argument("--bf16", dest="dtype", action="store_const", const="bf16", help="cast; by default as stored")
    dtype.add_argument("--fp16", dest="dtype", action="store_const", const="fp16")
    dtype.add_argument("--fp32", dest="dtype", action="store_const", const="fp32")
    for name, reason in NO_EFFECT.items():
        switch: dict[str, Any] = {"action": "store_true"} if name == "no_checking" else {}
        parser.add_argument(f"--{name}", help=f"no effect: {reason}", **switch)
    return parser


def with_true_vocabulary(loaded: Loaded, size: int) -> Loaded:
    """Cut a vocabulary whose true size the checkpoint does not record, or add rows for new tokens.

    A new row is the mean of all existing rows. Raises UserError when a recorded vocabulary would be cut.
    """
    found = loaded.config.vocab_size
    if size == found:
        return loaded
    if size < found and loaded.args.get("true_vocab_size"):
        raise UserError(
            f"--true_vocab_size {size} but {loaded.folder} has a vocabulary of {found}; give {found}, or more for new "
            "tokens"
        )
    if size > found:
        print(f"--true_vocab_size {size}: {size - found} new rows, each the mean of the {found} old ones")

    def resized(name: str) -> Tensor:
        return resize(loaded.state[name], size) if name in (EMBEDDING, HEAD) else loaded.state[name]

    return replace(loaded, config=replace(loaded.config, vocab_size=size), state=LazyState(loaded.state, resized))


def resize(rows: Tensor, size: int) -> Tensor:
    """The rows of a vocabulary (n, h), cut to a size, or extended to it by copies of their mean."""
    if size <= len(rows):
        return rows[:size]
    mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(size - len(rows), -1)])


def check_source(args: argparse.Namespace, loaded: Loaded) -> None:
    """Raise UserError when --loader or --model_type contradict the source."""
    found = "hf" if loaded.folder == args.load_dir else "megatron"
    if args.loader not in (None, found):
        raise UserError(f"--loader {args.loader} but {args.load_dir} is read by --loader {found}; leave the flag out")
    load_any.check_family(loaded, args.model_type, "--model_type")


def to_hugging_face(args: argparse.Namespace, loaded: Loaded, dtype: torch.dtype) -> Path:
    """Publish --save_dir as a Hugging Face folder."""
    for name in ("target_tensor_parallel_size", "target_pipeline_parallel_size"):
        if getattr(args, name) not in (None, 1):
            raise UserError(f"--{name} {getattr(args, name)}: a Hugging Face folder is not split; leave it out")
    vocab_file = tokenizer_files.find(args.vocab_file, args.load_dir, loaded.args.get("vocab_file"))
    hf_weights.export(args.save_dir, loaded.config, loaded.state, dtype=dtype, vocab_file=vocab_file)
    return Path(args.save_dir)


def to_megatron(args: argparse.Namespace, loaded: Loaded, dtype: torch.dtype) -> Path:
    """Publish the iteration below --save_dir in the target layout."""
    tp, pp = args.target_tensor_parallel_size, args.target_pipeline_parallel_size
    vocab_file = args.vocab_file or tokenizer_files.look(args.load_dir, loaded.args.get("vocab_file"))
    if vocab_file:
        tokenizer_files.check_fits(vocab_file, loaded.config.vocab_size)
    final = megatron.save(
        args.save_dir,
        loaded.iteration,
        loaded.config,
        loaded.state,
        tp=loaded.args.get("tensor_model_parallel_size") or 1 if tp is None else tp,
        pp=loaded.args.get("pipeline_model_parallel_size") or 1 if pp is None else pp,
        dtype=dtype,
        extra_args={name: loaded.args[name] for name in CARRIED if loaded.args.get(name) is not None},
    )
    if vocab_file:
        tokenizer_files.carry(tokenizer_files.file_of(vocab_file), args.save_dir)
    else:
        print(f"{args.load_dir} has no tokenizer; none is copied, and megatron_to_hf will need --vocab_file")
    return final


def main() -> None:
    """Load the source, cut it, and publish the result."""
    args = make_parser().parse_args()
    for name, reason in NO_EFFECT.items():
        if getattr(args, name):
            print(f"--{name} has no effect: {reason}")
    loaded = load_any.load(args.load_dir, args.load_iters)
    check_source(args, loaded)
    if loaded.folder == args.load_dir:
        hf_weights.say_what_stays_behind(loaded.folder)
    if args.true_vocab_size is not None:
        loaded = with_true_vocabulary(loaded, args.true_vocab_size)
    dtype = megatron.DTYPES[args.dtype] if args.dtype else loaded.dtype
    final = (to_hugging_face if args.saver == "hf" else to_megatron)(args, loaded, dtype)
    print(f"wrote {final} from {loaded.folder}: the weights, without an optimizer's state")


if __name__ == "__main__":
    run_main(main)
