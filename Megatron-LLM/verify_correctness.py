"""python Megatron-LLM/verify_correctness.py --model_name=llama2 --load RUN/megatron --huggingface_cache BASE --huggingface_device cpu --input RUN/arrow/shard-00000.arrow --tokenizer_type SentencePieceTokenizer --vocab_file TOK --seq_length L --iterations N --tolerance 0.01 --report RUN/megatron/verify.json

Compares our model with Hugging Face's on the same real tokens: --load (a Megatron layout or a training checkpoint) ->
our Llama, --huggingface_cache -> AutoModelForCausalLM; per batch the logit error, the argmax agreement and the loss
difference. Exits with 1 when an error exceeds its tolerance, and then names the first layer where the two models
differ. On request it also compares the folder's tokenizer with sentencepiece, and reports how far training moved the
weights from those of the base model.

A single process reads any layout. When started as several ranks (RANK, WORLD_SIZE, … as for finetune.py; torchrun sets
them), our model is spread over them as in training: over --tensor_model_parallel_size x --pipeline_model_parallel_size
ranks. Further ranks are data-parallel, and each of these computes different batches. Rank 0 holds Hugging Face's model
and compares every batch. The batches, the report and the verdict are the same as with one process, and all ranks exit
with the same code.
"""  # noqa: E501 (the command to type is one line)

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.gate import compare as logit_gate
from megatron_llm.gate import divergence
from megatron_llm.gate import model as gate_model
from megatron_llm.gate import text as gate_text
from megatron_llm.gate.compare import Comparison
from megatron_llm.gate.model import GateModel
from megatron_llm.model.config import ModelConfig
from megatron_llm.parallel import world as parallel
from megatron_llm.parallel.world import World
from megatron_llm.tokenizer import export_check
from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import hf_config, load_any
from run_contract.entry_point import run_main
from run_contract.errors import UserError
from run_contract.publish import write_json

T = TypeVar("T")
TEXTS = 1000
"""Number of texts on which the tokenizers are compared."""
LONGEST_BY_DEFAULT = 4096
"""Largest default number of tokens per row: logits of 131,072 positions with as many tokens would take 67 GB."""


def their_device(text: str) -> str:
    """An argparse type for a device; of a list it takes the first, because one process holds Hugging Face's model."""
    name = text.split(",")[0]
    try:
        torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; valid are for example cpu, cuda, cuda:1") from None
    return name


def make_parser() -> argparse.ArgumentParser:
    """The parser of upstream's flags. Flags that describe the model are only compared with the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name", required=True, choices=("llama", "llama2", "codellama", "mistral", "falcon"))
    parser.add_argument("--model_size", type=int, help="names the published model if it is downloaded, and only then")
    parser.add_argument("--load", type=Path, required=True)
    parser.add_argument("--load_iters", type=int, help="iteration to verify; by default the tracker's")
    parser.add_argument("--huggingface_cache", type=Path, required=True, help="the model's folder, or the Hub cache")
    parser.add_argument(
        "--huggingface_device",
        type=their_device,
        default="cpu",
        help="device of Hugging Face's model, such as cpu, cuda or cuda:1; of a list such as cuda:0,1,2,3 the first",
    )
    parser.add_argument("--device", help="device of our model in one process, by default cpu; ranks choose their own")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="text: .arrow or .jsonl with a `text` field, or .txt")
    source.add_argument("--data_path", type=Path, help="prefix of a tokenised dataset")
    parser.add_argument("--tokenizer_type", default="SentencePieceTokenizer")
    parser.add_argument("--vocab_file", type=Path)
    parser.add_argument(
        "--seq_length", type=int, help=f"by default the checkpoint's, but not more than {LONGEST_BY_DEFAULT}"
    )
    parser.add_argument("--micro_batch_size", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--tolerance", type=float, help="mean absolute logit error; default 0.01, 0.1 in 16 bits")
    parser.add_argument("--max_tolerance", type=float, help="largest absolute logit error; by default not limited")
    parser.add_argument("--report", type=Path, help="JSON file for the result")
    parser.add_argument(
        "--compare_tokenizer", action="store_true", help="compare the folder's tokenizer with --vocab_file on --input"
    )
    parser.add_argument("--base_model", type=Path, help="Hugging Face folder that --divergence compares with")
    parser.add_argument("--divergence", type=Path, help="JSON file (and .png beside) of how far --load is from it")
    parser.add_argument("--tensor_model_parallel_size", type=int, default=1)
    parser.add_argument("--pipeline_model_parallel_size", type=int, default=1)
    parser.add_argument("--sequence_parallel", action="store_true", help="as in training, between tensor ranks")
    dtype = parser.add_mutually_exclusive_group()
    dtype.add_argument("--bf16", dest="dtype", action="store_const", const=torch.bfloat16, default=torch.float32)
    dtype.add_argument("--fp16", dest="dtype", action="store_const", const=torch.float16)
    _add_model_flags(parser)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("upstream's model flags", "the checkpoint is asked, and must not contradict them")
    for flag in ("use_rms_norm", "no_tie_embed_logits", "no_new_tokens", "no_bias_gelu_fusion", "use_flash_attn"):
        group.add_argument(f"--{flag}", action="store_true")
    group.add_argument("--glu_activation", choices=("swiglu",))
    group.add_argument("--hidden_dropout", type=float, choices=(0.0,))
    group.add_argument("--attention_dropout", type=float, choices=(0.0,))
    group.add_argument("--layernorm_epsilon", type=float, help="compared with the checkpoint's")


@dataclass
class GateRank:
    """The models that this process holds; only rank 0, or the only process, has the weights of both."""

    world: World | None
    """The ranks; None for a single process."""
    loaded: load_any.Loaded | None = None
    theirs: Any = None

    def first(self, function: Callable[[], T]) -> T:
        """Run a function on rank 0 only; every rank gets the result or the UserError."""
        return self.world.on_rank0(function) if self.world else function()


def join(args: argparse.Namespace) -> World | None:
    """Join the other ranks; None for a single process. Raises UserError, on all ranks, for sizes that do not fit."""
    sizes = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ranks = parallel.world_size_in_environment()
    if ranks == 1 and sizes == (1, 1):
        return None
    if args.dtype == torch.float16:
        raise UserError("--fp16: over several ranks the model runs as in training, in --bf16 or fp32; give one of them")
    if min(sizes) < 1 or ranks % (sizes[0] * sizes[1]):
        raise UserError(
            f"{ranks} ranks are not a multiple of --tensor_model_parallel_size {sizes[0]} x "
            f"--pipeline_model_parallel_size {sizes[1]}; start {sizes[0] * sizes[1]} or a multiple, or a single rank "
            "with neither flag, which reads any layout"
        )
    if args.device:
        raise UserError(
            f"--device {args.device}: where there are several ranks, each has a device of its own; leave the flag out"
        )
    return parallel.start(*sizes)


def check_model_flags(args: argparse.Namespace, loaded: load_any.Loaded) -> None:
    """Raise UserError when a flag that describes the model contradicts the checkpoint."""
    load_any.check_family(loaded, args.model_name, "--model_name")
    config = loaded.config
    for flag, given, found in (
        ("layernorm_epsilon", args.layernorm_epsilon, config.layernorm_epsilon),
        ("glu_activation", args.glu_activation, config.glu_activation),
        ("use_rms_norm", args.use_rms_norm or None, config.use_rms_norm),
        ("no_tie_embed_logits", args.no_tie_embed_logits or None, not config.tie_embed_logits),
    ):
        if given is not None and given != found:
            raise UserError(f"--{flag} {given} but {loaded.folder} has {found}; leave the flag out")


def load(args: argparse.Namespace, here: GateRank) -> tuple[ModelConfig, list[Tensor]]:
    """Load both models' weights into `here`, and the batches (rank 0 only). Raises UserError."""
    loaded = load_any.load(args.load, args.load_iters)
    check_model_flags(args, loaded)
    positions = loaded.config.max_position_embeddings
    if (args.seq_length or 0) > positions:
        raise UserError(
            f"--seq_length {args.seq_length} but {loaded.folder} has {positions} positions; give at most that"
        )
    source = gate_text.Source(args.input, args.data_path, args.tokenizer_type, args.vocab_file)
    source.check_tokenizer()
    batches = gate_text.batches(
        source,
        rows=args.micro_batch_size,
        length=args.seq_length or min(loaded.args.get("seq_length") or positions, positions, LONGEST_BY_DEFAULT),
        count=args.iterations,
        vocab_size=loaded.config.vocab_size,
    )
    here.loaded, here.theirs = loaded, load_theirs(args)
    return loaded.config, batches


def load_theirs(args: argparse.Namespace) -> Any:
    """Hugging Face's model in evaluation mode, on its device."""
    from transformers import AutoModelForCausalLM

    folder = hf_weights.locate(args.model_name, args.model_size, None, args.huggingface_cache)
    hf_config.load(folder)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=args.dtype)
    return model.to(args.huggingface_device).eval().requires_grad_(False)


def build_ours(args: argparse.Namespace, here: GateRank, config: ModelConfig, batch: Tensor) -> GateModel:
    """Build our model, in this process or spread over the ranks, for batches of the same size as `batch`."""
    state = here.loaded.state if here.loaded else {}
    if here.world is None:
        return gate_model.WholeModel(config, state, args.dtype, args.device or "cpu")
    training = gate_model.training_arguments(
        rows=batch.shape[0],
        length=batch.shape[1] - 1,
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        sequence=args.sequence_parallel,
        bf16=args.dtype == torch.bfloat16,
        load=args.load,
    )
    return gate_model.spread(config, state, training, here.world)


def compare_batches(args: argparse.Namespace, here: GateRank, tolerance: float) -> tuple[list[Comparison], str | None]:
    """The comparison of every batch, and where the models differ in the first that fails; equal on every rank."""
    config, batches = here.first(lambda: load(args, here))
    ours = build_ours(args, here, config, batches[0])
    done: list[Comparison] = []
    parting: str | None = None
    for start in range(0, len(batches), ours.at_once):
        together = batches[start : start + ours.at_once]
        for rows, found in zip(together, compare_together(args, here, ours, together), strict=True):
            say(here, f"iteration {len(done)}: {found}")
            done.append(found)
            if parting is None and not found.passes(tolerance, args.max_tolerance):
                parting = where_they_part(args, here, ours, rows[:, :-1])
    return done, parting


def compare_together(
    args: argparse.Namespace, here: GateRank, ours: GateModel, together: list[Tensor]
) -> list[Comparison]:
    """Compare at most `at_once` batches (b, s + 1), one per data rank; surplus ranks repeat the last one.

    Collective.
    """
    given = [*together, *[together[-1]] * (ours.at_once - len(together))]
    logits, losses = ours.logits([rows[:, :-1] for rows in given]), ours.losses(given)

    def compared() -> list[Comparison]:
        found = []
        for rows, our_logits, our_loss in zip(together, logits, losses, strict=False):
            theirs = here.theirs(input_ids=rows[:, :-1].to(args.huggingface_device)).logits
            found.append(logit_gate.compare(our_logits, theirs, rows[:, 1:], our_loss))
        return found

    return here.first(compared)


def where_they_part(args: argparse.Namespace, here: GateRank, ours: GateModel, tokens: Tensor) -> str:
    """The first place where the hidden states of the two models differ. Collective."""
    mine = ours.layers(tokens)

    def found() -> str:
        other = logit_gate.their_hidden_states(here.theirs, tokens.to(args.huggingface_device))
        return logit_gate.first_parting(mine, other, args.dtype)

    return here.first(found)


def say(here: GateRank, text: str) -> None:
    """Print a line, from rank 0 only."""
    if here.world is None or here.world.rank == 0:
        print(text, flush=True)


def check_tokenizer(args: argparse.Namespace) -> export_check.TextComparison | None:
    """Compare the folder's tokenizer with sentencepiece on the first texts of --input, if that was requested."""
    if not args.compare_tokenizer:
        return None
    if not args.input or not args.vocab_file:
        raise UserError("--compare_tokenizer needs --input and --vocab_file")
    found = export_check.compare_texts(
        args.huggingface_cache, args.vocab_file, islice(gate_text.texts(args.input), TEXTS)
    )
    print(f"tokenizer: {found.texts} texts, {found.tokens} tokens, {found.control_text} with control text", flush=True)
    for known in found.known_differences:
        print(f"known difference of {found.tokenizer_class}: {known}", flush=True)
    return found


def report_divergence(args: argparse.Namespace) -> None:
    """Publish how far --load is from --base_model, if that was requested."""
    if not args.divergence:
        return
    if not args.base_model:
        raise UserError("--divergence needs --base_model, the folder of the model that training began with")
    base, new = load_any.load(args.base_model), load_any.load(args.load, args.load_iters)
    found = divergence.report(base.state, new.state, args.divergence)
    furthest = max(found, key=lambda one: one.mean_absolute_change)
    print(f"divergence: {args.divergence}; most: {furthest.name} by {furthest.mean_absolute_change:.3g}", flush=True)


def conclude(
    args: argparse.Namespace, done: list[Comparison], parting: str | None, text: export_check.TextComparison | None
) -> int:
    """Write the reports and print what failed. Returns 1 if something failed."""
    report_divergence(args)
    passed = parting is None and (text is None or text.first_difference is None)
    if args.report:
        tolerance = default_tolerance(args)
        about = {"passed": passed, **logit_gate.report(done, tolerance, args.max_tolerance, parting)}
        write_json(args.report, about | ({"tokenizer": asdict(text)} if text else {}))
    if parting is not None:
        print(
            f"FAILED: the logits differ by more than the tolerance; hidden states differ from here on: {parting}",
            flush=True,
        )
    if text is not None and text.first_difference is not None:
        print(
            f"FAILED: the tokenizer gives different ids than {args.vocab_file} on {text.first_difference!r}",
            flush=True,
        )
    return 0 if passed else 1


def default_tolerance(args: argparse.Namespace) -> float:
    """The tolerance: --tolerance, or the default for the precision."""
    if args.tolerance is not None:
        return float(args.tolerance)
    return 0.01 if args.dtype == torch.float32 else 0.1


def main() -> int:
    """Load both models, compare them batch by batch, and report. Returns 1 if they differ."""
    args = make_parser().parse_args()
    here = GateRank(join(args))
    try:
        text = here.first(lambda: check_tokenizer(args))
        done, parting = compare_batches(args, here, default_tolerance(args))
        return here.first(lambda: conclude(args, done, parting, text))
    finally:
        if here.world:
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
