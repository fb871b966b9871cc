"""SentencePiece BPE -> Hugging Face tokenizer files with the same ids: tokenizer.{model,json}, tokenizer_config.json.
A tokenizer.json is copied with the tokenizer_config.json beside it, and compared too.

tokenizer.model -> pieces, scores and normaliser -> merges in order of score -> tokenizer.json -> compared with
sentencepiece on every piece of the vocabulary and on awkward text. A bare tokenizer.model is not enough: Transformers 5
rebuilds it with another treatment of leading spaces, and so does its `LlamaTokenizer` with a tokenizer.json; the class
`PreTrainedTokenizerFast` takes tokenizer.json as it stands, in Transformers 4 and 5.

Known difference: the literal text of a control piece (`<s>`, `</s>`, `<unk>`) or of a user-defined symbol is matched as
that token by Hugging Face and is plain text to sentencepiece.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from megatron_llm.files import InputsMissing, UserError

SPACE = "\u2581"
PROBES = (
    "Rødgrød med fløde, æblekage og en kop kaffe.",
    "  to mellemrum  foran,   tre inde i, og to bagefter  ",
    " \t fane\tog\nlinjeskift\r\n",
    "år 1999: 3,14 kr. / 50 % – «citat» “quote” …",
    "smil 😀 👩‍👩‍👧 🇩🇰 ☕",
    "日本語 العربية Ελληνικά русский",
    "e\u0301 e\u0301\u0300 \ufeff\u00a0\u3000\u200b ﬁ ½",
    "\x01\x1f\x7f\u0085\u2028 \U000e0001",
    "",
    " ",
)
"""Text on which the two tokenizers are compared, besides the vocabulary itself."""


def read_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer.model; raises InputsMissing or UserError."""
    if not path.is_file():
        raise InputsMissing(f"{path} is missing; give the SentencePiece tokenizer.model of the model")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from error


def read_json(path: Path) -> Tokenizer:
    """A tokenizer.json; raises InputsMissing or UserError."""
    if not path.is_file():
        raise InputsMissing(f"{path} is missing; give the tokenizer.json of the model")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer.json; raises InputsMissing or UserError."""
    config = path.with_name("tokenizer_config.json")
    try:
        raw = json.loads(config.read_bytes())
    except OSError:
        raise InputsMissing(f"{config} is missing; it belongs to {path}") from None
    except ValueError as error:
        raise UserError(f"{config} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{config} holds {type(raw).__name__}, not a JSON object")
    return raw


def file_of(path: Path) -> Path:
    """The file that a model folder's tokenizer is made from; a file stands for itself."""
    if not path.is_dir():
        return path
    model = path / "tokenizer.model"
    return model if model.is_file() else path / "tokenizer.json"


def sentence_ids(path: Path) -> tuple[int | None, int | None]:
    """The ids of the beginning and the end of a sentence, where the tokenizer has them."""
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
    """Raise UserError when the tokenizer makes ids that the model does not have."""
    path = file_of(path)
    size = (
        max(read_json(path).get_vocab().values()) + 1
        if path.suffix == ".json"
        else read_sentencepiece(path).vocab_size()
    )
    if size > vocab_size:
        raise UserError(
            f"{path} has {size} pieces but the model's vocabulary is {vocab_size}; give the model's own tokenizer"
        )


def _model_proto(path: Path) -> Any:
    """The parsed file: pieces with scores and types, trainer and normaliser settings."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    if proto.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
        raise UserError(f"{path} is a Unigram model; Llama-style tokenizers are BPE (train it with model_type=bpe)")
    return proto


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first; pairs of one piece in vocabulary order."""
    order = {piece: index for index, piece in enumerate(scores)}
    merges = [
        (-score, order[piece[:cut]], order[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in order and piece[cut:] in order
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """SentencePiece's normalisation: character map, spaces, dummy prefix, space symbol."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _build(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its control tokens by Hugging Face's names."""
    proto, processor = _model_proto(path), read_sentencepiece(path)
    kinds = type(proto.pieces[0])
    plain = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
    unknown = processor.id_to_piece(processor.unk_id())
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
            merges=_merges(plain),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    strip = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    names = {"unk_token": unknown}
    for name, number in (("bos_token", processor.bos_id()), ("eos_token", processor.eos_id())):
        if number >= 0:
            names[name] = processor.id_to_piece(number)
    controls = [piece.piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in controls])
    defined = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece.replace(SPACE, " "), normalized=False) for piece in defined])
    if bos := names.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, processor.bos_id())]
        )
    return tokenizer, names


def probes(vocab_file: Path) -> Iterator[str]:
    """Awkward text, then every plain piece of the vocabulary, 16 a line; no line holds a control piece's text."""
    yield from PROBES
    pieces = _model_proto(vocab_file).pieces
    kinds = type(pieces[0])
    plain = [piece.piece.replace(SPACE, " ") for piece in pieces if piece.type == kinds.NORMAL]
    matched = [piece.piece for piece in pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)]
    for start in range(0, len(plain), 16):
        line = "".join(plain[start : start + 16])
        if not any(text in line for text in matched):
            yield line


@dataclass(frozen=True)
class TextComparison:
    """How the ids of a folder's tokenizer compare with sentencepiece's over real texts."""

    texts: int
    tokens: int
    control_text: int
    """Texts with the literal text of a control piece, the known difference; their ids are not compared."""
    first_difference: str | None
    """The beginning of the first text that differs."""


def compare_texts(folder: Path, vocab_file: Path, texts: Iterable[str]) -> TextComparison:
    """Compare AutoTokenizer, loaded from `folder`, with the library of `vocab_file` on texts."""
    from transformers import AutoTokenizer

    encode, matched = _plain_encoder(file_of(vocab_file))
    loaded = AutoTokenizer.from_pretrained(str(folder))
    count = tokens = control = 0
    first = None
    for text in texts:
        count += 1
        if any(piece in text for piece in matched):
            control += 1
            continue
        expected = encode(text)
        tokens += len(expected)
        if first is None and loaded(text, add_special_tokens=False, verbose=False)["input_ids"] != expected:
            first = text[:80]
    return TextComparison(count, tokens, control, first)


def _plain_encoder(vocab_file: Path) -> tuple[Callable[[str], list[int]], list[str]]:
    """What gives the ids of a text, and the pieces whose literal text it may treat in another way."""
    if vocab_file.suffix == ".json":
        tokenizer = read_json(vocab_file)
        tokenizer.no_truncation()
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), added
    pieces = _model_proto(vocab_file).pieces
    plain = (type(pieces[0]).NORMAL, type(pieces[0]).BYTE)
    return read_sentencepiece(vocab_file).encode, [piece.piece for piece in pieces if piece.type not in plain]


def check_folder(folder: Path, vocab_file: Path) -> None:
    """Raise UserError unless AutoTokenizer, loaded from `folder`, gives sentencepiece's ids (after its <s>)."""
    from transformers import AutoTokenizer

    processor, loaded = read_sentencepiece(vocab_file), AutoTokenizer.from_pretrained(str(folder))
    start = [processor.bos_id()] if processor.bos_id() >= 0 else []
    for text in probes(vocab_file):
        expected, found = start + processor.encode(text), loaded(text, verbose=False)["input_ids"]
        if expected != found:
            raise UserError(
                f"{vocab_file}: the exported tokenizer differs on {text[:60]!r}: sentencepiece {expected[:12]}, "
                f"Hugging Face {found[:12]}; this tokenizer's settings are not supported"
            )


def save(folder: Path, vocab_file: Path, max_length: int) -> None:
    """Write the tokenizer files into `folder` and check them against sentencepiece, or against the tokenizer.json."""
    vocab_file = file_of(vocab_file)
    if vocab_file.suffix == ".json":
        _save_json(folder, vocab_file, max_length)
        return
    tokenizer, names = _build(vocab_file)
    shutil.copyfile(vocab_file, folder / "tokenizer.model")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": "bos_token" in names,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "model_max_length": max_length,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    check_folder(folder, vocab_file)


def _save_json(folder: Path, vocab_file: Path, max_length: int) -> None:
    """Copy a tokenizer.json, and its configuration with the class that takes it as it stands; compare the two."""
    from transformers import AutoTokenizer

    shutil.copyfile(vocab_file, folder / "tokenizer.json")
    kept = {name: value for name, value in read_config(vocab_file).items() if name != "auto_map"}
    config = {**kept, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    original, loaded = read_json(vocab_file), AutoTokenizer.from_pretrained(str(folder))
    original.no_truncation()
    for text in PROBES:
        expected = original.encode(text, add_special_tokens=False).ids
        found = loaded(text, add_special_tokens=False, verbose=False)["input_ids"]
        if expected != found:
            raise UserError(
                f"{vocab_file}: the exported tokenizer differs on {text[:60]!r}: tokenizer.json gives {expected[:12]}, "
                f"the exported folder {found[:12]}; this tokenizer's settings are not supported"
            )
