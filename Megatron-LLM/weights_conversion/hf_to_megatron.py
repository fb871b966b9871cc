"""python Megatron-LLM/weights_conversion/hf_to_megatron.py llama2 --out=RUN/megatron --model-path=BASE [--size=7]

Converts a Hugging Face folder (Llama, Mistral, Falcon), or Meta's consolidated.*.pth with params.json, to the file
OUT/release/mp_rank_00/model_optim_rng.pt and the tokenizer; the tracker file is written last. The shapes come from the
model's own description; --size only names the model to download and is compared with the geometry.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_llm.model.canonical_state import EMBEDDING, parameters
from megatron_llm.model.config import ModelConfig
from megatron_llm.tokenizer import files as tokenizer_files
from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import hf_config, megatron
from megatron_llm.weights import meta as meta_weights
from run_contract.entry_point import run_main
from run_contract.errors import UserError

SIZE_TOLERANCE = 0.15


def make_parser() -> argparse.ArgumentParser:
    """The parser of upstream's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", choices=("llama", "llama2", "codellama", "mistral", "falcon"))
    parser.add_argument("--size", type=int, help="billions of parameters, compared with the model's geometry")
    parser.add_argument("--out", type=Path, required=True, help="folder of the Megatron checkpoint")
    parser.add_argument("--model-path", help="folder of the model, or its name on the Hub")
    parser.add_argument(
        "--cache-dir", type=Path, help="Hub cache for a model that is downloaded, or the model's folder"
    )
    parser.add_argument(
        "--rope_scaling_factor", type=float, help="Meta's layout: that of use_scaled_rope, which params.json lacks"
    )
    return parser


def check_size(config: ModelConfig, size: int) -> None:
    """Raise UserError unless the model has about `size` billion parameters; 0 means less than half a billion."""
    found = parameters(config) / 1e9
    if abs(found - size) > SIZE_TOLERANCE * size and round(found) != size:
        raise UserError(f"--size={size} but the model has {found:.3f} billion parameters; leave --size out")


def check_family(folder: Path, model: str) -> None:
    """Raise UserError unless a folder in Hugging Face's layout holds a model of the kind `model`."""
    if meta_weights.is_meta(folder):
        return
    family = hf_config.family(folder)
    if family != (model if model in ("mistral", "falcon") else "llama"):
        raise UserError(f"{folder} is a {family} model, not {model}; give {'llama2' if family == 'llama' else family}")


def load(folder: Path, model: str, rope_scaling_factor: float | None) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Load geometry and tensors of either layout. Raises UserError when the folder holds a different kind of model."""
    if meta_weights.is_meta(folder):
        return meta_weights.load(folder, model, rope_scaling_factor)
    if rope_scaling_factor is not None:
        raise UserError(
            f"--rope_scaling_factor is only for Meta's layout; {folder}/config.json says the scaling already, so leave "
            "the flag out"
        )
    check_family(folder, model)
    return hf_weights.load(folder)


def copy_tokenizer(folder: Path, out: Path, vocab_size: int) -> None:
    """Publish the model's tokenizer beside the weights, after checking that it fits."""
    above = [folder.parent / "tokenizer.model"] if meta_weights.is_meta(folder) else []  # as in Meta's Llama 1
    places = [folder / "tokenizer.model", *above, folder / "tokenizer.json"]
    source = next((path for path in places if path.is_file()), None)
    if source is None:
        print(f"{folder} has no tokenizer.model or tokenizer.json; none is copied")
        return
    tokenizer_files.check_fits(source, vocab_size)
    tokenizer_files.carry(source, out)


def main() -> None:
    """Load the model, check it, and publish the checkpoint."""
    args = make_parser().parse_args()
    folder = hf_weights.locate(args.model, args.size, args.model_path, args.cache_dir)
    config, state = load(folder, args.model, args.rope_scaling_factor)
    if args.size is not None:
        check_size(config, args.size)
    hf_weights.say_what_stays_behind(folder)
    copy_tokenizer(folder, args.out, config.vocab_size)
    final = megatron.save(
        args.out,
        "release",
        config,
        state,
        tp=1,
        pp=1,
        dtype=state[EMBEDDING].dtype,
        extra_args={},
        spelling="converter",
    )
    print(f"wrote {final} ({len(state)} tensors, {state[EMBEDDING].dtype})")


if __name__ == "__main__":
    run_main(main)
