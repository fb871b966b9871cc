"""python demo/base_model.py --text FOLDER --output FOLDER

Makes the demonstration's base model: a SentencePiece tokenizer that is trained on the text (Llama-style BPE with byte
fallback), and a small, randomly initialised Llama in Hugging Face format. The same text gives the same bytes, and a
folder that is finished is kept.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from run_contract.entry_point import run_main
from run_contract.errors import UserError
from run_contract.publish import publishing, write_json
from snakmodel.chain.stage import fingerprint

VOCAB_SIZE = 2000
SEED = 8446
TOO_HIGH = re.compile(r"Vocabulary size too high .*<= (\d+)")
"""What SentencePiece says where the text has too few different parts, with the number of pieces that it could make."""


def text_files(folder: Path) -> list[Path]:
    """The .txt files below a folder, in name order."""
    found = sorted(folder.rglob("*.txt"))
    if not found:
        raise UserError(f"{folder}: no .txt file in it or below it. Give a folder of text, one document a line.")
    return found


def lines(files: list[Path]) -> Iterator[str]:
    """Every line of the files, split at newlines only."""
    for path in files:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                if line.strip():
                    yield line.strip()


def train_tokenizer(files: list[Path], prefix: Path) -> int:
    """Write PREFIX.model, and return its number of pieces: VOCAB_SIZE, or as many as a small or uniform text allows."""
    try:
        _train(files, prefix, VOCAB_SIZE)
        return VOCAB_SIZE
    except RuntimeError as error:
        most = TOO_HIGH.search(str(error))
        if most is None:
            raise UserError(
                f"no tokenizer can be trained on the {len(files)} .txt files ({error}); give some hundreds of lines "
                "of ordinary text"
            ) from error
    size = int(most[1])
    _train(files, prefix, size)
    return size


def _train(files: list[Path], prefix: Path, vocab_size: int) -> None:
    """Train a BPE tokenizer with Llama's settings. Raises RuntimeError."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(files),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.9995,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_surface=" \u2047 ",
        max_sentence_length=1 << 16,
        num_threads=1,
        minloglevel=2,
    )


def save_model(folder: Path, vocab_size: int) -> None:
    """Write a Llama model with 1.2 million random parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> int:
    """The command: makes the base model as the module's docstring says, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    args = parser.parse_args()
    files = text_files(args.text)
    made_from = [fingerprint(path) for path in files]
    record = args.output / "made_from.json"
    if record.exists() and json.loads(record.read_text()) == made_from:
        print(f"{args.output} is there already")
        return 0
    with publishing(args.output) as (folder,):
        folder.mkdir()
        pieces = train_tokenizer(files, folder / "tokenizer")
        (folder / "tokenizer.vocab").unlink()
        save_model(folder, pieces)
        shutil.copymode(folder / "tokenizer.model", folder / "model.safetensors")  # else only the owner could read it
        write_json(folder / "made_from.json", made_from)
    print(f"made the base model {args.output}: {pieces} pieces, from {len(files)} files")
    return 0


if __name__ == "__main__":
    run_main(main)
