"""Sparse files: a state dict on disk, lossless, about as small as its zeros and its survivors allow.

A file is one safetensors container of two byte strings, `data` and `index`. A tensor is cut into pieces of
2**20 elements; a piece is the positions of its non-zero elements and, byte by byte of their words, their
values, each compressed with zstd where that helps. The index says where the pieces are.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from lightning_prune.deploy import pieces
from lightning_prune.deploy.pieces import Piece, UnreadableFile, grown, is_count, is_list, need
from lightning_prune.files import replacing
from lightning_prune.shards import Shards, is_sharded, whole

_FORMAT, _VERSION = "lightning_prune.sparse", "1"
_FLOATS = ("float64", "float32", "float16", "bfloat16", "complex128", "complex64")
_WHOLE = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
_FLOAT8 = tuple(name for name in vars(torch) if name.startswith("float8"))
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _FLOATS + _FLOAT8 + _WHOLE}


class _Entry(NamedTuple):
    """What the index says of a tensor."""

    dtype: torch.dtype
    shape: list[int]
    n_words: int
    width: int  # bytes of a word
    pieces: list[Piece]


def save_sparse(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict losslessly, its zeros nearly for free: about the entropy of positions and exponents.

    Every element comes back bit for bit: -0.0, NaN and infinities too. Tensors that share their memory are
    stored once. Each piece of a tensor has the smallest of three forms: a bit an element, a byte a gap
    between survivors, or dense. Extra memory is a few MB, and a copy of a tensor that is not contiguous or
    not on the CPU. The file appears at once and whole, see
    `lightning_prune.files`. Of sharded tensors all processes must call it, and the first one writes; there
    tied ones are stored each.

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
        ValueError: when something in it is no such tensor, and on the other processes when one that has
            parts of the same tensors fails. Nothing is written then.
        OSError: when the path cannot be written.
        ModuleNotFoundError: without the extra `storage` (safetensors and zstandard).
    """
    if any(map(is_sharded, state_dict.values())):
        _save_together(state_dict, path)
        return
    tensors = _checked(state_dict)
    libraries()
    with replacing(path) as file:
        write(tensors, file)


def _save_together(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Write sharded tensors: each process gives its parts, the first one writes, and all hear what fails."""
    failed: Exception | None = None
    try:
        _checked(state_dict)
        libraries()
    except Exception as error:
        failed = error
    together = Shards({name: t for name, t in state_dict.items() if isinstance(t, Tensor)}, failed)
    left = {id(tensor): tensor for tensor in state_dict.values() if is_sharded(tensor)}

    def gathered(tensor: Tensor) -> Tensor:
        left.pop(id(tensor), None)
        return whole(tensor)

    try:
        if not torch.distributed.get_rank():
            with replacing(path) as file:
                write(state_dict, file, gathered)
    except Exception as error:
        failed = error
    for tensor in left.values():  # of the other processes all; of the first what it could not write
        whole(tensor)
    together.agree(failed)


def load_sparse(path: str | Path, max_bytes: int | None = None) -> dict[str, Tensor]:
    """The state dict that `save_sparse` wrote, bit for bit, on the CPU; what was tied is tied again.

    Tensors are contiguous and in the order in which they were given. See `save_sparse` for an example. What a
    file says of itself is checked before memory is taken for it, so one that was made to do harm can do no
    more than ask for many zeros, which take next to no room in a file: give `max_bytes` where that matters.

    Args:
        path: a file that `save_sparse` wrote.
        max_bytes: refuse a file whose tensors take more than this. None: any size.

    Raises:
        UnreadableFile: a ValueError, when it is no such file, of another version, truncated, damaged, or its
            tensors take more than `max_bytes`.
        FileNotFoundError: when there is no file.
        ModuleNotFoundError: without the extra `storage` (safetensors and zstandard).
    """
    safetensors, zstd = libraries()
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"load_sparse: there is no file {str(path)!r}. Allowed is one that save_sparse wrote; name it."
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return _read(file, zstd, max_bytes)
    except (safetensors.SafetensorError, zstd.ZstdError, UnreadableFile) as error:
        raise UnreadableFile(
            f"load_sparse: {str(path)!r} cannot be read: {error}. "
            "Allowed are whole files that save_sparse wrote. Save it again."
        ) from error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `save_sparse`, or of any other safetensors file, such as of `save_pretrained`.

    Raises:
        UnreadableFile: a ValueError, when it is neither, or is damaged.
        ModuleNotFoundError: without the extra `storage` (safetensors and zstandard).
    """
    safetensors, _ = libraries()
    with suppress(safetensors.SafetensorError), safetensors.safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("format") != _FORMAT:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return load_sparse(path)


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


def _checked(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = dict(state_dict)
    for name, tensor in tensors.items():
        _check(name, tensor)
    return tensors


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


def memory(tensor: Tensor) -> object:
    """The memory that a tensor shows, and how: tensors of which this is equal are stored once."""
    lazy = tensor.is_conj(), tensor.is_neg()  # what is done to the elements only as they are read
    if is_sharded(tensor):  # the whole is nowhere, and empty parts may be at one address
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), lazy


def plain(tensor: Tensor) -> Tensor:
    """The same elements, contiguous and on the CPU."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def write(
    state_dict: Mapping[str, Tensor], file: BinaryIO, gather: Callable[[Tensor], Tensor] = whole
) -> None:
    """Write what `save_sparse` writes to an open file that is empty.

    Args:
        state_dict: tensors by name.
        file: that is written.
        gather: makes a tensor whole.

    Raises:
        ValueError: as `save_sparse`.
        ModuleNotFoundError: as `save_sparse`.
    """
    tensors, (_, zstd) = _checked(state_dict), libraries()
    # The header comes first and is known last: room is left for it, so that nothing is kept or copied.
    most = 10**6 + 2 * sum(tensor.nbytes for tensor in tensors.values())
    start = file.write(_header(most, most, 1 << 32))
    compressor = zstd.ZstdCompressor(level=1)
    index: dict[str, Any] = {}
    first: dict[object, str] = {}  # what memory a tensor shows -> the first name of it
    for name, tensor in tensors.items():
        if tensor.numel() and (earlier := first.setdefault(memory(tensor), name)) != name:
            index[name] = earlier
            continue
        rows: list[Piece] = []
        for words in pieces.cut(pieces.words_of(plain(gather(tensor)))):
            piece, streams = pieces.encode(words, pieces.turns_of(tensor.dtype), compressor.compress)
            file.writelines(streams)
            rows.append(piece)
        index[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), rows]
    data = file.tell() - start
    packed = compressor.compress(json.dumps(index, separators=(",", ":")).encode())
    file.write(packed)
    file.seek(0)
    file.write(_header(data, len(packed), crc32(packed), start))


def _read(file: Any, zstd: Any, max_bytes: int | None) -> dict[str, Tensor]:
    metadata = file.metadata() or {}
    for key, needed in (("format", _FORMAT), ("version", _VERSION)):
        given = metadata.get(key)
        need(given == needed, f"its {key} is {given!r}, and {needed!r} is needed")
    slices = {name: file.get_slice(name) for name in ("data", "index")}
    for container in slices.values():
        need(
            container.get_dtype() == "U8" and len(container.get_shape()) == 1,
            "its container is of another kind",
        )
    packed: bytes = file.get_tensor("index").tobytes()
    need(str(crc32(packed)) == metadata.get("crc"), "its index is damaged")
    index, there = _index(packed, zstd), slices["data"].get_shape()[0]
    entries = [entry for entry in index.values() if isinstance(entry, _Entry)]
    stored = sum(sum(piece.stored) for entry in entries for piece in entry.pieces)
    need(stored == there, f"its index speaks of {stored} bytes, and there are {there}")
    takes = sum(entry.n_words * entry.width for entry in entries)
    need(max_bytes is None or takes <= max_bytes, f"its tensors take {takes} bytes, above {max_bytes=}")
    place = 0
    result: dict[str, Tensor] = {}
    for name, entry in index.items():
        if isinstance(entry, str):
            result[name] = result[entry]
            continue
        try:
            result[name] = tensor = torch.empty(entry.shape, dtype=entry.dtype)
        except RuntimeError as error:
            raise UnreadableFile(f"there is no room for {name!r}, {entry.shape} of {entry.dtype}") from error
        for words, piece in zip(pieces.cut(pieces.words_of(tensor)), entry.pieces, strict=True):
            start, place = place, place + sum(piece.stored)
            # an empty range cannot be sliced
            content: bytes = slices["data"][start:place].tobytes() if start < place else b""
            need(crc32(content) == piece.crc, f"{name!r} is damaged")
            pieces.decode(piece, content, words, zstd)
    return result


def _index(packed: bytes, zstd: Any) -> dict[str, _Entry | str]:
    """What an index says, if it can be true; nothing larger than what it speaks of was made for that."""
    most = (1 << 20) + 64 * len(
        packed
    )  # rows of a whole file are shorter: no two pieces have the same checksum
    size = zstd.frame_content_size(packed)
    need(0 < size <= most, f"its index would take {size} bytes")
    try:
        index = json.loads(grown(packed, size, zstd))
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"its index is no JSON ({error})") from error
    need(isinstance(index, dict), "its index is no table")
    result: dict[str, _Entry | str] = {}
    for name, entry in index.items():
        if isinstance(entry, str):
            need(isinstance(result.get(entry), _Entry), f"{name!r} is tied to {entry!r}, which is not there")
            result[name] = entry
        else:
            result[name] = _entry(name, entry)
    return result


def _entry(name: str, row: Any) -> _Entry:
    need(is_list(row, 3) and isinstance(row[0], str) and row[0] in _DTYPES, f"{name!r} has no known dtype")
    dtype, shape, rows = _DTYPES[row[0]], row[1], row[2]
    need(is_list(shape) and all(is_count(side, 1 << 60) for side in shape), f"{name!r} has no shape")
    need(math.prod(side or 1 for side in shape) < 1 << 60, f"{name!r} has an impossible shape")
    n_words = math.prod(shape) * (2 if dtype.is_complex else 1)
    width = dtype.itemsize // (2 if dtype.is_complex else 1)
    need(is_list(rows, -(-n_words // pieces.PIECE)), f"{name!r} has more or fewer pieces than its shape")
    for start, row in enumerate(rows):
        n = min(pieces.PIECE, n_words - start * pieces.PIECE)
        fits = is_list(row, 6) and pieces.fits(Piece(*row), n, width)
        need(fits, f"{name!r} has an impossible piece")
    return _Entry(dtype, shape, n_words, width, [Piece(*row) for row in rows])
