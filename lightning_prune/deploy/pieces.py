"""The pieces of a sparse file: positions of what is not zero, and values byte by byte, compressed."""

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]  # words: unsigned integers as wide as the elements; or bytes; or positions

PIECE = 1 << 20  # elements that are read, compressed and written at a time: what bounds the memory
_FEW = 1 << 14  # values: with fewer, both rotations are tried
_JUMP = 255  # a gap byte: go on by 255 elements, no survivor here


class UnreadableFile(ValueError):
    """What is no whole file of `save_sparse`."""


class Piece(NamedTuple):
    """A row of the index."""

    crc: int  # of the stored bytes
    form: str  # how positions are given: "all" (none needed), "bits" (a bit an element), "gaps" (bytes)
    turn: int  # by how many bits to the left the values' words are rotated
    alive: int  # values that are stored
    raw: int  # bytes of the positions before compression
    stored: list[int]  # bytes in the file: the positions, then each byte of the values' words


def need(condition: object, otherwise: str) -> None:
    """Stop reading, unless this is true.

    Raises:
        UnreadableFile: then, with what is wrong.
    """
    if not condition:
        raise UnreadableFile(otherwise)


def words_of(tensor: Tensor) -> Array:
    """The elements of a contiguous tensor (complex: their parts) as unsigned integers, in the same memory."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.reshape(-1).view(torch.uint8).numpy().view(f"u{real.itemsize}")


def cut(words: Array) -> list[Array]:
    """The words of a tensor in pieces, in the same memory."""
    return [words[start : start + PIECE] for start in range(0, len(words), PIECE)]


def encode(
    words: Array, turns: tuple[int, int], compress: Callable[[Any], bytes]
) -> tuple[Piece, list[bytes]]:
    """A piece in its smallest form: what the index says of it, and the bytes to store."""

    def shrink(raw: Array) -> bytes:
        packed = compress(raw)
        return packed if len(packed) < len(raw) else raw.tobytes()

    alive = words != 0
    where = np.flatnonzero(alive)
    positions = {"bits": np.packbits(alive)} if len(where) * 16 > len(words) else {}
    if len(where) * 4 < len(words):  # with more, a gap takes more bits than it spans
        positions["gaps"] = gaps_of(where)
    packed = {form: shrink(raw) for form, raw in positions.items()}
    form = min(packed, key=lambda form: len(packed[form]))
    ways = [(form, len(positions[form]), packed[form], words[where])]
    if len(where) * 8 > len(words) * 7:  # with less, zeros among the values cost more than positions
        ways.append(("all", 0, b"", words))
    results: list[tuple[Piece, list[bytes]]] = []
    for form, raw, packed_positions, values in ways:
        for turn in set(turns if len(values) < _FEW else turns[1:]):
            turned = _turned(values, turn)
            # Bytes of one kind compress better together: the lowest of every word, then the next.
            planes = [(turned >> 8 * place).astype(np.uint8) for place in range(words.itemsize)]
            streams = [packed_positions, *map(shrink, planes)]
            crc = crc32(b"".join(streams))
            results.append((Piece(crc, form, turn, len(values), raw, [*map(len, streams)]), streams))
    return min(results, key=lambda result: sum(result[0].stored))


def decode(piece: Piece, stored: bytes, words: Array, zstd: Any) -> None:
    """Write the stored bytes of a piece into its words.

    Raises:
        UnreadableFile: when they do not make these words.
    """

    def grow(packed: bytes, size: int) -> Array:
        return np.frombuffer(packed if len(packed) == size else grown(packed, size, zstd), np.uint8)

    streams = [stored[start:end] for start, end in pairwise([0, *accumulate(piece.stored)])]
    values = np.zeros(piece.alive, words.dtype)
    for place, stream in enumerate(streams[1:]):
        values |= grow(stream, piece.alive).astype(words.dtype) << 8 * place
    values = _turned(values, 8 * words.itemsize - piece.turn)
    where = slice(None)
    if piece.form != "all":
        positions = grow(streams[0], piece.raw)
        bits = piece.form == "bits"
        where = np.flatnonzero(np.unpackbits(positions)) if bits else positions_of(positions)
        need(len(where) == piece.alive and (where < len(words)).all(), "positions and values do not match")
        words[:] = 0
    words[where] = values


def _turned(words: Array, places: int) -> Array:
    """Each word rotated to the left."""
    width = 8 * words.itemsize
    return (words << places) | (words >> width - places) if 0 < places < width else words


def turns_of(dtype: torch.dtype) -> tuple[int, int]:
    """The rotations that make a float's highest byte worth compressing, for few values and for many.

    The first makes it the exponent alone; the sign joins the mantissa, as random as it is. The second makes
    it five bits of exponent and three of mantissa: random bits leave zstd no repetitions to find, which cost
    more than they save, and spread the likely exponents, of which it spends at least a bit on each.

    >>> turns_of(torch.float32), turns_of(torch.float16), turns_of(torch.int32)
    ((1, 4), (1, 1), (0, 0))
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0, 0
    info = torch.finfo(dtype)
    exponent = info.bits - 1 - round(-math.log2(info.eps))
    return 1, max(0, exponent - 4)


def gaps_of(where: Array) -> Array:
    """Increasing positions as the zeros before each, in bytes; 255 stands for 255 zeros and more to come.

    >>> gaps_of(np.array([0, 3, 300]))
    array([  0,   2, 255,  41], dtype=uint8)
    >>> positions_of(gaps_of(np.array([0, 3, 300])))
    array([  0,   3, 300])
    """
    gaps = np.diff(where, prepend=-1) - 1
    ends = np.cumsum(gaps // _JUMP + 1)
    result = np.full(ends[-1] if len(ends) else 0, _JUMP, np.uint8)
    result[ends - 1] = gaps % _JUMP
    return result


def positions_of(gaps: Array) -> Array:
    """What `gaps_of` made gaps of."""
    is_end = gaps != _JUMP
    return np.cumsum(gaps.astype(np.int64) + is_end)[is_end] - 1


def is_list(value: Any, length: int | None = None) -> bool:
    """Whether something out of JSON is a list, of this length."""
    return isinstance(value, list) and length in (None, len(value))


def is_count(value: Any, most: int) -> bool:
    """Whether something out of JSON is a whole number from 0 to this."""
    return type(value) is int and 0 <= value <= most


def fits(piece: Piece, n: int, width: int) -> bool:
    """Whether a piece of n words, of so many bytes each, can be like that."""
    most = {"all": 0, "bits": -(-n // 8), "gaps": n}.get(str(piece.form), -1)  # bytes of positions
    counts = ((piece.turn, 8 * width), (piece.alive, n), (piece.raw, most))
    if not all(is_count(value, highest) for value, highest in counts) or not is_list(piece.stored, 1 + width):
        return False
    if piece.form == "all":
        sizes_fit = piece.alive == n
    else:
        sizes_fit = piece.raw == most if piece.form == "bits" else piece.raw <= piece.alive + n // _JUMP
    raw = (piece.raw, *[piece.alive] * width)
    return sizes_fit and all(is_count(stored, size) for stored, size in zip(piece.stored, raw, strict=True))


def grown(packed: bytes, size: int, zstd: Any) -> bytes:
    """Decompressed bytes, of this size."""
    need(zstd.frame_content_size(packed) == size, "a part of it is of another size than its index says")
    return zstd.ZstdDecompressor().decompress(packed)
