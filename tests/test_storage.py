import json
import random
import struct
import sys
import tracemalloc
from itertools import pairwise
from zlib import crc32

import numpy as np
import pytest
import torch
import zstandard
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

import lightning_prune as lp
from experiments.benchmarks.size import limit
from lightning_prune.deploy import pieces, storage
from tests.limited import in_a_process
from tests.naming import in_words
from tests.networks import Net, fitter, loader

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WHOLE = [
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
OTHERS = [torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2]


def raw(tensor):
    """The bytes of a tensor's elements in row-major order."""
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def assert_same(loaded, given):
    assert list(loaded) == list(given)
    for name, tensor in given.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert loaded[name].shape == tensor.shape, name
        assert raw(loaded[name]) == raw(tensor), name


def round_trip(given, path="x.safetensors"):
    lp.save_sparse(given, path)
    loaded = lp.load_sparse(path)
    assert_same(loaded, given)
    return loaded


def of_bits(dtype, shape, density, seed=0):
    """Random bits, so every NaN, denormal and infinity there is, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    n = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < density
    words = torch.randint(0, 256, (n, dtype.itemsize), dtype=torch.uint8, generator=generator)
    words[torch.rand(n, generator=generator) >= density] = 0
    return words.flatten().view(dtype).view(shape)


def pruned(sizes=(784, 300, 100, 10), sparsity=0.9):
    model = nn.Sequential(*[nn.Linear(i, o) for i, o in pairwise(sizes)])
    lp.prune(model, sparsity)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


# -------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("density", [0, 0.01, 0.1, 0.2, 0.6, 0.95, 1])
@pytest.mark.parametrize("dtype", FLOATS + WHOLE + OTHERS, ids=in_words)
def test_every_dtype_comes_back_bit_for_bit(dtype, density):
    round_trip({"x": of_bits(dtype, (37, 53), density)})


@pytest.mark.parametrize("dtype", FLOATS + WHOLE + OTHERS, ids=in_words)
def test_scalars_and_empty_tensors_come_back(dtype):
    one = of_bits(dtype, (), 1)
    shapes = {"zero": torch.zeros((), dtype=dtype), "one": one, "empty": torch.empty(0, dtype=dtype)}
    round_trip({**shapes, "none of three": torch.empty(3, 0, 2, dtype=dtype), "row": one.view(1, 1)})


def test_an_empty_state_dict_comes_back():
    assert round_trip({}) == {}


@pytest.mark.parametrize("dtype", FLOATS, ids=in_words)
def test_special_values_come_back(dtype):
    special = [
        0.0,
        -0.0,
        float("nan"),
        -float("nan"),
        float("inf"),
        -float("inf"),
        torch.finfo(dtype).tiny / 4,
    ]
    loaded = round_trip({"x": torch.tensor(special, dtype=dtype)})["x"]
    assert torch.signbit(loaded[:2]).tolist() == [False, True]


def test_values_of_non_contiguous_tensors_come_back_and_are_contiguous():
    x = of_bits(torch.float32, (8, 6, 4, 4), 0.5)
    views = {
        "transposed": x.transpose(0, 3),
        "strided": x[::2, :, 1:3],
        "expanded": x[:1].expand(5, -1, -1, -1),
        "flipped": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "negative": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        "channels last": x.to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(x),
    }
    lp.save_sparse(views, "x")
    loaded = lp.load_sparse("x")
    for name, view in views.items():
        assert loaded[name].is_contiguous()
        assert raw(loaded[name]) == raw(view.detach().resolve_conj().resolve_neg()), name


def test_tied_tensors_are_stored_once_and_tied_again():
    weight = of_bits(torch.float32, (200, 300), 0.5)
    lp.save_sparse({"embedding": weight}, "once")
    loaded = round_trip({"embedding": weight, "bias": torch.ones(3), "head": weight}, "twice")
    assert loaded["head"] is loaded["embedding"]
    lp.save_sparse({"embedding": weight, "head": weight}, "twice")
    with open("once", "rb") as once, open("twice", "rb") as twice:
        assert len(twice.read()) - len(once.read()) < 50


def test_a_conjugate_view_is_another_tensor():
    x = torch.tensor([1 + 2j, 3 - 4j])
    lp.save_sparse({"x": x, "conj": x.conj(), "imag": x.imag, "negative": x.conj().imag}, "x")
    loaded = lp.load_sparse("x")
    assert loaded["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert loaded["imag"].tolist() == [2, -4]
    assert loaded["negative"].tolist() == [-2, 4]


def test_views_of_one_memory_that_differ_are_not_tied():
    x = torch.arange(12.0)
    loaded = round_trip({"all": x, "first": x[:6], "half": x.view(3, 4), "turned": x.view(3, 4).t()})
    loaded["all"].zero_()
    assert torch.equal(loaded["half"], x.view(3, 4))


def test_tensors_longer_than_a_piece_come_back(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 1000)
    x = of_bits(torch.float32, (7, 911), 0.3)
    x[2:5] = 0  # pieces without a survivor
    x[6] = 1  # and without a zero
    given = {
        "x": x,
        "exact": of_bits(torch.bfloat16, (3000,), 0.1),
        "one more": of_bits(torch.int8, (3001,), 0.1),
    }
    round_trip(given)


def test_loaded_tensors_are_ones_own():
    loaded = round_trip({"x": torch.tensor([1.0, 0.0])})
    loaded["x"].add_(1)
    assert lp.load_sparse("x.safetensors")["x"].tolist() == [1, 0]


def test_a_pruned_model_loads_strictly():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    lp.prune(model, 0.8)
    lp.save_sparse(model.state_dict(), "x")
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    other.load_state_dict(lp.load_sparse("x"), strict=True)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("density", [0, 0.0005, 0.02, 0.3, 1])
def test_gaps_equal_the_obvious_loop(density):
    alive = torch.rand(20000) < density
    where, before, obvious = alive.nonzero().flatten().tolist(), -1, []
    for position in where:
        gap, before = position - before - 1, position
        while gap >= 255:
            obvious.append(255)
            gap -= 255
        obvious.append(gap)
    gaps = pieces.gaps_of(np.flatnonzero(alive.numpy()))
    assert gaps.tolist() == obvious
    assert pieces.positions_of(gaps).tolist() == where


# --------------------------------------------------------------------------------------------------- its size


@pytest.mark.parametrize("sparsity", [0.4, 0.8, 0.9, 0.98])
@pytest.mark.parametrize("sizes", [(784, 300, 100, 10), (1024, 1024)], ids=in_words)
def test_a_file_is_about_as_small_as_the_entropy_of_its_zeros_and_exponents(sparsity, sizes):
    given = pruned(sizes, sparsity)
    lp.save_sparse(given, "x")
    with open("x", "rb") as file:
        assert len(file.read()) <= 1.03 * limit(given)


@pytest.mark.parametrize("dtype", FLOATS + WHOLE + OTHERS, ids=in_words)
def test_what_cannot_be_compressed_grows_by_next_to_nothing(dtype):
    x = of_bits(dtype, (100_000,), 1)
    lp.save_sparse({"x": x}, "x")
    with open("x", "rb") as file:
        assert len(file.read()) < x.nbytes + 500


def test_writing_and_reading_need_little_memory_besides(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 1 << 14)
    x = of_bits(torch.float32, (2_000_000,), 0.3)
    lp.save_sparse({"x": x}, "x")
    assert peak(lambda: lp.save_sparse({"x": x}, "x")) < x.nbytes / 8
    assert peak(lambda: lp.load_sparse("x")) < x.nbytes / 8


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA and /proc")
@pytest.mark.parametrize("megabytes", [96, pytest.param(1024, marks=pytest.mark.slow)])
def test_a_file_larger_than_half_the_memory_is_written_and_read(megabytes):
    code = """
from zlib import crc32
n = int(sys.argv[1]) << 18
lp.save_sparse({"x": torch.ones(1 << 21)}, "x")
lp.load_sparse("x")  # what is loaded on first use
x = torch.randint(-2**31, 2**31 - 1, (n,), dtype=torch.int32)
before = crc32(x.numpy())
limit(x.nbytes / 2)
assert refused(lambda: x.clone())  # there is no room for a second one
lp.save_sparse({"x": x}, "x")
del x
x = lp.load_sparse("x")["x"]
assert crc32(x.numpy()) == before
import os
print(os.path.getsize("x") / (1.5 * x.nbytes))
"""
    assert float(in_a_process(code, megabytes)) > 0.5  # the file, over the memory there was


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a.extra_state": {"k": 1}}, "'a.extra_state' is a dict"),
        ({3: torch.ones(1)}, "the key 3"),
        ({"x": torch.eye(3).to_sparse()}, "'x' is a torch.sparse_coo tensor of torch.float32"),
        ({"x": torch.empty(3, device="meta")}, "on meta"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(given, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        lp.save_sparse(given, "x")
    assert "llowed are" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    lp.save_sparse({"x": torch.ones(3)}, "x")
    encode = pieces.encode

    def fail_late(words, turns, compress):
        if len(words) == 7:
            raise OSError("disk full")
        return encode(words, turns, compress)

    monkeypatch.setattr(pieces, "encode", fail_late)
    with pytest.raises(OSError, match="disk full"):
        lp.save_sparse({"y": torch.zeros(3), "z": torch.zeros(7)}, "x")
    assert lp.load_sparse("x")["x"].tolist() == [1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def assert_refused(content, message="cannot be read"):
    with open("damaged", "wb") as file:
        file.write(content)
    with pytest.raises(storage.UnreadableFile, match=message) as error:
        lp.load_sparse("damaged")
    assert "load_sparse: 'damaged' cannot be read" in str(error.value)


@pytest.fixture
def whole():
    """A file with every form, a tie, several dtypes and an empty tensor."""
    given = {
        "dense": of_bits(torch.float32, (40,), 1),
        "bits": of_bits(torch.bfloat16, (60, 10), 0.4),
        "gaps": torch.where(torch.rand(100, 50) < 0.03, torch.randn(100, 50), 0.0),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }
    lp.save_sparse({**given, "tied": given["gaps"]}, "whole")
    with open("whole", "rb") as file:
        return file.read()


def test_every_truncation_is_refused(whole):
    for length in range(0, len(whole), max(1, len(whole) // 400)):
        assert_refused(whole[:length])
    assert_refused(whole[:-1])
    assert_refused(whole + b"\0")


def test_every_flipped_bit_is_refused(whole):
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    places = {*range(start), *torch.randint(start, len(whole), (500,)).tolist()}  # the header in full
    for place in sorted(places):
        bit = 1 << int(torch.randint(8, ()))
        assert_refused(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])


def test_random_damage_is_refused(whole):
    for _ in range(300):
        start, other = torch.randint(len(whole) - 64, (2,)).tolist()
        length = int(torch.randint(1, 64, ()))
        end = start + length
        noise = bytes(torch.randint(256, (length,), dtype=torch.uint8).tolist())
        for damage in (noise, b"", bytes(length), whole[other : other + length], 2 * whole[start:end]):
            damaged = whole[:start] + damage + whole[end:]
            if damaged != whole:
                assert_refused(damaged)


# ------------------------------------------------------------------------- files that are made to do harm


def with_index(whole, change):
    """The file with another index, whose checksum is right."""
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    start, end = header["index"]["data_offsets"]
    body = whole[8 + length :]
    index = change(json.loads(zstandard.decompress(body[start:end])))
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    return in_container(body[:start], zstandard.compress(text))


def in_container(data, packed, name="data", changed=()):
    header = {
        "__metadata__": {"format": "lightning_prune.sparse", "version": "1", "crc": str(crc32(packed))},
        "data": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]},
        "index": {
            "dtype": "U8",
            "shape": [len(packed)],
            "data_offsets": [len(data), len(data) + len(packed)],
        },
    }
    header[name].update(changed)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data + packed


def edited(name, *path, to):
    """A change of an index: that of one value in the row of a tensor."""

    def change(index):
        row = index[name]
        for key in path[:-1]:
            row = row[key]
        row[path[-1]] = to
        return index

    return change


HUGE = 1 << 33
IMPOSSIBLE = {
    "more values than elements": edited("dense", 2, 0, 3, to=HUGE),
    "fewer values than elements": edited("dense", 2, 0, 3, to=39),
    "a value less than positions": edited("gaps", 2, 0, 3, to=1),
    "huge positions": edited("gaps", 2, 0, 4, to=HUGE),
    "positions of another size": edited("bits", 2, 0, 4, to=74),
    "huge stored sizes": edited("dense", 2, 0, 5, to=[0, HUGE, 0, 0, 0]),
    "negative stored sizes": edited("dense", 2, 0, 5, to=[0, -1, 41, 40, 40]),
    "too few stored sizes": edited("dense", 2, 0, 5, to=[0, 40]),
    "a stored size that is true": edited("count", 2, 0, 5, to=[0, True, *[0] * 7]),
    "a form that does not exist": edited("dense", 2, 0, 1, to="none"),
    "a form that is a list": edited("dense", 2, 0, 1, to=["all"]),
    "another form": edited("bits", 2, 0, 1, to="gaps"),
    "a rotation beyond the word": edited("dense", 2, 0, 2, to=33),
    "a fraction for a count": edited("dense", 2, 0, 3, to=40.0),
    "another checksum": edited("dense", 2, 0, 0, to=7),
    "a row that is too short": edited("dense", 2, 0, to=[1, "all"]),
    "a row that is no list": edited("dense", 2, 0, to={}),
    "no rows": edited("dense", 2, to=[]),
    "a row too many": lambda index: {**index, "empty": [*index["empty"][:2], index["dense"][2]]},
    "a huge shape": edited("dense", 1, to=[HUGE, HUGE]),
    "a huge shape of nothing": edited("empty", 1, to=[0, HUGE, HUGE]),
    "a shape of 8 GB": edited("dense", 1, to=[HUGE // 4]),
    "a negative shape": edited("dense", 1, to=[-40]),
    "a shape of text": edited("dense", 1, to=["40"]),
    "no shape": edited("dense", 1, to=None),
    "another dtype": edited("dense", 0, to="float64"),
    "a dtype that does not exist": edited("dense", 0, to="float31"),
    "a dtype that is a list": edited("dense", 0, to=["float32"]),
    "a tie to nothing": lambda index: {**index, "tied": "nothing"},
    "a tie to itself": lambda index: {**index, "tied": "tied"},
    "a tie to a later one": lambda index: {"early": "dense", **index},
    "a number for a row": lambda index: {**index, "dense": 3},
    "a missing tensor": lambda index: {k: v for k, v in index.items() if k != "dense"},
    "a list": lambda index: [index],
    "text": lambda index: b"no JSON",
    "nothing": lambda index: b"",
    "no text": lambda index: b"\xff\xfe",
    "deep nesting": lambda index: b"[" * 100_000,
    "a number of many digits": lambda index: b"[" + b"9" * 10_000 + b"]",
    "much of nothing": lambda index: b" " * 100_000_000,
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_an_index_that_cannot_be_true_is_refused_before_memory_is_taken(what, whole):
    content = with_index(whole, IMPOSSIBLE[what])

    def refused():
        assert_refused(content)

    assert peak(refused) < 5_000_000


def peak(work):
    """Bytes of memory that Python and NumPy take at most."""
    tracemalloc.start()
    work()
    (_, most), _ = tracemalloc.get_traced_memory(), tracemalloc.stop()
    return most


def test_a_whole_index_is_read(whole):
    lp_given = lp.load_sparse("whole")
    with open("rewritten", "wb") as file:
        file.write(with_index(whole, lambda index: index))
    assert_same(lp.load_sparse("rewritten"), lp_given)


def test_a_compressed_part_that_grows_beyond_what_the_index_says_is_refused():
    """33 kB that would become 8 GB: a bomb of zeros as the values of a tensor."""
    bomb = zstandard.compress(bytes(200_000_000))
    row = [crc32(bomb), "all", 0, 1 << 20, 0, [0, len(bomb)]]
    assert len(bomb) < 33_000
    packed = zstandard.compress(json.dumps({"x": ["uint8", [1 << 20], [row]]}).encode())
    assert peak(lambda: assert_refused(in_container(bomb, packed), "of another size")) < 5_000_000
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    row = [crc32(unsized), "all", 0, 1 << 20, 0, [0, len(unsized)]]
    packed = zstandard.compress(json.dumps({"x": ["uint8", [1 << 20], [row]]}).encode())
    assert_refused(in_container(unsized, packed), "of another size")


def test_positions_that_do_not_fit_their_values_are_refused():
    def made(form, positions, n, alive, raw):
        content = bytes(positions) + bytes(range(1, alive + 1))
        row = [crc32(content), form, 0, alive, raw, [len(positions), alive]]
        return in_container(content, zstandard.compress(json.dumps({"x": ["uint8", [n], [row]]}).encode()))

    with open("fine", "wb") as file:
        file.write(made("gaps", [1, 2], 9, 2, 2))
    assert lp.load_sparse("fine")["x"].tolist() == [0, 1, 0, 0, 2, 0, 0, 0, 0]
    for content in (
        made("gaps", [1, 9], 9, 2, 2),  # beyond the end
        made("gaps", [255, 255], 600, 2, 2),  # no survivor at all
        made("bits", [0b11000000, 0b01000000], 9, 3, 2),  # one in what pads the bits
        made("bits", [0b11000000, 0], 9, 1, 2),  # more positions than values
    ):
        assert_refused(content, "positions and values do not match")


def test_a_container_of_another_kind_is_refused(whole):
    for name, changed in (
        ("index", {"dtype": "F16", "shape": [2]}),
        ("data", {"dtype": "I8"}),
        ("data", {"shape": [2, 2]}),
        ("data", {"dtype": "BF16", "shape": [2]}),
    ):
        assert_refused(in_container(b"abcd", b"efgh", name, changed), "of another kind")


def test_a_file_of_zeros_is_bounded_by_what_the_caller_allows():
    lp.save_sparse({"x": torch.zeros(1 << 22), "tied": (y := torch.ones(10)), "again": y}, "x")
    with open("x", "rb") as file:
        assert len(file.read()) < 1000
    takes = 4 * (1 << 22) + 40
    assert lp.load_sparse("x", max_bytes=takes)["x"].shape == (1 << 22,)
    with pytest.raises(storage.UnreadableFile, match=rf"take {takes} bytes, above max_bytes={takes - 1}"):
        lp.load_sparse("x", max_bytes=takes - 1)


def crafted(index, draw):
    """An index in which something at random is something else at random."""
    wild = [
        0,
        1,
        -1,
        2,
        7,
        40,
        255,
        1 << 20,
        1 << 31,
        HUGE,
        1 << 64,
        0.5,
        True,
        None,
        "",
        "all",
        "gaps",
        [],
        {},
    ]

    def change(node):
        if isinstance(node, (list, dict)) and node and draw.random() < 0.9:
            key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            return (
                node | {key: change(node[key])}
                if isinstance(node, dict)
                else [change(value) if i == key else value for i, value in enumerate(node)]
            )
        kind = draw.random()
        if isinstance(node, list) and node and kind < 0.4:
            return draw.choice([node[:-1], [*node, node[-1]], node[::-1]])
        return node + draw.choice([-1, 1]) if type(node) is int and kind < 0.5 else draw.choice(wild)

    return change(index)


def damaged(content, draw):
    """The file with some of its bytes replaced, removed, doubled or moved."""
    start, other = draw.randrange(len(content)), draw.randrange(len(content))
    end = start + draw.choice([1, 1, 2, 8, 64])
    bytes_ = content[start:end]
    noise = bytes(draw.randrange(256) for _ in bytes_)
    new = draw.choice([noise, b"", bytes(len(bytes_)), 2 * bytes_, content[other : other + len(bytes_)]])
    return content[:start] + new + content[end:]


@pytest.mark.parametrize("n", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_damage_gives_wrong_tensors_other_errors_or_much_memory(n, whole, record_property):
    draw, given, refused = random.Random(n), lp.load_sparse("whole"), 0

    def read_many():
        nonlocal refused
        for number in range(n):
            if is_crafted := number % 2 == 0:
                content = with_index(whole, lambda index: crafted(index, draw))
            else:
                content = damaged(whole, draw)
            with open("damaged", "wb") as file:
                file.write(content)
            try:
                loaded = lp.load_sparse("damaged")
            except storage.UnreadableFile:
                refused += 1
                continue
            if is_crafted:  # what such a file says is what it is
                assert sum(tensor.nbytes for tensor in loaded.values()) < 1_000_000
            else:
                assert_same(loaded, given)

    most = peak(read_many)
    assert most < 5_000_000
    assert refused > 0.8 * n
    record_property(
        "counts",
        f"{n - n // 2:,} crafted files with valid checksums and {n // 2:,} damaged at random: {refused:,} "
        f"refused, {n - refused:,} read as what they say, 0 wrong tensors, 0 other errors, at most "
        f"{most / 1e6:.1f} MB",
    )


def test_foreign_files_are_refused(tmp_path):
    assert_refused(b"")
    assert_refused(b"not a tensor file, but longer than eight bytes" * 10)
    torch.save({"x": torch.ones(3)}, "damaged")
    with open("damaged", "rb") as file:
        assert_refused(file.read())
    for metadata in (None, {"format": "pt"}):
        save_file({"x": torch.ones(3)}, "foreign", metadata)
        with open("foreign", "rb") as file:
            assert_refused(file.read(), "its format is (None|'pt'), and 'lightning_prune.sparse' is needed")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        lp.load_sparse("nowhere")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        lp.load_sparse(tmp_path)


def test_other_versions_are_refused(whole):
    for version in (b"0", b"2", b"9"):
        other = whole.replace(b'"version":"1"', b'"version":"' + version + b'"', 1)
        assert_refused(other, f"its version is '{version.decode()}', and '1' is needed")


def test_a_container_without_data_or_index_is_refused():
    for names in ({"data"}, {"index"}, {"other"}):
        metadata = {"format": "lightning_prune.sparse", "version": "1", "crc": "0"}
        save_file({name: torch.ones(3) for name in names}, "foreign", metadata)
        with open("foreign", "rb") as file:
            assert_refused(file.read())


# ------------------------------------------------------------------------------------------ how it is written


def test_a_file_is_a_safetensors_container_as_documented(whole):
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    start, end = header["index"]["data_offsets"]
    packed = whole[8 + length :][start:end]
    assert int(header["__metadata__"]["crc"]) == crc32(packed)
    index = json.loads(zstandard.decompress(packed))
    assert list(index) == ["dense", "bits", "gaps", "count", "empty", "tied"]
    assert [index[name][2][0][1] for name in ("dense", "bits", "gaps")] == ["all", "bits", "gaps"]
    assert index["tied"] == "gaps"


def test_the_same_weights_make_the_same_file(whole):
    lp.save_sparse(lp.load_sparse("whole"), "again")
    with open("again", "rb") as file:
        assert file.read() == whole


@pytest.mark.filterwarnings("ignore")  # those of Lightning
def test_the_callback_writes_the_file_beside_the_checkpoint_when_a_fit_ends(tmp_path):
    options = {"schedule": lp.schedules.OneShot(0.8), "rounds": 1, "save_sparse": "net.safetensors"}
    net = Net()
    checkpoints = ModelCheckpoint(dirpath=tmp_path / "checkpoints")
    pruner = lp.IterativeMagnitudePruning(**options)
    fitter(pruner, checkpoints, epochs=2, enable_checkpointing=True).fit(net, loader())
    written = lp.load_sparse(tmp_path / "checkpoints" / "net.safetensors")
    assert_same(written, dict(net.state_dict()))
    assert pruner.sparsity == 0.8
    Net().load_state_dict(written, strict=True)

    fitter(lp.IterativeMagnitudePruning(**options), epochs=2, default_root_dir=tmp_path / "root").fit(
        Net(), loader()
    )
    assert lp.load_sparse(tmp_path / "root" / "net.safetensors")


def test_the_callback_refuses_a_file_that_it_could_not_write(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ModuleNotFoundError, match="zstandard is needed"):
        lp.IterativeMagnitudePruning(save_sparse="x")


@pytest.mark.parametrize("missing", ["safetensors", "zstandard"])
def test_without_the_extra_it_says_what_is_missing(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    for work in (lambda: lp.save_sparse({}, "x"), lambda: lp.load_sparse("x")):
        with pytest.raises(ModuleNotFoundError, match=f"{missing} is needed .* pip install .*{missing}"):
            work()
