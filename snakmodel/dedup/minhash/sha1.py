"""Computes SHA-1 of n-grams, eight at a time, with LLVM's vector instructions.

An n-gram is seldom longer than one block, so hashing n-grams one by one would leave a processor's vector units idle.
"""
# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from snakmodel.dedup.minhash.compile_cache import Bytes, Numbers, Words, compiled

LANES = 8
"""The number of digests computed at once: 8 words of 32 bits fill an AVX2 register, or two of SSE2 and NEON."""
_START = np.array([0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0], np.uint32)
_WORD, _BYTE = ir.IntType(32), ir.IntType(8)
_VECTOR = ir.VectorType(_WORD, LANES)


@intrinsic
def sha1_compress(context: Any, state: Any, text: Any, begins: Any, lefts: Any, lengths: Any) -> Any:
    """Apply the 80 rounds of FIPS 180-4 to LANES blocks at once.

    `state`, uint32 (5, LANES), is updated. The block of lane i is the 64 bytes at text[begins[i]]. The first lefts[i],
    int8, of them belong to the message; in place of the rest come the byte 0x80, if lefts[i] is 0 or more, and then
    zeros. `lengths`, uint32 (2, LANES), is added to the last two words of the block.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = zip(signature.args, arguments, strict=True)
        pointers = [context.make_array(kind)(context, builder, value).data for kind, value in arrays]
        function = builder.module.globals.get("sha1_compress")
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [pointer.type for pointer in pointers])
            function = ir.Function(builder.module, kind, "sha1_compress")
            function.linkage = "internal"
            function.attributes.add("noinline")  # each copy of so long a body takes a second to compile
            write_sha1(ir.IRBuilder(function.append_basic_block()), builder.module, *function.args)
        builder.call(function, pointers)
        return context.get_dummy_value()

    return types.void(state, text, begins, lefts, lengths), generate


def write_sha1(builder: Any, module: Any, state: Any, text: Any, begins: Any, lefts: Any, lengths: Any) -> None:
    """Write the body of `sha1_compress`. Its loops are unrolled, because in Python they would not be vectorised."""
    start = [builder.load(row(builder, state, index), align=4) for index in range(5)]
    words = message_words(builder, module, text, begins, lefts)
    for index in (0, 1):
        words[14 + index] = builder.or_(words[14 + index], builder.load(row(builder, lengths, index), align=4))
    a, b, c, d, e = start
    for turn in range(80):
        if turn >= 16:
            far = builder.xor(words[turn - 14], words[turn - 16])
            words.append(rotated(builder, builder.xor(builder.xor(words[turn - 3], words[turn - 8]), far), 1))
        if turn < 20:
            function, constant = builder.xor(d, builder.and_(b, builder.xor(c, d))), 0x5A827999
        elif 40 <= turn < 60:
            function, constant = builder.or_(builder.and_(b, c), builder.and_(d, builder.or_(b, c))), 0x8F1BBCDC
        else:
            function, constant = builder.xor(b, builder.xor(c, d)), 0x6ED9EBA1 if turn < 40 else 0xCA62C1D6
        added = builder.add(builder.add(e, builder.add(words[turn], splat(constant))), function)
        a, b, c, d, e = builder.add(rotated(builder, a, 5), added), a, rotated(builder, b, 30), c, d
    for index, (old, new) in enumerate(zip(start, (a, b, c, d, e), strict=True)):
        builder.store(builder.add(old, new), row(builder, state, index), align=4)
    builder.ret_void()


def message_words(builder: Any, module: Any, text: Any, begins: Any, lefts: Any) -> list[Any]:
    """The 16 big-endian words of the LANES blocks, one vector each."""
    block, positions = ir.VectorType(_BYTE, 64), ir.Constant(ir.VectorType(_BYTE, 64), list(range(64)))
    halves: tuple[list[Any], list[Any]] = ([], [])
    for lane in range(LANES):
        begin, left = (builder.load(builder.gep(base, [_WORD(lane)])) for base in (begins, lefts))
        content = builder.load(builder.bitcast(builder.gep(text, [begin]), block.as_pointer()), align=1)
        limit = builder.insert_element(ir.Constant(block, ir.Undefined), left, _WORD(0))
        limit = chosen(builder, limit, limit, [0] * 64)
        end = builder.icmp_signed("==", positions, limit)
        end = builder.select(end, ir.Constant(block, [0x80] * 64), ir.Constant(block, [0] * 64))
        content = builder.select(builder.icmp_signed("<", positions, limit), content, end)
        content = builder.bitcast(content, ir.VectorType(_WORD, 16))
        for half in (0, 1):
            halves[half].append(chosen(builder, content, content, list(range(8 * half, 8 * half + 8))))
    swap = ir.Function(module, ir.FunctionType(_VECTOR, [_VECTOR]), f"llvm.bswap.v{LANES}i32")
    return [builder.call(swap, [vector]) for half in halves for vector in transposed(builder, half)]


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of an 8 x 8 matrix that is given by rows; off-diagonal blocks of 1, 2 and 4 rows are swapped."""
    for step in (1, 2, 4):
        for low in (index for index in range(8) if not index & step):
            a, b = rows[low], rows[low + step]
            rows[low] = chosen(builder, a, b, [c + 8 - step if c & step else c for c in range(8)])
            rows[low + step] = chosen(builder, a, b, [c + 8 if c & step else c + step for c in range(8)])
    return rows


def chosen(builder: Any, left: Any, right: Any, columns: list[int]) -> Any:
    """The elements at these places of two vectors that are laid end to end."""
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(_WORD, len(columns)), columns))


def splat(value: int) -> Any:
    return ir.Constant(_VECTOR, [value] * LANES)


def rotated(builder: Any, value: Any, bits: int) -> Any:
    return builder.or_(builder.shl(value, splat(bits)), builder.lshr(value, splat(32 - bits)))


def row(builder: Any, array: Any, index: int) -> Any:
    """The address of a row of LANES words."""
    return builder.gep(builder.bitcast(array, _VECTOR.as_pointer()), [_WORD(index)])


@njit(inline="always")
def sha1_lanes(
    text: Bytes,
    begins: Numbers,
    sizes: Numbers,
    targets: Numbers,
    count: int,
    hashes: Words,
    state: Words,
    places: Numbers,
    lefts: NDArray[np.int8],
    lengths: Words,
) -> None:
    """Hash `count` messages, at most LANES: text[begins[i] : begins[i] + sizes[i]] -> hashes[targets[i]]."""
    most = 0
    for lane in range(LANES):
        for place in range(5):
            state[place, lane] = _START[place]
        most = max(most, sizes[lane])
    for index in range((most + 8) // 64 + 1):
        for lane in range(LANES):
            left = sizes[lane] - 64 * index
            places[lane] = begins[lane] + min(64 * index, sizes[lane])
            lefts[lane] = max(-1, min(left, 64))
            lengths[0, lane] = sizes[lane] >> 29 if left < 56 else 0
            lengths[1, lane] = sizes[lane] << 3 if left < 56 else 0
        sha1_compress(state, text, places, lefts, lengths)
        for lane in range(count):
            if index == (sizes[lane] + 8) // 64:
                word = state[0, lane]
                hashes[targets[lane]] = word >> 24 | word >> 8 & 0xFF00 | (word & 0xFF00) << 8 | word << 24


@compiled
def sha1_grams(text: Bytes, starts: Numbers, tokens: Numbers, ngram: int, min_length: int, hashes: Words) -> None:
    """Store in hashes[k] the first 4 bytes (little-endian) of the SHA-1 of the n-gram that begins at token k.

    A document with fewer than `ngram` tokens is one n-gram; a document with fewer than `min_length` tokens has none.
    """
    shape = (2, LANES)  # one queue for n-grams of one block, one for longer ones
    begins, sizes, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    count = np.zeros(2, np.int64)
    state, places = np.empty((5, LANES), np.uint32), np.empty(LANES, np.int64)
    lefts, lengths = np.empty(LANES, np.int8), np.empty(shape, np.uint32)
    for document in range(len(tokens) - 1):
        first, last = tokens[document], tokens[document + 1]
        if last - first < min_length:
            continue
        width = min(ngram, last - first)
        for token in range(first, last - width + 1):
            size = starts[token + width] - 1 - starts[token]
            queue = 1 if size > 55 else 0
            lane = count[queue]
            begins[queue, lane], sizes[queue, lane], targets[queue, lane] = starts[token], size, token
            count[queue] = lane + 1
            if lane + 1 == LANES:
                sha1_lanes(
                    text, begins[queue], sizes[queue], targets[queue], LANES, hashes, state, places, lefts, lengths
                )
                count[queue] = 0
    for queue in range(2):
        sha1_lanes(
            text, begins[queue], sizes[queue], targets[queue], count[queue], hashes, state, places, lefts, lengths
        )
