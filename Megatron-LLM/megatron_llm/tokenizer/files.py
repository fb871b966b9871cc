"""Reads a model's tokenizer: a SentencePiece tokenizer.model, or a tokenizer.json with its tokenizer_config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer

from run_contract.errors import InputsMissing, UserError
from run_contract.publish import write_shared

COMPANIONS = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
"""Files of a Hugging Face folder that belong to a model besides its weights and its config.json."""
SPACE = "\u2581"
"""The character that SentencePiece writes for a space."""
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* 0\n")


def read_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a tokenizer.model. Raises InputsMissing or UserError."""
    if not path.is_file():
        raise InputsMissing(f"{path} is missing; give the SentencePiece tokenizer.model of the model")
    try:
        if tiktoken_size(path):
            raise UserError(f"{path} is Llama 3's, not a SentencePiece model; give the tokenizer.json of the model")
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path} is not a SentencePiece model: {error}; give the tokenizer.model of the model"
        ) from error


def tiktoken_size(path: Path) -> int | None:
    """Number of ordinary tokens of a Llama 3 tokenizer.model, whose lines are base64 and a rank; None for other
    files."""
    content = path.read_bytes() if path.is_file() else b""
    return content.count(b"\n") if TIKTOKEN.match(content) else None


def read_json(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises InputsMissing or UserError."""
    if not path.is_file():
        raise InputsMissing(f"{path} is missing; give the tokenizer.json of the model")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(
            f"{path} is not a Hugging Face tokenizer.json: {error}; give the tokenizer.json of the model"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """Read the tokenizer_config.json beside a tokenizer.json. Raises InputsMissing or UserError."""
    config = path.with_name("tokenizer_config.json")
    try:
        raw = json.loads(config.read_bytes())
    except OSError:
        raise InputsMissing(f"{config} is missing; copy it from the model to its place beside {path}") from None
    except ValueError as error:
        raise UserError(f"{config} is not JSON: {error}; copy the model's again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{config} holds {type(raw).__name__}, not a JSON object; copy the model's again")
    return raw


def file_of(path: Path) -> Path:
    """The tokenizer file of a model's folder; given a file, the file itself."""
    if not path.is_dir():
        return path
    model = path / "tokenizer.model"
    return model if model.is_file() else path / "tokenizer.json"


def find(given: Path | None, folder: Path, recorded: object) -> Path:
    """The tokenizer of a checkpoint: --vocab_file, else the one beside the weights, else the one recorded by training.

    Raises InputsMissing when there is none.
    """
    if given is not None:
        return given
    if found := look(folder, recorded):
        return found
    raise InputsMissing(f"{folder} has no tokenizer.model or tokenizer.json; give --vocab_file, the model's tokenizer")


def look(folder: Path, recorded: object = None) -> Path | None:
    """The tokenizer that lies beside a checkpoint's weights, else the one that training recorded, else None."""
    places = (file_of(folder), Path(str(recorded or folder / "tokenizer.model")))
    return next((path for path in places if path.is_file()), None)


def say_if_another(chosen: Path, folder: Path) -> None:
    """Print a note if a checkpoint's folder holds a tokenizer that differs from the chosen one."""
    beside = look(folder)
    if beside and file_of(chosen).is_file() and file_of(chosen).read_bytes() != beside.read_bytes():
        print(f"the tokenizer is {file_of(chosen)}, which differs from {beside} beside the weights", flush=True)


def carry(tokenizer: Path, folder: Path) -> None:
    """Copy a tokenizer, and the files beside it that belong to the same model, into a folder where `file_of` finds it.

    Several commands may do this at the same time.
    """
    name = "tokenizer.json" if tokenizer.suffix == ".json" else "tokenizer.model"
    with_it = COMPANIONS if tokenizer.name == name else ("tokenizer_config.json",) if name == "tokenizer.json" else ()
    beside = {other: tokenizer.with_name(other) for other in with_it}
    if name == "tokenizer.json":
        beside.pop("tokenizer.model", None)
    for target, path in {**beside, name: tokenizer}.items():
        if path.is_file() and not ((folder / target).is_file() and (folder / target).read_bytes() == path.read_bytes()):
            write_shared(folder / target, path.read_bytes())


def sentence_ids(path: Path) -> tuple[int | None, int | None]:
    """The ids of the beginning and the end of a sentence; None where the tokenizer has no such token."""
    path = file_of(path)
    if path.suffix != ".json":
        processor = read_sentencepiece(path)
        bos, eos = (number if number >= 0 else None for number in (processor.bos_id(), processor.eos_id()))
        return bos, eos
    tokenizer, config = read_json(path), read_config(path)
    named = [config.get(name) for name in ("bos_token", "eos_token")]
    names = [one["content"] if isinstance(one, dict) else one for one in named]
    bos, eos = (tokenizer.token_to_id(name) if name else None for name in names)
    return bos, eos


def check_fits(path: Path, vocab_size: int) -> None:
    """Raise UserError when the tokenizer can give ids that the model does not have."""
    path = file_of(path)
    size = (
        max(read_json(path).get_vocab().values()) + 1
        if path.suffix == ".json"
        else tiktoken_size(path) or read_sentencepiece(path).vocab_size()
    )
    if size > vocab_size:
        raise UserError(
            f"{path} has {size} pieces but the model's vocabulary is {vocab_size}; give the model's own tokenizer"
        )


def added_beside(path: Path) -> list[str]:
    """The tokens, such as added ones, that the tokenizer.json beside a tokenizer.model has and the latter lacks."""
    beside = path.with_name("tokenizer.json")
    if not beside.is_file():
        return []
    pieces = {piece.piece for piece in model_proto(path).pieces}
    # in a tokenizer.json a user-defined piece contains real spaces
    return sorted(token for token in read_json(beside).get_vocab() if token.replace(" ", SPACE) not in pieces)


def model_proto(path: Path) -> Any:
    """Parse a tokenizer.model: pieces with scores and types, settings of trainer and normaliser. Raises UserError."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    if proto.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
        raise UserError(f"{path} is a Unigram model; Llama-style tokenizers are BPE (train it with model_type=bpe)")
    return proto
