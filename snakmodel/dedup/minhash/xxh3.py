"""Computes XXH3-64 of n-grams with seed 0, by xxHash's specification."""
# mypy: allow-untyped-decorators, no-warn-return-any
# NumPy's scalars are Any to mypy once they are computed with.

from __future__ import annotations

import numpy as np

from snakmodel.dedup.minhash.compile_cache import Bytes, Longs, Numbers, Words, compiled, high_product, inner, long_at

_SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
        "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
        "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)
_P32_1, _P32_2, _P32_3 = np.uint64(0x9E3779B1), np.uint64(0x85EBCA77), np.uint64(0xC2B2AE3D)
_P64_1, _P64_2 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F)
_P64_3, _P64_4 = np.uint64(0x165667B19E3779F9), np.uint64(0x85EBCA77C2B2AE63)
_P64_5 = np.uint64(0x27D4EB2F165667C5)
_MIX_1, _MIX_2 = np.uint64(0x165667919E3779F9), np.uint64(0x9FB21C651E98DF25)
_LOW = np.uint64(0xFFFFFFFF)


@inner
def folded(left: np.uint64, right: np.uint64) -> np.uint64:
    """The two halves of the 128-bit product, combined by exclusive or."""
    return left * right ^ high_product(left, right)


@inner
def avalanche(value: np.uint64) -> np.uint64:
    value = (value ^ value >> np.uint64(37)) * _MIX_1
    return value ^ value >> np.uint64(32)


@inner
def avalanche_64(value: np.uint64) -> np.uint64:
    value = (value ^ value >> np.uint64(33)) * _P64_2
    value = (value ^ value >> np.uint64(29)) * _P64_3
    return value ^ value >> np.uint64(32)


@inner
def mixed_16(data: Bytes, at: int, secret: int) -> np.uint64:
    """Mix 16 bytes of the input with 16 bytes of the secret."""
    return folded(long_at(data, at) ^ long_at(_SECRET, secret), long_at(data, at + 8) ^ long_at(_SECRET, secret + 8))


@inner
def up_to_16(data: Bytes, at: int, size: int) -> np.uint64:
    if size > 8:
        low = long_at(data, at) ^ long_at(_SECRET, 24) ^ long_at(_SECRET, 32)
        high = long_at(data, at + size - 8) ^ long_at(_SECRET, 40) ^ long_at(_SECRET, 48)
        swapped = np.uint64(0)
        for place in range(8):
            swapped |= (low >> np.uint64(8 * place) & np.uint64(0xFF)) << np.uint64(56 - 8 * place)
        return avalanche(np.uint64(size) + swapped + high + folded(low, high))
    if size >= 4:
        value = (long_at(data, at + size - 4) & _LOW) + (long_at(data, at) << np.uint64(32))
        value ^= long_at(_SECRET, 8) ^ long_at(_SECRET, 16)
        value ^= (value << np.uint64(49) | value >> np.uint64(15)) ^ (value << np.uint64(24) | value >> np.uint64(40))
        value *= _MIX_2
        value = (value ^ (value >> np.uint64(35)) + np.uint64(size)) * _MIX_2
        return value ^ value >> np.uint64(28)
    if size > 0:
        first, middle, last = np.uint64(data[at]), np.uint64(data[at + size // 2]), np.uint64(data[at + size - 1])
        value = first << np.uint64(16) | middle << np.uint64(24) | last | np.uint64(size << 8)
        return avalanche_64(value ^ long_at(_SECRET, 0) & _LOW ^ long_at(_SECRET, 0) >> np.uint64(32))
    return avalanche_64(long_at(_SECRET, 56) ^ long_at(_SECRET, 64))


@inner
def up_to_240(data: Bytes, at: int, size: int) -> np.uint64:
    value = np.uint64(size) * _P64_1
    if size <= 128:
        for step in range((size - 1) // 32 + 1):
            value += mixed_16(data, at + 16 * step, 32 * step)
            value += mixed_16(data, at + size - 16 * (step + 1), 32 * step + 16)
        return avalanche(value)
    for step in range(8):
        value += mixed_16(data, at + 16 * step, 16 * step)
    value = avalanche(value)
    for step in range(8, size // 16):
        value += mixed_16(data, at + 16 * step, 16 * (step - 8) + 3)
    return avalanche(value + mixed_16(data, at + size - 16, 136 - 17))


@inner
def accumulate(sums: Longs, data: Bytes, at: int, secret: int) -> None:
    """Add one stripe of 64 bytes to the eight sums."""
    for lane in range(8):
        value = long_at(data, at + 8 * lane)
        keyed = value ^ long_at(_SECRET, secret + 8 * lane)
        sums[lane ^ 1] += value
        sums[lane] += (keyed & _LOW) * (keyed >> np.uint64(32))


@inner
def beyond_240(data: Bytes, at: int, size: int) -> np.uint64:
    sums = np.array([_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1])
    for stripe in range((size - 1) // 64):
        accumulate(sums, data, at + 64 * stripe, stripe % 16 * 8)
        if stripe % 16 == 15:
            for lane in range(8):
                value = sums[lane] ^ sums[lane] >> np.uint64(47) ^ long_at(_SECRET, 128 + 8 * lane)
                sums[lane] = value * _P32_1
    accumulate(sums, data, at + size - 64, 121)
    result = np.uint64(size) * _P64_1
    for pair in range(4):
        left, right = long_at(_SECRET, 11 + 16 * pair), long_at(_SECRET, 19 + 16 * pair)
        result += folded(sums[2 * pair] ^ left, sums[2 * pair + 1] ^ right)
    return avalanche(result)


@compiled
def xxh3_grams(text: Bytes, starts: Numbers, tokens: Numbers, ngram: int, min_length: int, hashes: Words) -> None:
    """Store in hashes[k] the lower 32 bits of the XXH3-64 of the n-gram that begins at token k.

    A document with fewer than `ngram` tokens is one n-gram; a document with fewer than `min_length` tokens has none.
    """
    for document in range(len(tokens) - 1):
        first, last = tokens[document], tokens[document + 1]
        if last - first < min_length:
            continue
        width = min(ngram, last - first)
        for token in range(first, last - width + 1):
            at = starts[token]
            size = starts[token + width] - 1 - at
            if size <= 16:
                value = up_to_16(text, at, size)
            elif size <= 240:
                value = up_to_240(text, at, size)
            else:
                value = beyond_240(text, at, size)
            hashes[token] = value & _LOW
