"""Exports a tokenizer to Hugging Face files with the same ids: tokenizer.{model,json} and tokenizer_config.json.

A SentencePiece BPE model is converted: tokenizer.model -> pieces, scores and normaliser -> merges in order of score ->
tokenizer.json -> comparison with sentencepiece on every piece of the vocabulary and on awkward text. A bare
tokenizer.model would not be enough, because Transformers 5 rebuilds it with a different treatment of leading spaces.
Its `LlamaTokenizer` does the same even with a tokenizer.json. tokenizer_config.json names that class only if it gives
the right ids nevertheless, otherwise `PreTrainedTokenizerFast`, which takes tokenizer.json as it is in Transformers 4
and 5. A tokenizer.json is copied with the tokenizer_config.json beside it, and compared too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from megatron_llm.tokenizer import export_check
from megatron_llm.tokenizer.export_check import PROBES
from megatron_llm.tokenizer.files import (
    SPACE,
    added_beside,
    file_of,
    model_proto,
    read_config,
    read_json,
    read_sentencepiece,
)
from megatron_llm.tokenizer.special_tokens import NONE, SpecialTokens
from run_contract.errors import UserError

CLASSES = ("LlamaTokenizer", "PreTrainedTokenizerFast")
"""Tokenizer classes for a SentencePiece model, in order of preference."""


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first; the pairs of one piece are in vocabulary order."""
    order = {piece: index for index, piece in enumerate(scores)}
    merges = [
        (-score, order[piece[:cut]], order[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in order and piece[cut:] in order
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """SentencePiece's normalisation: character map, spaces, dummy prefix and the symbol for spaces."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _build(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The converted tokenizer, and its control tokens by Hugging Face's names."""
    proto, processor = model_proto(path), read_sentencepiece(path)
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
    return tokenizer, names


def _beginning(bos: str, number: int) -> processors.TemplateProcessing:
    """A post-processor that puts this token at the beginning of texts."""
    return processors.TemplateProcessing(
        single=[f"{bos}:0", "$A:0"], pair=[f"{bos}:0", "$A:0", f"{bos}:1", "$B:1"], special_tokens=[(bos, number)]
    )


def save(folder: Path, vocab_file: Path, max_length: int, special: SpecialTokens = NONE) -> None:
    """Write the tokenizer files into `folder` and compare them with sentencepiece, or with the tokenizer.json.

    Raises UserError when they differ.
    """
    vocab_file = file_of(vocab_file)
    if vocab_file.suffix == ".json":
        _save_json(folder, vocab_file, max_length, special)
        return
    tokenizer, names = _build(vocab_file)
    if lost := added_beside(vocab_file):
        print(
            f"{vocab_file} lacks {len(lost)} tokens of the tokenizer.json beside it, the first is {lost[0]!r}: they "
            "are not exported; give that file as --vocab_file to export them",
            flush=True,
        )
    special.add_to(tokenizer)
    names |= special.roles
    if bos := names.get("bos_token"):
        number = tokenizer.token_to_id(bos)
        assert number is not None
        tokenizer.post_processor = _beginning(bos, number)
    shutil.copyfile(vocab_file, folder / "tokenizer.model")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": "bos_token" in names,
        "add_eos_token": False,
        "add_prefix_space": model_proto(vocab_file).normalizer_spec.add_dummy_prefix,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "model_max_length": max_length,
        **names,
    }
    _write_config_that_agrees(folder, vocab_file, config, special)


def _write_config_that_agrees(
    folder: Path, vocab_file: Path, config: Mapping[str, Any], special: SpecialTokens
) -> None:
    """Write tokenizer_config.json with the first class that gives sentencepiece's ids.

    Raises UserError when none does.
    """
    for name in CLASSES:
        _write_config(folder, {"tokenizer_class": name, **config})
        difference = export_check.difference(folder, vocab_file) or (special.check(folder) if special else None)
        if difference is None:
            print(f"tokenizer class {name}: the ids of {vocab_file.name}", flush=True)
            return
        print(f"tokenizer class {name}: different ids {difference}", flush=True)
    raise UserError(
        f"{vocab_file}: the exported tokenizer differs {difference}; this tokenizer's settings are not supported"
    )


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _save_json(folder: Path, vocab_file: Path, max_length: int, special: SpecialTokens) -> None:
    """Copy a tokenizer.json and its configuration, with the class that uses it as it is, and compare copy and
    original."""
    from transformers import AutoTokenizer

    shutil.copyfile(vocab_file, folder / "tokenizer.json")
    if special:
        changed = read_json(vocab_file)
        special.add_to(changed)
        changed.save(str(folder / "tokenizer.json"))
    kept = {name: value for name, value in read_config(vocab_file).items() if name != "auto_map"}
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, **special.roles}
    _write_config(folder, {**kept, **own})
    if special and (difference := special.check(folder)):
        raise UserError(
            f"{vocab_file}: the exported tokenizer differs {difference}; this tokenizer's settings are not supported"
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
