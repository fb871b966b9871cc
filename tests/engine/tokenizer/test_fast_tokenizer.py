"""gigatoken gives the ids of the tokenizer's own library, or is not used; documents keep their order and their ids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_llm.tokenizer import agreement
from megatron_llm.tokenizer import base as vocabulary
from megatron_llm.tokenizer import encoder as encoding
from megatron_llm.tokenizer.agreement import random_texts
from megatron_llm.tokenizer.build import build
from megatron_llm.tokenizer.encoder import SMALL, Encoder, interleaved, open_encoder, open_fast
from megatron_llm.tokenizer.gigatoken import Fast, Unfit
from megatron_llm.tokenizer.sentencepiece import SentencePieceTokenizer
from run_contract.errors import UserError

WORDS = "en hane gol højt over den våde eng mens æbler faldt og børn lo ad gæs katte løb hunde sov fugle fløj"
LINES = [" ".join(WORDS.split()[(i * k) % 22] for k in range(1, 12)) + "." for i in range(1, 200)]
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}


def model(path: Path, **options: Any) -> SentencePieceTokenizer:
    """A small SentencePiece BPE model, as Llama's."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=file, minloglevel=2,
            **{"vocab_size": 330, "model_type": "bpe", **LLAMA, **options},
        )  # fmt: skip
    tokenizer = build("SentencePieceTokenizer", path, no_new_tokens=True)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


def byte_level(path: Path, **added: Any) -> Any:
    """A small byte-level tokenizer.json with an end token and an added token."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    backend.add_tokens([AddedToken("<table>", **{"normalized": False, **added})])
    backend.enable_truncation(4)
    backend.save(str(path))
    path.with_name("tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    return build("HuggingFaceTokenizer", path, no_new_tokens=True)


@pytest.fixture(autouse=True, scope="module")
def _few_characters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is established here is established for letters of Europe and some others, and kept apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "BLOCKS", ((0, 0x600), (0x2000, 0x2100), (0x3000, 0x3100), (0x1F600, 0x1F650)))
        patch.setenv("NUMBA_CACHE_DIR", str(tmp_path_factory.mktemp("kept")))
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """With a user-defined symbol."""
    return model(tmp_path_factory.mktemp("llama") / "tokenizer.model", user_defined_symbols=["<table>"])


@pytest.fixture(scope="module")
def json_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return byte_level(tmp_path_factory.mktemp("json") / "tokenizer.json")


@pytest.fixture(params=["llama", "json_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def array(texts: list[str]) -> Any:
    return pa.array(texts, pa.large_string())


def test_the_fast_ids_are_the_librarys(tokenizer: Any) -> None:
    """Words, and 500 random strings of another seed than the self-test's: equal ids and sizes."""
    random.seed(1)
    texts = [*LINES, "", *("".join(random.sample(text * 2, len(text))) for text in random_texts(500))]
    ids, sizes = open_fast(tokenizer)(array(texts))
    expected = tokenizer.encode_plain(texts)
    assert sizes.tolist() == [len(one) for one in expected]
    assert ids.tolist() == [token for one in expected for token in one]


def test_documents_with_control_texts_keep_their_place_and_are_plain_text(tokenizer: Any) -> None:
    """Control pieces, symbols and ordinary documents mixed: the tokenizer's own ids, in order, and who encoded what."""
    end = "</s>" if tokenizer.reference == "sentencepiece" else "<|end|>"
    texts = ["en hane", f"gol {end} højt", "", f"{end}{end}", "<table>", "over den", f"en <table> {end}"] * 3
    (ids, sizes), slowly = open_encoder(tokenizer, "gigatoken", SMALL).encode(array(texts), first=True)
    expected = [tokenizer.encode(text) for text in texts]
    assert np.split(ids, np.cumsum(sizes)[:-1])[1].tolist() == expected[1]
    assert ids.tolist() == [token for one in expected for token in one]
    assert slowly.tolist() == [False, True, False, True, True, False, True] * 3
    assert tokenizer.eod not in ids.tolist()


def test_slices_of_an_array_are_encoded_as_they_are(tokenizer: Any) -> None:
    """A slice of a larger array, as a block of a file may be, has the ids of its own documents."""
    encoder = open_encoder(tokenizer, "auto", SMALL)
    assert encoder.fast is not None
    (ids, sizes), _ = encoder.encode(array(LINES).slice(7, 20), first=False)
    assert ids.tolist() == [token for one in tokenizer.encode_plain(LINES[7:27]) for token in one]
    assert len(sizes) == 20


def test_long_documents_are_encoded_in_parts(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones among short ones, by either library: the ids of the whole documents."""
    texts = ["", " ".join(LINES), "en", " ".join(LINES[:50]) + " </s> " + " ".join(LINES), "x" * 300, "hane"]
    expected = [llama.encode(text) for text in texts]
    monkeypatch.setattr(vocabulary, "LONG", 100)
    monkeypatch.setattr(encoding, "LONG", 100)
    for backend in ("gigatoken", "sentencepiece"):
        (ids, sizes), _ = open_encoder(llama, backend, SMALL).encode(array(texts), first=True)
        assert sizes.tolist() == [len(one) for one in expected]
        assert ids.tolist() == [token for one in expected for token in one]


def test_the_memory_of_an_uncut_document_is_forecast(
    json_tokenizer: Any, llama: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document that cannot be cut is said, with the reason and what it will take; one that can is not."""
    monkeypatch.setattr(vocabulary, "LONG", 100)
    monkeypatch.setattr(encoding, "LONG", 100)
    for tokenizer, text, message in (
        (json_tokenizer, "en hane " * 100, "may join text across any border"),
        (llama, "x" * 1000, "it has no space to cut at"),
        (llama, "en hane " * 100, ""),
    ):
        open_encoder(tokenizer, "auto", SMALL).encode(array([text]), first=False)
        said = capsys.readouterr().err
        assert message in said
        assert ("in one piece" in said) == bool(message)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
            "the model normalises text by a table of sequences",
        ),
        ({"byte_fallback": False, "vocab_size": 80}, "only byte_fallback sentencepiece models"),
        ({"model_type": "unigram", "vocab_size": 290}, "only BPE sentencepiece models"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_unfit_models_are_left_to_sentencepiece(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    """The encoder says why gigatoken is not used, and refuses when it was demanded."""
    tokenizer = model(tmp_path / "tokenizer.model", **options)
    encoder = open_encoder(tokenizer, "auto", SMALL)
    assert encoder.fast is None
    assert why in encoder.why_not_fast
    (ids, _), slowly = encoder.encode(array(LINES), first=True)
    assert slowly.all()
    assert ids.tolist() == [token for one in tokenizer.encode_plain(LINES) for token in one]
    with pytest.raises(UserError, match="--tokenizer_backend gigatoken: gigatoken cannot stand in for sentencepiece"):
        open_encoder(tokenizer, "gigatoken", SMALL)


def test_rules_that_merges_cannot_express_are_refused(llama: SentencePieceTokenizer, tmp_path: Path) -> None:
    """Unused pieces, and pieces of one score (as vocabularies that were extended by hand have them)."""
    for change, why in (("unused", "unused pieces"), ("score", "share a score")):
        changed = type(llama.model)()
        changed.ParseFromString(llama.content)
        pieces = [piece for piece in changed.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
        if change == "unused":
            pieces[3].type = pieces[3].UNUSED
        else:
            pieces[3].score = pieces[4].score
        path = tmp_path / f"{change}.model"
        path.write_bytes(changed.SerializeToString())
        with pytest.raises(Unfit, match=why):
            open_fast(build("SentencePieceTokenizer", path, no_new_tokens=True))


def test_tokens_matched_in_normalised_text_are_refused(tmp_path: Path) -> None:
    """Composition could make such a token out of text that does not hold it."""
    with pytest.raises(Unfit, match="looked for in normalised text"):
        open_fast(byte_level(tmp_path / "tokenizer.json", normalized=True))


def test_a_sample_that_differs_ends_the_fast_run(llama: SentencePieceTokenizer, tmp_path: Path) -> None:
    """With another model's ids in the fast encoder's place, the first block is refused, and names a document."""
    other = model(tmp_path / "other.model", vocab_size=300)
    fast = Fast(llama)
    fast._backend = Fast(other)._backend
    with pytest.raises(Unfit, match="its ids differ from sentencepiece's on '"):
        Encoder(llama, fast, "").encode(array(LINES), first=True)


def test_json_tokenizer_follows_its_files(json_tokenizer: Any, tmp_path: Path) -> None:
    """EOD is the configured end token, truncation is off, special tokens are text and added ones match."""
    size = json_tokenizer.vocab_size
    assert (json_tokenizer.eod, json_tokenizer.bos) == (0, None)
    assert len(json_tokenizer.encode(LINES[0])) > 4
    assert json_tokenizer.encode("en<table>")[-1] == size - 1
    assert 0 not in json_tokenizer.encode("<|end|>")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(json_tokenizer.content)
    with pytest.raises(UserError, match=r"neither <EOD> nor an eos_token that .*tokenizer_config\.json names"):
        build("HuggingFaceTokenizer", path, no_new_tokens=True)
    added = build("HuggingFaceTokenizer", path)
    assert (added.vocab_size, added.eod) == (size + 7, size + 2)
    assert added.fingerprint != json_tokenizer.fingerprint
    raw = json.loads(json_tokenizer.content)
    for content, message in (
        (b"", "not a Hugging Face"),
        (b"{}", "not a Hugging Face"),
        (json.dumps({**raw, "model": {**raw["model"], "dropout": 0.1}}).encode(), "has dropout 0.1"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            build("HuggingFaceTokenizer", path)


def test_the_forecast_is_of_the_library_that_encodes(
    json_tokenizer: Any, llama: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tokenizers` takes 136 bytes per character of a text in one piece, sentencepiece 50."""
    for tokenizer, gigabytes in ((json_tokenizer, "1.36 GB"), (llama, "0.50 GB")):
        encoding.Encoder(tokenizer, None, "").forecast(10**7)
        assert f"encoding it takes about {gigabytes} of memory" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_two_sets_of_texts_in_one_order(share: float) -> None:
    """However many texts belong to each set, empty ones too, each keeps its ids and its place."""
    chance = np.random.default_rng(7)
    sizes = chance.integers(0, 4, 500)
    is_b = chance.random(500) < share
    ids = [np.full(size, number, np.uint32) for number, size in enumerate(sizes)]
    a, b = (
        (np.concatenate([np.empty(0, np.uint32), *(ids[i] for i in np.flatnonzero(chosen))]), sizes[chosen])
        for chosen in (~is_b, is_b)
    )
    found, counts = interleaved(a, b, is_b)
    assert found.tolist() == np.concatenate(ids).tolist()
    assert counts.tolist() == sizes.tolist()
