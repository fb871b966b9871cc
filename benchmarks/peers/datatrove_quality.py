"""datatrove's quality filters for `benchmarks/filter.py`, which runs this with a Python that has datatrove and spaCy.

Reads {"texts", "thresholds", "symbols", "stops"} from the file that is named as the first argument, then a request per
line of standard input, and answers each with a line of JSON:
  {"time": [first, last], "own": bool}   the processor seconds of its filters on these documents
  {"rules": true, "own": bool}           what each filter says if it has one rule only
  {"clean": true}                        the lines that its C4 filter keeps
With "own", words and sentences are those of spaCy, and symbols those of datatrove; otherwise they are ours.
"""

import functools
import json
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    c4_filters,
    fineweb_quality_filter,
    gopher_quality_filter,
    gopher_repetition_filter,
)
from datatrove.utils.text import PUNCTUATION_SET, split_into_sentences, split_into_words

WORDS = (gopher_quality_filter, gopher_repetition_filter, fineweb_quality_filter)
LANGUAGE = "dan_Latn"
N_GRAMS = ("top_2_gram", "top_3_gram", "top_4_gram", *(f"repeated_{n}_grams" for n in range(5, 11)))


def sentences(stops: str, line: str) -> list[str]:
    """The sentences of a line, by the definition of `snakmodel.filter.quality.lines.sentences_in`."""
    made: list[list[str]] = [[]]
    for word in line.split():
        made[-1].append(word)
        if re.sub(r"[\"'\u00ab\u00bb\u2018-\u201f\u2039\u203a)\]}]+$", "", word)[-1:] in [*stops, "…"]:
            made.append([])
    return [" ".join(words) for words in made if words]


def use(own: bool, given: dict[str, Any]) -> None:
    """Set what a word, a sentence and a symbol is."""
    for module in WORDS:
        module.split_into_words = split_into_words if own else lambda text, language: text.split()
    cut = functools.partial(sentences, given["stops"])
    c4_filters.split_into_sentences = split_into_sentences if own else lambda text, language: cut(text)
    gopher_quality_filter.PUNCTUATION_SET = PUNCTUATION_SET if own else set(given["symbols"])


def gopher_quality(limits: dict[str, Any], words: list[str]) -> GopherQualityFilter:
    """The filter with these thresholds, and the others off."""
    names = {
        "min_doc_words": "min_words",
        "max_doc_words": "max_words",
        "min_avg_word_length": "min_mean_word_length",
        "max_avg_word_length": "max_mean_word_length",
        "max_symbol_word_ratio": "max_hashes",
        "max_bullet_lines_ratio": "max_bullet_lines",
        "max_ellipsis_lines_ratio": "max_ellipsis_lines",
        "max_non_alpha_words_ratio": "min_alphabetic_words",
        "min_stop_words": "min_stop_words",
    }
    chosen = {key: limits.get(f"gopher_{name}") for key, name in names.items()}
    return GopherQualityFilter(**chosen, stop_words=words, language=LANGUAGE)


def gopher_repetition(limits: dict[str, Any]) -> GopherRepetitionFilter:
    """The filter with these thresholds, and the others off."""
    grams = [(int(name.split("_")[1]), limits.get(f"gopher_max_{name}")) for name in N_GRAMS]
    return GopherRepetitionFilter(
        dup_line_frac=limits.get("gopher_max_repeated_lines"),
        dup_para_frac=limits.get("gopher_max_repeated_paragraphs"),
        dup_line_char_frac=limits.get("gopher_max_repeated_line_characters"),
        dup_para_char_frac=limits.get("gopher_max_repeated_paragraph_characters"),
        top_n_grams=[(n, limit) for n, limit in grams if n < 5 and limit is not None],
        dup_n_grams=[(n, limit) for n, limit in grams if n >= 5 and limit is not None],
        language=LANGUAGE,
    )


def c4(limits: dict[str, Any]) -> C4QualityFilter:
    """The filter with these thresholds, and the others off."""
    return C4QualityFilter(
        min_num_sentences=limits.get("c4_min_sentences", -1),
        filter_lorem_ipsum="c4_max_lorem_ipsum_lines" in limits,
        filter_curly_bracket="c4_max_curly_bracket_lines" in limits,
        language=LANGUAGE,
    )


def fineweb(limits: dict[str, Any], stops: str | None) -> FineWebQualityFilter:
    """The filter with these thresholds, and the others off."""
    return FineWebQualityFilter(
        line_punct_thr=limits.get("fineweb_min_stopped_lines", 0),
        short_line_thr=limits.get("fineweb_max_short_lines", 2),
        char_duplicates_ratio=limits.get("fineweb_max_repeated_line_characters", 2),
        new_line_ratio=limits.get("fineweb_max_newlines", 1e9),
        stop_chars=None if stops is None else tuple(stops),
        language=LANGUAGE,
    )


def all_filters(own: bool, given: dict[str, Any]) -> list[Any]:
    """The four filters with all thresholds."""
    limits = given["thresholds"]
    quality = gopher_quality(limits, limits["stop_words"])
    return [gopher_repetition(limits), quality, c4(limits), fineweb(limits, None if own else given["stops"])]


def seconds(texts: list[str], filters: list[Any]) -> dict[str, float]:
    """Processor seconds of the filters on all documents, and on those that the filters before have kept."""
    started = time.process_time()
    for text in texts:
        for one in filters:
            one.filter(Document(text=text, id=""))
    middle = time.process_time()
    for text in texts:
        document = Document(text=text, id="")
        all(one.filter(document) is True for one in filters)
    return {"all": middle - started, "in_turn": time.process_time() - middle}


def reason(one: Any, text: str) -> str | None:
    """Why a filter removes a document, None if it keeps it. A quotient of nothing is no reason, as for us."""
    try:
        result = one.filter(Document(text=text, id=""))
    except ZeroDivisionError:
        return None
    return None if result is True else str(result[1])


def by_rule(own: bool, given: dict[str, Any]) -> dict[str, list[str | None]]:
    """What a filter with only one threshold says of each document, by the name of our threshold."""
    limits, stops = given["thresholds"], None if own else given["stops"]
    words = limits["stop_words"]
    makers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "c4_": c4,
        "fineweb_": lambda chosen: fineweb(chosen, stops),
        "gopher_max_repeated": gopher_repetition,
        "gopher_max_top": gopher_repetition,
        "gopher_": lambda chosen: gopher_quality(chosen, words),
    }
    found = {}
    for name in limits:
        maker = next((maker for prefix, maker in makers.items() if name.startswith(prefix)), None)
        if maker is not None and "_line_" not in name.replace("repeated_line_", "") and name != "fineweb_short_line":
            one = maker({name: limits[name]})
            found[name] = [reason(one, text) for text in given["texts"]]
    return found


def cleaned(texts: list[str]) -> list[str]:
    """The lines that the C4 filter keeps."""
    documents = [Document(text=text, id="") for text in texts]
    one = c4({})
    return [document.text for document in documents if one.filter(document) is True]


def main() -> None:
    """Answer requests."""
    given = json.loads(Path(sys.argv[1]).read_text())
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        request = json.loads(line)
        own = request.get("own", False)
        use(own, given)
        if "time" in request:
            first, last = request["time"]
            answer: Any = seconds(given["texts"][first:last], all_filters(own, given))
        elif "rules" in request:
            answer = by_rule(own, given)
        else:
            answer = cleaned(given["texts"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
