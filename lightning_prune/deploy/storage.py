"""Sparse files: a state dict on disk, lossless, about as small as its zeros and its survivors allow.

A file is one safetensors container of two byte strings, `data` and `index`. A tensor is cut into pieces of
2**20 elements; a piece is the positions of its non-zero elements and, byte by byte of their words, their
values, each compressed with zstd where that helps. The index says where the pieces are.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.files import replacing

Array = NDArray[Any]  # words: unsigned integers as wide as the elements; or bytes; or positions

_FORMAT, _VERSION = "lightning_prune.sparse", "1"
_FEW = 1 << 14  # values: with fewer, both rotations are tried
_PIECE = 1 << 20  # elements that are read, compressed and written at a time: what bounds the memory
_JUMP = 255  # a gap byte: go on by 255 elements, no survivor here
_FLOATS = ("float64", "float32", "float16", "bfloat16", "complex128", "complex64")
_WHOLE = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
_FLOAT8 = tuple(name for name in vars(torch) if name.startswith("float8"))
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _FLOATS + _FLOAT8 + _WHOLE}


class _Piece(NamedTuple):
    """A row of the index."""

    crc: int  # of the stored bytes
    form: str  # how positions are given: "all" (none needed), "bits" (a bit an element), "gaps" (bytes)
    turn: int  # by how many bits to the left the values' words are rotated
    alive: int  # values that are stored
    raw: int  # bytes of the positions before compression
    stored: list[int]  # bytes in the file: the positions, then each byte of the values' words


def save_sparse(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict losslessly, its zeros nearly for free: about the entropy of positions and exponents.

    Every element comes back bit for bit: -0.0, NaN and infinities too. Tensors that share their memory are
    stored once. Each piece of a tensor has the smallest of three forms: a bit an element, a byte a gap
    between survivors, or dense. Extra memory is a few MB, and a copy of a tensor that is not contiguous or
    not on the CPU. The file appears at once and whole, see
    `lightning_prune.files`.

    >>> import tempfile
    >>> weight = torch.zeros(300, 784)
    >>> weight[:, ::50] = 1.5
    >>> path = Path(tempfile.mkdtemp(), "pruned.safetensors")
    >>> save_sparse({"weight": weight, "bias": torch.tensor([-0.0, 2.0])}, path)
    >>> weight.nbytes, path.stat().st_size < 1000
    (940800, True)
    >>> loaded = load_sparse(path)
    >>> torch.equal(loaded["weight"], weight), loaded["bias"]
    (True, tensor([-0., 2.]))

    Args:
        state_dict: tensors by name, of any shape, dense, of floating, complex, integer or bool dtype.
        path: the file to write; one that is there is replaced.

    Raises:
        ValueError: when something in it is no such tensor. Nothing is written then.
        ModuleNotFoundError: without the extra `storage` (safetensors and zstandard).
    """
    tensors = dict(state_dict)
    for name, tensor in tensors.items():
        _check(name, tensor)
    _, zstd = libraries()
    with replacing(path) as file:
        _write(tensors, file, zstd)


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """The state dict that `save_sparse` wrote, bit for bit, on the CPU; what was tied is tied again.

    Tensors are contiguous and in the order in which they were given. See `save_sparse` for an example.

    Args:
        path: a file that `save_sparse` wrote.

    Raises:
        ValueError: when it is no such file, of another version, truncated or damaged.
        ModuleNotFoundError: without the extra `storage` (safetensors and zstandard).
    """
    safetensors, zstd = libraries()
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"load_sparse: there is no file {str(path)!r}. Allowed is one that save_sparse wrote; name it."
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return _read(file, zstd)
    except (safetensors.SafetensorError, _Unreadable) as error:
        raise ValueError(
            f"load_sparse: {str(path)!r} cannot be read: {error}. "
            "Allowed are whole files that save_sparse wrote. Save it again."
        ) from error


class _Unreadable(Exception):
    pass


def libraries() -> tuple[Any, Any]:
    """Import safetensors and zstandard: here, so that only sparse files need them."""
    try:
        import safetensors
        import zstandard
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is needed for sparse files: pip install safetensors zstandard"
        ) from error
    return safetensors, zstandard


def _check(name: object, tensor: object) -> None:
    if not isinstance(name, str):
        raise ValueError(f"save_sparse: the key {name!r}: allowed are strings. Give a state_dict.")
    given = type(tensor).__name__
    if isinstance(tensor, Tensor):
        if tensor.dtype in _DTYPES.values() and tensor.layout == torch.strided and not tensor.is_meta:
            return
        given = f"{tensor.layout} tensor of {tensor.dtype} on {tensor.device}"
    allowed = ", ".join(_DTYPES)
    raise ValueError(
        f"save_sparse: {name!r} is a {given}: allowed are dense tensors with values, of {allowed}. "
        "Remove or convert it."
    )


# ---------------------------------------------------------------------------------------------- the container


def _header(data: int, index: int, crc: int, size: int = 0) -> bytes:
    """What a safetensors file begins with: at least `size` bytes."""
    header = {
        "__metadata__": {"format": _FORMAT, "version": _VERSION, "crc": str(crc)},
        "data": {"dtype": "U8", "shape": [data], "data_offsets": [0, data]},
        "index": {"dtype": "U8", "shape": [index], "data_offsets": [data, data + index]},
    }
    text = json.dumps(header, separators=(",", ":")).ljust(size - 8).encode()
    return struct.pack("<Q", len(text)) + text


def _write(tensors: dict[str, Tensor], file: BinaryIO, zstd: Any) -> None:
    # The header comes first and is known last: room is left for it, so that nothing is kept or copied.
    most = 10**6 + 2 * sum(tensor.nbytes for tensor in tensors.values())
    start = file.write(_header(most, most, 1 << 32))
    compressor = zstd.ZstdCompressor(level=1)
    index: dict[str, Any] = {}
    first: dict[object, str] = {}  # what memory a tensor shows -> the first name of it
    for name, tensor in tensors.items():
        shows = (tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(shows, name) != name:
            index[name] = first[shows]
            continue
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        pieces: list[_Piece] = []
        for words in _pieces(_words(plain)):
            piece, streams = _encode(words, _turns(tensor.dtype), compressor.compress)
            file.writelines(streams)
            pieces.append(piece)
        index[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), pieces]
    data = file.tell() - start
    packed = compressor.compress(json.dumps(index, separators=(",", ":")).encode())
    file.write(packed)
    file.seek(0)
    file.write(_header(data, len(packed), crc32(packed), start))


def _read(file: Any, zstd: Any) -> dict[str, Tensor]:
    metadata = file.metadata() or {}
    for key, needed in (("format", _FORMAT), ("version", _VERSION)):
        if metadata.get(key) != needed:
            raise _Unreadable(f"its {key} is {metadata.get(key)!r}, and {needed!r} is needed")
    packed: bytes = file.get_tensor("index").tobytes()
    if str(crc32(packed)) != metadata.get("crc"):
        raise _Unreadable("its index is damaged")
    index = json.loads(zstd.ZstdDecompressor().decompress(packed))
    data, place = file.get_slice("data"), 0
    result: dict[str, Tensor] = {}
    for name, entry in index.items():
        if isinstance(entry, str):
            result[name] = result[entry]
            continue
        dtype, shape, pieces = entry
        result[name] = tensor = torch.empty(shape, dtype=_DTYPES[dtype])
        for words, row in zip(_pieces(_words(tensor)), pieces, strict=True):
            piece = _Piece(*row)
            start, place = place, place + sum(piece.stored)
            stored: bytes = data[start:place].tobytes() if start < place else b""  # which cannot be sliced
            if crc32(stored) != piece.crc:
                raise _Unreadable(f"{name!r} is damaged")
            _decode(piece, stored, words, zstd)
    return result


# ------------------------------------------------------------------------------------------------- the pieces


def _words(tensor: Tensor) -> Array:
    """The elements of a contiguous tensor (complex: their parts) as unsigned integers, in the same memory."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.reshape(-1).view(torch.uint8).numpy().view(f"u{real.itemsize}")


def _pieces(words: Array) -> list[Array]:
    return [words[start : start + _PIECE] for start in range(0, len(words), _PIECE)]


def _encode(
    words: Array, turns: tuple[int, int], compress: Callable[[Any], bytes]
) -> tuple[_Piece, list[bytes]]:
    def shrink(raw: Array) -> bytes:
        packed = compress(raw)
        return packed if len(packed) < len(raw) else raw.tobytes()

    alive = words != 0
    where = np.flatnonzero(alive)
    positions = {"bits": np.packbits(alive)} if len(where) * 16 > len(words) else {}
    if len(where) * 4 < len(words):  # with more, a gap takes more bits than it spans
        positions["gaps"] = _gaps(where)
    packed = {form: shrink(raw) for form, raw in positions.items()}
    form = min(packed, key=lambda form: len(packed[form]))
    ways = [(form, len(positions[form]), packed[form], words[where])]
    if len(where) * 8 > len(words) * 7:  # with less, zeros among the values cost more than positions
        ways.append(("all", 0, b"", words))
    results: list[tuple[_Piece, list[bytes]]] = []
    for form, raw, packed_positions, values in ways:
        for turn in set(turns if len(values) < _FEW else turns[1:]):
            turned = _turned(values, turn)
            # Bytes of one kind compress better together: the lowest of every word, then the next.
            planes = [(turned >> 8 * place).astype(np.uint8) for place in range(words.itemsize)]
            streams = [packed_positions, *map(shrink, planes)]
            crc = crc32(b"".join(streams))
            results.append((_Piece(crc, form, turn, len(values), raw, [*map(len, streams)]), streams))
    return min(results, key=lambda result: sum(result[0].stored))


def _decode(piece: _Piece, stored: bytes, words: Array, zstd: Any) -> None:
    def grow(packed: bytes, size: int) -> Array:
        raw = packed if len(packed) == size else zstd.ZstdDecompressor().decompress(packed)
        return np.frombuffer(raw, np.uint8)

    streams = [stored[start:end] for start, end in pairwise([0, *accumulate(piece.stored)])]
    values = np.zeros(piece.alive, words.dtype)
    for place, stream in enumerate(streams[1:]):
        values |= grow(stream, piece.alive).astype(words.dtype) << 8 * place
    values = _turned(values, 8 * words.itemsize - piece.turn)
    where = slice(None)
    if piece.form != "all":
        positions = grow(streams[0], piece.raw)
        where = _from_gaps(positions) if piece.form == "gaps" else np.flatnonzero(np.unpackbits(positions))
        words[:] = 0
    words[where] = values


def _turned(words: Array, places: int) -> Array:
    """Each word rotated to the left."""
    width = 8 * words.itemsize
    return (words << places) | (words >> width - places) if 0 < places < width else words


def _turns(dtype: torch.dtype) -> tuple[int, int]:
    """The rotations that make a float's highest byte worth compressing, for few values and for many.

    The first makes it the exponent alone; the sign joins the mantissa, as random as it is. The second makes
    it five bits of exponent and three of mantissa: random bits leave zstd no repetitions to find, which cost
    more than they save, and spread the likely exponents, of which it spends at least a bit on each.

    >>> _turns(torch.float32), _turns(torch.float16), _turns(torch.int32)
    ((1, 4), (1, 1), (0, 0))
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0, 0
    info = torch.finfo(dtype)
    exponent = info.bits - 1 - round(-math.log2(info.eps))
    return 1, max(0, exponent - 4)


def _gaps(where: Array) -> Array:
    """Increasing positions as the zeros before each, in bytes; 255 stands for 255 zeros and more to come.

    >>> _gaps(np.array([0, 3, 300]))
    array([  0,   2, 255,  41], dtype=uint8)
    >>> _from_gaps(_gaps(np.array([0, 3, 300])))
    array([  0,   3, 300])
    """
    gaps = np.diff(where, prepend=-1) - 1
    ends = np.cumsum(gaps // _JUMP + 1)
    result = np.full(ends[-1] if len(ends) else 0, _JUMP, np.uint8)
    result[ends - 1] = gaps % _JUMP
    return result


def _from_gaps(gaps: Array) -> Array:
    is_end = gaps != _JUMP
    return np.cumsum(gaps.astype(np.int64) + is_end)[is_end] - 1
