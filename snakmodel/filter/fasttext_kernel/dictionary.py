"""The words of a text as fastText cuts and hashes them, and the entries of the dictionary."""
# mypy: allow-untyped-decorators, no-warn-return-any
# NumPy's scalars are Any to mypy once they are computed with.

from __future__ import annotations

import numpy as np

from snakmodel.dedup.minhash.compile_cache import Bytes, Numbers, Words
from snakmodel.filter.fasttext_kernel.cache import compiled, inner
from snakmodel.filter.fasttext_kernel.tables import Rows, Tables

BASIS = np.uint32(2166136261)
"""The hash of no bytes."""
_PRIME = np.uint32(16777619)


@inner
def hashed(state: np.uint32, byte: np.uint8) -> np.uint32:
    """FNV-1a, in which bytes are signed, as in fastText."""
    return np.uint32((state ^ np.uint32(np.int32(np.int8(byte)))) * _PRIME)


@inner
def is_space(byte: np.uint8) -> bool:
    return bool(byte == 32 or byte == 0 or 9 <= byte <= 13)


@inner
def is_label(data: Bytes, start: int, stop: int) -> bool:
    """Whether a word begins with `__label__`; fastText takes such words for labels, and skips them."""
    if stop - start < 9:
        return False
    expected = (95, 95, 108, 97, 98, 101, 108, 95, 95)
    same = True
    for place in range(9):
        same &= data[start + place] == expected[place]
    return same


@inner
def entry_of(data: Bytes, start: int, stop: int, state: np.uint32, tables: Tables) -> int:
    """The entry of the dictionary that is this word, or -1."""
    mask = len(tables.slots) - 1
    slot = np.int64(state) & mask
    while tables.slots[slot] >= 0:
        entry = tables.slots[slot]
        begin = tables.starts[entry]
        if tables.hashes[entry] == state and tables.starts[entry + 1] - begin == stop - start:
            place = 0
            while place < stop - start and tables.blob[begin + place] == data[start + place]:
                place += 1
            if place == stop - start:
                return np.int64(entry)
        slot = (slot + 1) & mask
    return -1


@compiled
def fill_slots(hashes: Words, slots: Rows, blob: Bytes, starts: Numbers) -> None:
    """Compute the hash of each entry, and enter all into the hash table, which holds only -1 before."""
    for entry in range(len(hashes)):
        state = BASIS
        for at in range(starts[entry], starts[entry + 1]):
            state = hashed(state, blob[at])
        hashes[entry] = state
        slot = np.int64(state) & (len(slots) - 1)
        while slots[slot] >= 0:
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = entry
