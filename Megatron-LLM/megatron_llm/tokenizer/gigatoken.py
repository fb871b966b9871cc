"""Uses gigatoken as a fast substitute for a tokenizer's own library, on texts for which the two are known to agree.

`load` refuses tokenizers whose rules gigatoken is not known to follow. tokenizer/agreement.py finds the characters for
which the two libraries give the same ids. `Fast.refuses` says which texts contain anything else; those are encoded by
the tokenizer's own library. `Fast.check` compares samples of the documents, as a safeguard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megatron_llm.data.document_blocks import offsets
from megatron_llm.tokenizer.base import Tokenizer
from megatron_llm.tokenizer.characters import Characters
from megatron_llm.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_llm.tokenizer.sentencepiece import SentencePieceTokenizer


class Unfit(Exception):
    """Raised when gigatoken cannot be used; its text is a clause for messages."""


class Differs(Unfit):
    """Raised when gigatoken and the tokenizer's own library differ on `count` texts, of which `text` is the first."""

    def __init__(self, reference: str, text: str, count: int) -> None:
        super().__init__(f"its ids differ from {reference}'s on {text[:60]!r}")
        self.count = count


class Fast:
    """gigatoken with a tokenizer's vocabulary, for the texts that it does not refuse."""

    characters: Characters | None = None
    """The characters on which both libraries are known to agree.

    None until they are established; until then no character is refused.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Load the tokenizer into gigatoken. Raises Unfit."""
        self.tokenizer = tokenizer
        self._matched = "|".join(map(re.escape, sorted(tokenizer.matched)))
        with unfit(f"it does not take {tokenizer.vocab_file.name}"):
            self._backend = load(tokenizer)

    def __call__(self, texts: Any) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """The ids of a large_string array (n,), back to back (uint32), and the number of ids of each text (n,) (int64).

        Raises Unfit.
        """
        with unfit("it failed"):
            layout = self._backend.encode_batch(borrowed(texts), parallel=False).layout
        ends = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[ends[0] : ends[-1]], np.diff(ends)

    def refuses(self, texts: Any) -> NDArray[np.bool_]:
        """Which texts of a large_string array (n,) only the tokenizer's own library may encode, (n,) bool.

        These are the texts with a string that gigatoken would take for one token, or with a character on which the two
        libraries are not known to agree.
        """
        found = np.zeros(len(texts), dtype=np.bool_)
        if self._matched:
            found |= pc.match_substring_regex(texts, self._matched).to_numpy(zero_copy_only=False)
        if self.characters:
            found |= self.characters.outside(texts)
        return found

    def differing(self, texts: Sequence[str]) -> list[int]:
        """The numbers of the texts for which the two libraries give different ids; texts that are refused are left
        out."""
        given = np.flatnonzero(~self.refuses(texts_of(texts))).tolist()
        taken = [texts[number] for number in given]
        return [given[number] for number in self.compare(taken, *self(texts_of(taken)))]

    def compare(self, texts: Sequence[str], ids: NDArray[np.uint32], sizes: NDArray[np.int64]) -> list[int]:
        """The numbers of the texts whose ids differ from those of the tokenizer's own library.

        sizes: the number of ids of each text.
        """
        ends = np.cumsum(sizes).tolist()
        found, expected = ids.tolist(), self.tokenizer.encode_plain(list(texts))
        places = zip([0, *ends], ends, expected, strict=False)
        return [number for number, (start, end, wanted) in enumerate(places) if found[start:end] != wanted]

    def check(self, texts: Sequence[str], ids: NDArray[np.uint32], sizes: NDArray[np.int64]) -> None:
        """Raise Differs if `compare` finds a difference."""
        if numbers := self.compare(texts, ids, sizes):
            raise Differs(self.tokenizer.reference, texts[numbers[0]], len(numbers))


@contextmanager
def unfit(what: str) -> Iterator[None]:
    """Turn any error of gigatoken into Unfit. A panic in Rust is a BaseException and not an Exception."""
    try:
        yield
    except (Unfit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        said = str(error).strip() or repr(error)
        raise Unfit(f"{what}: {said.splitlines()[0]}") from error


def load(tokenizer: Tokenizer) -> Any:
    """Make gigatoken's tokenizer with the same vocabulary. Raises Unfit."""
    import gigatoken

    if isinstance(tokenizer, SentencePieceTokenizer):
        check_rules(tokenizer)
        return gigatoken.Tokenizer.from_sentencepiece(tokenizer.model.SerializeToString())
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    if strange := tokenizer.other_normalisers("NFC"):
        raise Unfit(f"its normaliser {strange[0]} is not one that was compared")
    if tokenizer.other_normalisers() and any(token["normalized"] for token in tokenizer.added):
        raise Unfit("its added tokens are looked for in normalised text")
    around = {"post_processor": None, "truncation": None, "padding": None}
    return gigatoken.Tokenizer.from_json(json.dumps({**tokenizer.settings, **around}))


def check_rules(tokenizer: SentencePieceTokenizer) -> None:
    """Raise Unfit if the model has rules that a list of merges cannot express."""
    if tokenizer.model.normalizer_spec.precompiled_charsmap:
        raise Unfit("the model normalises text by a table of sequences")
    if tokenizer.pieces("UNUSED"):
        raise Unfit("the model has unused pieces")
    scores = [piece.score for piece in tokenizer.pieces("NORMAL") if len(piece.piece) > 1]
    if len(set(scores)) < len(scores):
        raise Unfit("pieces of the model share a score, so that their order of merging is the text's")


def texts_of(texts: Sequence[str]) -> Any:
    """Convert strings to a large_string array."""
    return pa.array(texts, pa.large_string())


def borrowed(texts: Any) -> Any:
    """View a large_string array as an awkward array over the same memory."""
    import awkward

    data = texts.buffers()[2]
    characters = awkward.contents.NumpyArray(
        np.frombuffer(data, dtype=np.uint8) if data else np.empty(0, dtype=np.uint8), parameters={"__array__": "char"}
    )
    index = awkward.index.Index64(offsets(texts))
    return awkward.Array(awkward.contents.ListOffsetArray(index, characters, parameters={"__array__": "string"}))
