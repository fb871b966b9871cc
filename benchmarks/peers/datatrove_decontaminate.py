"""PYTHON benchmarks/peers/datatrove_decontaminate.py GIVEN.json

datatrove's NGramsDecontFilter for benchmarks/decontaminate.py. GIVEN.json holds `items`, `texts` and `ngram`. The index
is made of the items with the filter's own words and hashes, since datatrove's indexer fetches its items from the
network. Each line of standard input is a request `[own, first, last]`: with datatrove's own words (spaCy's) or those
between white space, which texts to filter. The answer is the processor seconds, and which of the texts are removed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.utils.text import ngrams, simplify_text


class Split:
    """Words between white space."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return text.split()


def made(given: dict[str, object], own: bool, folder: str) -> NGramsDecontFilter:
    """The filter, with an index of the items."""
    config = NGramsDecontConfig(n_grams=int(str(given["ngram"])))
    one = NGramsDecontFilter(folder, config, language="dan_Latn" if own else "eng_Latn")
    if not own:
        one.tokenizer = Split()
    hashes: set[int] = set()
    for item in given["items"]:  # type: ignore[attr-defined]
        words = one.tokenizer.word_tokenize(simplify_text(item, config.norm_config))
        hashes.update(map(one.hash_func, map(" ".join, ngrams(words, config.n_grams))))
    np.array(sorted(hashes), config.hash_config.np_descr).tofile(Path(folder) / "items.index.hashes")
    one.load_index_hashes()
    return one


def main() -> None:
    """Answer requests."""
    given = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        filters = {True: made(given, True, first), False: made(given, False, second)}
        for line in sys.stdin:
            own, start, stop = json.loads(line)
            documents = [Document(text=text, id="") for text in given["texts"][start:stop]]
            started = time.process_time()
            removed = [filters[own].filter(document) is not True for document in documents]
            print(json.dumps([time.process_time() - started, removed]), flush=True)


if __name__ == "__main__":
    main()
