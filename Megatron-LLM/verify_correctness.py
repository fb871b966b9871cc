"""python Megatron-LLM/verify_correctness.py --model_name=llama2 --load RUN/megatron --huggingface_cache BASE --huggingface_device cpu --input RUN/arrow/shard-00000.arrow --tokenizer_type SentencePieceTokenizer --vocab_file TOK --seq_length L --iterations N --tolerance 0.01 --report RUN/megatron/verify.json

Our model against Hugging Face's on the same real tokens: --load (a Megatron layout or a training checkpoint) -> our Llama,
--huggingface_cache -> AutoModelForCausalLM; per batch the logit error, argmax agreement and loss difference. Exits 1 when
an error exceeds its tolerance, and then names the first layer where the two models part. On request it also compares
the folder's tokenizer with sentencepiece, and reports how far training moved the weights from the base model's.
"""  # noqa: E501 (the command to type is one line)

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from megatron_llm import any_weights, divergence, hf_config, hf_tokenizer, hf_weights, tokenizer
from megatron_llm.files import InputsMissing, UserError, run_main, write_json
from megatron_llm.indexed_dataset import IndexedDataset
from megatron_llm.model import Llama

PARTING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Hidden states part when they differ by more than this share of their largest value."""


TEXTS = 1000
"""Texts on which the tokenizers are compared."""


@dataclass(frozen=True)
class Comparison:
    """One batch: absolute logit errors, share of positions with the same most likely token, losses in nats."""

    max_error: float
    mean_error: float
    argmax_agreement: float
    our_loss: float
    their_loss: float
    spread: float
    """Standard deviation of their logits: a small model's are small, and so would the errors of wrong weights be."""

    def __str__(self) -> str:
        return (
            f"logit error max={self.max_error:.6f} mean={self.mean_error:.6f} | argmax agreement "
            f"{self.argmax_agreement:.2%} | loss ours={self.our_loss:.6f} theirs={self.their_loss:.6f} "
            f"difference={abs(self.our_loss - self.their_loss):.6f}"
        )


def parse_args() -> argparse.Namespace:
    """Upstream's flags; those that describe the model are accepted, and the checkpoint is asked instead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True, choices=("llama", "llama2", "codellama", "mistral", "falcon"))
    parser.add_argument("--model_size", type=int, help="names the published model, if it is downloaded")
    parser.add_argument("--load", type=Path, required=True)
    parser.add_argument("--load_iters", type=int, help="iteration to verify; by default the tracker's")
    parser.add_argument("--huggingface_cache", type=Path, required=True, help="the model's folder, or the Hub cache")
    parser.add_argument("--huggingface_device", default="cpu")
    parser.add_argument("--device", default="cpu", help="device of our model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="text: .arrow or .jsonl with a `text` field, or .txt")
    source.add_argument("--data_path", type=Path, help="prefix of a tokenised dataset")
    parser.add_argument("--tokenizer_type", default="SentencePieceTokenizer")
    parser.add_argument("--vocab_file", type=Path)
    parser.add_argument("--seq_length", type=int, default=512)
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
    dtype = parser.add_mutually_exclusive_group()
    dtype.add_argument("--bf16", dest="dtype", action="store_const", const=torch.bfloat16, default=torch.float32)
    dtype.add_argument("--fp16", dest="dtype", action="store_const", const=torch.float16)
    _add_model_flags(parser)
    return parser.parse_args()


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("upstream's model flags", "one value each: what a Llama checkpoint means anyway")
    for flag in ("use_rms_norm", "no_tie_embed_logits", "no_new_tokens", "no_bias_gelu_fusion", "use_flash_attn"):
        group.add_argument(f"--{flag}", action="store_true")
    group.add_argument("--glu_activation", choices=("swiglu",))
    group.add_argument("--hidden_dropout", type=float, choices=(0.0,))
    group.add_argument("--attention_dropout", type=float, choices=(0.0,))
    group.add_argument("--layernorm_epsilon", type=float, help="compared with the checkpoint's")


def texts(path: Path) -> Iterator[str]:
    """The documents of an Arrow, jsonl or plain text file, in order."""
    if not path.is_file():
        raise InputsMissing(f"{path} is missing; --input is a .arrow, .jsonl or .txt file")
    try:
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as source:
                for batch in pa.ipc.open_stream(source):
                    yield from batch.column("text").to_pylist()
            return
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield json.loads(line)["text"] if path.suffix == ".jsonl" else line.rstrip("\n")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not {path.suffix} with a `text` field: {error}") from error


def documents(args: argparse.Namespace) -> Iterator[Sequence[int]]:
    """Token ids of one document after the other."""
    if args.data_path:
        dataset = IndexedDataset(args.data_path)
        yield from (dataset.get(index).tolist() for index in range(len(dataset)))
        return
    if args.vocab_file is None:
        raise UserError("--input needs --vocab_file, the model's tokenizer.model or tokenizer.json")
    encoder = tokenizer.build(args.tokenizer_type, args.vocab_file, no_new_tokens=True, vocab_extra_ids_list=None)
    yield from (encoder.encode(text) for text in texts(args.input))


def batches(args: argparse.Namespace, vocab_size: int) -> Iterator[Tensor]:
    """At most `iterations` batches (micro_batch_size, seq_length + 1) int64 of running text; the last may be smaller.

    Raises UserError when the text does not fill one row, or has ids that the model does not.
    """
    width = args.seq_length + 1
    wanted = args.iterations * args.micro_batch_size * width
    ids = np.fromiter(islice((token for document in documents(args) for token in document), wanted), np.int64)
    where = args.input or args.data_path
    if len(ids) < width:
        raise UserError(
            f"{where} has {len(ids)} tokens, one row needs {width}; give more text or a smaller --seq_length"
        )
    if ids.max() >= vocab_size:
        raise UserError(
            f"{where} has the token id {ids.max()}, the model's vocabulary is {vocab_size}; wrong --vocab_file?"
        )
    rows = torch.from_numpy(ids[: len(ids) // width * width]).view(-1, width)
    for start in range(0, len(rows), args.micro_batch_size):
        yield rows[start : start + args.micro_batch_size]


def load_ours(args: argparse.Namespace) -> tuple[Llama, any_weights.Loaded]:
    """Our model in evaluation mode, on its device."""
    loaded = any_weights.load(args.load, args.load_iters)
    epsilon = loaded.config.layernorm_epsilon
    if args.layernorm_epsilon not in (None, epsilon):
        raise UserError(f"--layernorm_epsilon {args.layernorm_epsilon} but {loaded.folder} has {epsilon}")
    with torch.device("meta"):
        model = Llama(loaded.config)
    model.load_state_dict(loaded.state, assign=True)
    return model.to(device=args.device, dtype=args.dtype).eval().requires_grad_(False), loaded


def load_theirs(args: argparse.Namespace) -> Any:
    """Hugging Face's model in evaluation mode, on its device."""
    from transformers import AutoModelForCausalLM

    folder = hf_weights.locate(args.model_name, args.model_size, None, args.huggingface_cache)
    hf_config.load(folder)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=args.dtype)
    return model.to(args.huggingface_device).eval().requires_grad_(False)


def compare(ours: Tensor, theirs: Tensor, labels: Tensor) -> Comparison:
    """Logits (b, s, V) of both models, labels (b, s) int64."""
    if ours.shape != theirs.shape:
        raise UserError(
            f"our logits have shape {tuple(ours.shape)}, theirs {tuple(theirs.shape)}: not the same vocabulary"
        )
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    error = (ours - theirs).abs()
    losses = [nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item() for logits in (ours, theirs)]
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    return Comparison(error.max().item(), error.mean().item(), agreement, losses[0], losses[1], theirs.std().item())


def hidden_states(modules: Sequence[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """Every module's output during `run`, float32 on the CPU."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        outputs.append(tensor.float().cpu())

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def first_parting(ours: Llama, theirs: Any, tokens: Tensor, args: argparse.Namespace) -> str:
    """Where the hidden states of the two models part: `embedding`, `layer N` or `output`."""
    layers = [ours.layers[str(number)] for number in range(len(ours.layers))]
    inner = theirs.base_model
    mine = hidden_states([ours.embedding, *layers], lambda: ours(tokens.to(args.device)))
    other = hidden_states(
        [theirs.get_input_embeddings(), *(inner.h if hasattr(inner, "h") else inner.layers)],
        lambda: theirs(input_ids=tokens.to(args.huggingface_device)),
    )
    names = ["embedding", *(f"layer {number}" for number in range(len(layers)))]
    for name, a, b in zip(names, mine, other, strict=True):
        if not (a - b).abs().max() <= PARTING[args.dtype] * b.abs().max():
            return name
    return "output"


def passes(comparison: Comparison, tolerance: float, max_tolerance: float | None) -> bool:
    """Within both tolerances, the mean's taken relative where the logits spread by less than 1; NaN is not."""
    within_max = max_tolerance is None or comparison.max_error <= max_tolerance
    return comparison.mean_error <= tolerance * min(1.0, comparison.spread) and within_max


def check_tokenizer(args: argparse.Namespace) -> hf_tokenizer.TextComparison | None:
    """The folder's tokenizer against sentencepiece on the first texts of --input, if that was asked for."""
    if not args.compare_tokenizer:
        return None
    if not args.input or not args.vocab_file:
        raise UserError("--compare_tokenizer needs --input and --vocab_file")
    found = hf_tokenizer.compare_texts(args.huggingface_cache, args.vocab_file, islice(texts(args.input), TEXTS))
    print(f"tokenizer: {found.texts} texts, {found.tokens} tokens, {found.control_text} with control text", flush=True)
    return found


def compare_batches(args: argparse.Namespace, tolerance: float) -> tuple[list[Comparison], str | None]:
    """Every batch's comparison, and where the models part in the first that fails."""
    ours, loaded = load_ours(args)
    theirs = load_theirs(args)
    done: list[Comparison] = []
    parting: str | None = None
    for number, batch in enumerate(batches(args, loaded.config.vocab_size)):
        tokens, labels = batch[:, :-1], batch[:, 1:]
        their_logits = theirs(input_ids=tokens.to(args.huggingface_device)).logits
        done.append(compare(ours(tokens.to(args.device)), their_logits, labels))
        print(f"iteration {number}: {done[-1]}", flush=True)
        if parting is None and not passes(done[-1], tolerance, args.max_tolerance):
            parting = first_parting(ours, theirs, tokens, args)
    return done, parting


def report_divergence(args: argparse.Namespace) -> None:
    """Publish how far --load is from --base_model, if that was asked for."""
    if not args.divergence:
        return
    if not args.base_model:
        raise UserError("--divergence needs --base_model, the folder of the model that training began with")
    base, new = any_weights.load(args.base_model), any_weights.load(args.load, args.load_iters)
    found = divergence.report(base.state, new.state, args.divergence)
    furthest = max(found, key=lambda one: one.mean_absolute_change)
    print(f"divergence: {args.divergence}; most: {furthest.name} by {furthest.mean_absolute_change:.3g}", flush=True)


def main() -> int:
    """Load both models, compare batch by batch, report; 1 when they disagree."""
    args = parse_args()
    tolerance = args.tolerance if args.tolerance is not None else 0.01 if args.dtype == torch.float32 else 0.1
    text = check_tokenizer(args)
    done, parting = compare_batches(args, tolerance)
    report_divergence(args)
    tokenizer_differs = text is not None and text.first_difference is not None
    passed = parting is None and not tokenizer_differs
    if args.report:
        about = {"passed": passed, **report(done, tolerance, args.max_tolerance, parting)}
        write_json(args.report, about | ({"tokenizer": asdict(text)} if text else {}))
    if parting is not None:
        print(f"FAILED: the logits differ by more than the tolerance; hidden states part at: {parting}", flush=True)
    if text is not None and tokenizer_differs:
        print(f"FAILED: the tokenizer gives other ids than {args.vocab_file} on {text.first_difference!r}", flush=True)
    return 0 if passed else 1


def report(
    done: Sequence[Comparison], tolerance: float, max_tolerance: float | None, parting: str | None
) -> dict[str, Any]:
    """The worst of all batches, what was allowed, and each batch."""
    return {
        "batches": len(done),
        "max_error": max(batch.max_error for batch in done),
        "mean_error": max(batch.mean_error for batch in done),
        "argmax_agreement": min(batch.argmax_agreement for batch in done),
        "loss_difference": max(abs(batch.our_loss - batch.their_loss) for batch in done),
        "tolerance": tolerance,
        "max_tolerance": max_tolerance,
        "first_parting": parting,
        "comparisons": [asdict(batch) for batch in done],
    }


if __name__ == "__main__":
    run_main(main)
