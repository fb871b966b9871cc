"""The ids of Megatron's SentencePieceTokenizer, and that raw text stays plain text."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_llm.tokenizer import base as vocabulary
from megatron_llm.tokenizer.build import build
from run_contract.errors import InputsMissing, UserError

WORDS = "en hane gol højt over den våde eng mens æbler faldt og børn lo ad gæs katte løb hunde sov fugle fløj"
TEXT = [" ".join(WORDS.split()[(i * k) % 22] for k in range(1, 12)) + "." for i in range(1, 200)]
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
"""Settings of Llama's tokenizer: nothing is normalised."""
CONTROLS = ["<s>", "</s>", "<unk>", "<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>"]


def train(path: Path, **options: object) -> Path:
    """A small BPE model with byte fallback, as Llama's."""
    settings = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "pad_id": -1, "minloglevel": 2}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT), model_writer=file, **{**settings, **options}
        )
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with nothing but <unk>, <s> and </s>, as Llama's."""
    return train(tmp_path_factory.mktemp("plain") / "tokenizer.model")


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with <EOD> as a user-defined symbol, <MASK> as a control symbol, and padding of its own."""
    return train(
        tmp_path_factory.mktemp("special") / "tokenizer.model",
        user_defined_symbols=["<EOD>", "<table>"],
        control_symbols=["<MASK>"],
        pad_id=3,
    )


def test_without_new_tokens(plain: Path) -> None:
    """The vocabulary stays as it is, EOD is the end of sentence, and the ids are SentencePiece's."""
    tokenizer = build("SentencePieceTokenizer", plain, no_new_tokens=True)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(plain))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (330, 2, 1)
    assert tokenizer.encode_batch(TEXT) == [reference.encode(text) for text in TEXT]
    assert [tokenizer.encode(text) for text in TEXT] == tokenizer.encode_batch(TEXT)


def test_new_tokens_follow_the_vocabulary(plain: Path) -> None:
    """<CLS> <SEP> <EOD> <MASK> <PAD> take V … V+4, then the extra tokens; EOD is V+2."""
    tokenizer = build("SentencePieceTokenizer", plain, vocab_extra_ids_list="<|a|>,<|b|>")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (337, 332, 1)
    assert tokenizer.encode("<|b|>") == [336]
    assert tokenizer.encode("<|a|>") == [335]


def test_tokens_the_vocabulary_has_keep_their_ids(special: Path) -> None:
    """Only <CLS> and <SEP> are new where <EOD>, <MASK> and padding exist; EOD is <EOD> either way."""
    eod = sentencepiece.SentencePieceProcessor(model_file=str(special)).piece_to_id("<EOD>")
    kept = build("SentencePieceTokenizer", special, no_new_tokens=True)
    added = build("SentencePieceTokenizer", special)
    assert (kept.vocab_size, kept.eod) == (330, eod)
    assert (added.vocab_size, added.eod) == (332, eod)


@pytest.mark.parametrize("no_new_tokens", [True, False])
@pytest.mark.parametrize("which", ["plain", "special"])
def test_control_strings_in_text_are_plain_text(
    which: str, no_new_tokens: bool, request: pytest.FixtureRequest
) -> None:
    """The literal text of a control token never gives its id, even where SentencePiece alone would match it."""
    path = request.getfixturevalue(which)
    tokenizer = build("SentencePieceTokenizer", path, no_new_tokens=no_new_tokens)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    forbidden = {reference.piece_to_id(name) for name in CONTROLS} | {tokenizer.eod, *range(330, tokenizer.vocab_size)}
    for name in CONTROLS:
        for text in (name, f"en hane {name} gol", f"eng{name}{name}eng"):
            ids = tokenizer.encode(text)
            assert not forbidden & set(ids)
            assert reference.decode(ids) == text
            assert tokenizer.encode_batch([text]) == [ids]


def test_a_symbol_that_is_no_special_token_still_matches(special: Path) -> None:
    """Hiding <EOD> leaves every other id of the model as it was."""
    tokenizer = build("SentencePieceTokenizer", special, no_new_tokens=True)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(special))
    for text in [*TEXT, "en <table> eng"]:
        assert tokenizer.encode(text) == reference.encode(text)


def test_extra_tokens_split_the_text(plain: Path) -> None:
    """The leftmost listed token matches, of two at one place the first in the list; the rest is encoded in pieces."""
    tokenizer = build("SentencePieceTokenizer", plain, vocab_extra_ids_list="<a>,<a>b,</s>")
    encode = sentencepiece.SentencePieceProcessor(model_file=str(plain)).encode
    assert tokenizer.encode("en <a>bhane</s>") == [*encode("en "), 335, *encode("bhane"), 2]
    assert tokenizer.encode_batch(["<a><a>", ""]) == [[335, 335], []]


def test_fingerprint_tells_models_and_options_apart(plain: Path, special: Path, tmp_path: Path) -> None:
    """The same file elsewhere has the same fingerprint; another file or other options do not."""
    copy = tmp_path / "copy.model"
    copy.write_bytes(plain.read_bytes())
    a, b, c, d, e = (
        build("SentencePieceTokenizer", file, no_new_tokens=no_new, vocab_extra_ids_list=extra).fingerprint
        for file, no_new, extra in [
            (plain, True, None),
            (copy, True, None),
            (plain, False, None),
            (special, True, None),
            (plain, False, "<a>"),
        ]
    )
    assert a == b
    assert len({a, c, d, e}) == 4


@pytest.mark.parametrize("content", [b"", b"hello world" * 10, b'{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    """Empty, text and a Hugging Face tokenizer.json are named as no SentencePiece model."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model"):
        build("SentencePieceTokenizer", path)


def test_a_truncated_model_is_refused(plain: Path, tmp_path: Path) -> None:
    """Half a model is no model."""
    path = tmp_path / "half.model"
    path.write_bytes(plain.read_bytes()[:2001])
    with pytest.raises(UserError, match="not a SentencePiece model"):
        build("SentencePieceTokenizer", path)


def test_what_cannot_be_built_is_refused(plain: Path, tmp_path: Path) -> None:
    """An unknown type names the valid one, a missing file is InputsMissing; forbidden additions and a lost EOD too."""
    with pytest.raises(UserError, match="BertTokenizer is unknown; valid: SentencePieceTokenizer, Hugging"):
        build("BertTokenizer", plain)
    with pytest.raises(InputsMissing, match=r"none\.model cannot be read: No such file"):
        build("SentencePieceTokenizer", tmp_path / "none.model")
    with pytest.raises(UserError, match=r"names '<a>', which .* lacks, and --no_new_tokens forbids"):
        build("SentencePieceTokenizer", plain, no_new_tokens=True, vocab_extra_ids_list="<a>")
    with pytest.raises(UserError, match="neither <EOD> nor an end-of-sentence piece"):
        build("SentencePieceTokenizer", train(tmp_path / "no_eos.model", eos_id=-1), no_new_tokens=True)


def awkward_text(seed: int, length: int) -> str:
    """Words, runs of spaces, line ends, SentencePiece's own space symbol, emoji and controls, at random."""
    source = random.Random(seed)
    pieces = [
        *WORDS.split(),
        " ",
        "  ",
        "     ",
        " \n",
        "\n ",
        "\t",
        "\u2581",
        " \u2581",
        "\u2581 ",
        "😀",
        "\x00",
        ".",
        "ʒ",
    ]
    return "".join(source.choice(pieces) + source.choice(("", " ")) for _ in range(length))


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, {"user_defined_symbols": ["<table>", "    "]}])
def test_a_long_text_is_cut_without_changing_its_ids(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a space before the text: parts of some words, and the ids of the whole."""
    path = train(tmp_path / "x.model", **LLAMA, **options)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = build("SentencePieceTokenizer", path, no_new_tokens=True)
    assert tokenizer.uncut is None
    monkeypatch.setattr(vocabulary, "LONG", 40)
    parts = 0
    for seed in range(300):
        text = awkward_text(seed, 100)
        parts += len(tokenizer.cut(text))
        assert tokenizer.encode(text) == reference.encode(text)
    assert parts > 2000
    for text in ("x" * 100, "x" * 100 + " ", " " * 100, "x" * 40 + " y", "x" * 40 + "  ", "\u2581 a" * 50):
        assert tokenizer.encode(text) == reference.encode(text)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text"),
        ({"remove_extra_whitespaces": True}, "normalises text"),
        ({"split_by_whitespace": False}, "has a space inside"),
        ({"user_defined_symbols": ["en hane"]}, "'en.hane' has a space inside"),
        ({"model_type": "unigram", "vocab_size": 290}, "not BPE"),
        ({"treat_whitespace_as_suffix": True}, "spaces at the end"),
        ({"byte_fallback": False, "vocab_size": 80}, "no byte fallback"),
    ],
)
def test_a_long_text_is_whole_where_a_cut_could_change_its_ids(
    options: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that normalise, or that have pieces across spaces: no cut, and the reason."""
    path = train(tmp_path / "x.model", **{**LLAMA, **options})
    tokenizer = build("SentencePieceTokenizer", path, no_new_tokens=True)
    monkeypatch.setattr(vocabulary, "LONG", 40)
    assert tokenizer.uncut is not None
    assert re.search(why, tokenizer.uncut)
    text = awkward_text(1, 100)
    assert tokenizer.cut(text) == [text]
    assert tokenizer.encode(text) == sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text)


def test_extra_tokens_match_across_the_places_of_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listed token that holds a space is found wherever it stands in a long text."""
    path = train(tmp_path / "x.model", **LLAMA)
    monkeypatch.setattr(vocabulary, "LONG", 10)
    tokenizer = build("SentencePieceTokenizer", path, vocab_extra_ids_list="<a b>")
    encode = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
    for length in range(30):
        text = "en hane gol "[: length % 12] * 3
        assert tokenizer.encode(f"{text}<a b>{text}") == [*encode(text), 335, *encode(text)]


def test_numbered_extra_tokens(plain: Path) -> None:
    """--vocab_extra_ids adds <extra_id_0>, … after Megatron's own tokens and before the listed ones, as it does."""
    tokenizer = build("SentencePieceTokenizer", plain, vocab_extra_ids=2, vocab_extra_ids_list="<a>")
    listed = build("SentencePieceTokenizer", plain, vocab_extra_ids_list="<extra_id_0>,<extra_id_1>,<a>")
    assert list(tokenizer.new_ids)[-3:] == ["<extra_id_0>", "<extra_id_1>", "<a>"]
    assert tokenizer.encode("x <extra_id_1>")[-1] == tokenizer.new_ids["<extra_id_1>"]
    assert tokenizer.fingerprint == listed.fingerprint
    assert tokenizer.vocab_size == listed.vocab_size
