"""The characters on which gigatoken and a tokenizer's own library agree; all other documents take that library."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from megatron_llm.tokenizer import agreement, agreement_file
from megatron_llm.tokenizer import encoder as encoding
from megatron_llm.tokenizer.characters import Characters
from megatron_llm.tokenizer.encoder import SMALL, open_encoder, open_fast
from megatron_llm.tokenizer.gigatoken import Fast, Unfit
from tests.engine.small_tokenizers import KINDS, LINES, llama_2

BLOCKS = ((0, 0xA00), (0x0E00, 0x0E80), (0x2000, 0x2100), (0x3000, 0x3100), (0x4E00, 0x4E80), (0xAC00, 0xAC40),
          (0x11930, 0x11940), (0x1F600, 0x1F640))  # fmt: skip
HOSTILE = (
    "\u0915\u0898\u093c", "a\u0301\u0323b", "\u0f73\u0f75", "\U00011935\U00011930", "\U000105d2\u0307",
    "\U00011382\U000113c9", "\u1100\u1161\u11a8", "\uac00\u11a8", "\u0344\u0345", "'\u017f \u212a \u2126",
    "\u0897a", "\U0001e6ff", "\ue000\U0010ffff", "か\u3099", "ﾊﾟｶﾞ", "が", "\ufffd", "1234567", "'s'LL 'Re",
    "<s>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<unk>", "<table>", "<0x0A>", "▁▁", "\n\n", "  ", "   ",
    "\t\r\n", "\x00\x1b\x7f\x85\u2028\ufeff\u200d", "👩\u200d👩\u200d👧🇩🇰",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _few_characters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is established here is established for some scripts only, and kept apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "BLOCKS", BLOCKS)
        patch.setenv("NUMBA_CACHE_DIR", str(tmp_path_factory.mktemp("kept")))
        yield


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return KINDS[request.param](tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return llama_2(tmp_path_factory.mktemp("vocabulary"))


def array(texts: list[str]) -> Any:
    return pa.array(texts, pa.large_string())


def hostile_texts(count: int, seed: int) -> list[str]:
    """Ordinary lines, with characters of any plane and hostile strings at random places in every other one."""
    source = random.Random(seed)
    texts = []
    for number in range(count):
        text = " ".join(source.choices(LINES, k=source.randrange(1, 3)))
        for _ in range(number % 2 * source.randrange(5)):
            point = source.choice((0x300, 0x900, 0x1000, 0x3000, 0x10000, 0x20000, 0x110000))
            character = chr(source.randrange(point))
            piece = source.choice(HOSTILE) if source.random() < 0.5 or "\ud800" <= character < "\ue000" else character
            place = source.randrange(len(text) + 1)
            text = text[:place] + piece + text[place:]
        texts.append(text if source.random() < 0.9 else unicodedata.normalize("NFD", text))
    return texts


def test_the_ids_of_any_document_at_any_place_are_the_librarys(tokenizer: Any) -> None:
    """Hostile and ordinary documents in blocks of any length: each has the ids that its own library gives it alone."""
    texts = hostile_texts(1500, seed=12)
    expected = [tokenizer.encode(text) for text in texts]
    encoder = open_encoder(tokenizer, "gigatoken", SMALL)
    source, found, slowly, start = random.Random(1), [], [], 0
    while start < len(texts):
        end = start + source.choice((1, 2, 40, 300))
        (ids, sizes), slow = encoder.encode(array(texts).slice(start, end - start), first=source.random() < 0.5)
        found += [part.tolist() for part in np.split(ids, np.cumsum(sizes)[:-1])]
        slowly += slow.tolist()
        start = end
    assert found == expected
    assert 0.2 < np.mean(slowly) < 0.8


def test_marks_and_characters_that_a_library_may_not_know_take_the_reference(tokenizer: Any) -> None:
    """Where both libraries meet them in different Unicode versions their ids differ, and in some context only."""
    fast = open_fast(tokenizer)
    texts = ["\u0915\u0898\u093c", "e\u0301", "\u0378", "\ue000", "\u0f73", "\U00020000", "ब", "æ😀"]
    assert fast.refuses(array(texts)).tolist() == [True] * 6 + [False] * 2
    composes = "NFC" in tokenizer.content.decode(errors="replace")
    assert fast.refuses(array(["\U00011935\U00011930"])).tolist() == [composes]  # the pair differs only when composed
    assert fast.characters is not None
    assert not fast.characters.outside(array([chr(point) for point in range(0x20, 0x7F)])).any()


@pytest.mark.parametrize("backend", ["gigatoken", "sentencepiece"])
def test_a_block_whose_documents_all_or_none_take_the_reference(tokenizer: Any, backend: str) -> None:
    """Every subset of the documents may be empty: of the sampled, of the fast, of the slow, of all."""
    encoder = open_encoder(tokenizer, backend, SMALL)
    control = "Nu <s>299 kr.</s> 199 kr. <|endoftext|> <|end_of_text|> <eos>"
    for texts in ([control], [control] * 3, ["\u0301"], ["en hane"], ["", ""], [], [control, "en hane"], ["", control]):
        (ids, sizes), slowly = encoder.encode(array(texts), first=True)
        expected = [tokenizer.encode(text) for text in texts]
        assert ids.tolist() == [token for one in expected for token in one]
        assert sizes.tolist() == [len(one) for one in expected]
        assert slowly.tolist() == [backend == "sentencepiece" or text in (control, "\u0301") for text in texts]
    if encoder.fast:
        assert encoder.fast.differing([]) == encoder.fast.differing([control]) == []


def test_characters_with_other_ids_are_left_out(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A character that differs alone, one that differs between letters, a pair: left out, and nothing else."""
    fast = Fast(llama)
    encode = llama.encode_plain
    different = ("Ж", "aЩb", "\u09c7\u09be")
    monkeypatch.setattr(
        llama, "encode_plain", lambda texts: [[*ids, 0] if any(one in text for one in different) else ids
                                              for text, ids in zip(texts, encode(texts), strict=True)],
    )  # fmt: skip
    monkeypatch.setattr(agreement, "vocabulary_lines", lambda _: ["Privet", "ЖЩ og \u09c7"])
    found = agreement.establish(fast).table
    every = set(map(ord, agreement.candidates(llama)))
    assert every - set(np.flatnonzero(found).tolist()) == set(map(ord, "ЖЩ\u09c7\u09be"))


def test_libraries_that_differ_in_more_than_characters_are_unfit(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that differ on a piece of the vocabulary, where no character alone does: the reason, kept for later tasks."""
    monkeypatch.setattr(agreement, "BLOCKS", ())
    monkeypatch.setattr(agreement, "composed", lambda: ())
    monkeypatch.setattr(agreement, "PROBES", ())
    monkeypatch.setattr(agreement, "vocabulary_lines", lambda _: ["en hane"])
    monkeypatch.setattr(Characters, "keep", lambda self, text: text)
    monkeypatch.setattr(agreement_file, "file_name", lambda _: "unfit.json")
    with monkeypatch.context() as patch:
        patch.setattr(llama, "encode_plain", lambda texts: [[0]] * len(texts))
        with pytest.raises(Unfit, match="its ids differ from sentencepiece's on 'en hane'"):
            open_fast(llama)
    monkeypatch.setattr(encoding, "Fast", None)  # is not even loaded
    assert "its ids differ" in open_encoder(llama, "auto", SMALL).why_not_fast


def test_what_was_established_is_kept_and_a_damaged_file_is_written_again(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second task compares nothing; every kind of damage, and another version of a library, make it compare."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    wanted, runs = Characters(range(0x20, 0x7F)), []
    monkeypatch.setattr(agreement, "establish", lambda _: runs.append(1) or wanted)
    assert open_fast(llama).characters is not None
    characters = open_fast(llama).characters
    assert characters is not None
    assert np.array_equal(characters.table, wanted.table)
    (file,) = (tmp_path / "kept").iterdir()
    whole = file.read_bytes()
    damaged = [b"", b"{}", b"[]", b"\xff", whole[:-9], whole.replace(b"127", b"999"), b'{"ranges": 1, "digest": 1}']
    for number, content in enumerate(damaged, 2):
        file.write_bytes(content)
        open_fast(llama)
        assert len(runs) == number
        assert file.read_bytes() == whole
    monkeypatch.setattr(agreement_file, "version", lambda library: f"next {library}")
    open_fast(llama)
    assert len(runs) == len(damaged) + 2
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_without_a_folder_that_can_be_written_each_task_compares(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in the place of all folders: nothing is kept, and the characters are right."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(agreement_file, "folders", lambda: [tmp_path / "file", tmp_path / "file/below"])
    monkeypatch.setattr(agreement, "establish", lambda _: Characters([65]))
    characters = open_fast(llama).characters
    assert characters is not None
    assert characters.table.sum() == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_texts_with_characters_outside_a_set() -> None:
    """Random sets and texts of every length of UTF-8, also slices: as Python's own look at each character."""
    source = random.Random(5)
    ends = (0x80, 0x800, 0xD800, 0x10000, 0x110000)
    alphabet = [chr(source.randrange(start, end)) for start, end in ((0, 0x80), (0x80, 0x800), (0x800, 0xD800),
                (0xE000, 0x10000), (0x10000, 0x110000)) for _ in range(12)]  # fmt: skip
    for case in range(30):
        members = set(source.sample(alphabet, source.randrange(len(alphabet) + 1)))
        whole = {chr(point) for point in range(0x80)} if case % 2 else set()
        texts = ["".join(source.choices(alphabet + [*"abc"] * 40, k=source.randrange(6))) for _ in range(200)]
        expected = [not (members | whole).issuperset(text) for text in texts]
        characters = Characters(map(ord, members | whole))
        assert characters.outside(array(texts)).tolist() == expected
        assert characters.outside(array(texts).slice(17, 90)).tolist() == expected[17:107]
    assert Characters(range(ends[-1])).outside(array(alphabet)).tolist() == [False] * len(alphabet)
    assert Characters([]).outside(array(["", "a", "é"])).tolist() == [False, True, True]
