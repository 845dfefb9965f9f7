"""Size and writing time of sparse files: against the entropy limit, gzip -6 and xz -6 of the same tensors.

`python -m experiments.benchmarks.size [--full]`. Weights are normal, layer by layer with the usual initial
spread, pruned to one global threshold. All ratios are from one run; times are those of alternated runs, of
gzip over ours, both until the file is on the disk. ResNeXt-50, and xz of larger networks, are slow: --full.
"""

import argparse
import gzip
import io
import lzma
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lightning_prune as lp
from experiments.benchmarks.headlines import headline
from lightning_prune.deploy.sizes import size
from lightning_prune.deploy.timing import Ratio, alternated, machine, ratio, timed
from lightning_prune.files import replacing

SPARSITIES = (0.0, 0.4, 0.8, 0.9, 0.98)


def limit(state_dict: Mapping[str, Tensor]) -> float:
    """Bytes at the limit: positions and exponents of float32 at their entropy, mantissas as they are.

    Per tensor n * H(density) + survivors * (23 + order-0 entropy of sign and exponent) bits.

    >>> limit({"w": torch.tensor([1.0, 0.0, -1.0, 0.0])}) * 8  # 4 * 1 + 2 * (23 + 1)
    52.0
    """
    bits = 0.0
    for tensor in state_dict.values():
        if tensor.dtype != torch.float32:
            bits += 8 * tensor.nbytes
            continue
        words = tensor.contiguous().view(torch.int32)
        survivors = words[words != 0]
        alive = torch.tensor([len(survivors), words.numel() - len(survivors)])
        bits += words.numel() * entropy(alive)
        bits += len(survivors) * (23 + entropy(((survivors >> 23) & 511).bincount()))
    return bits / 8


def entropy(counts: Tensor) -> float:
    """Bits a symbol.

    >>> entropy(torch.tensor([1, 1, 2]))
    1.5
    """
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log2()).sum())


def lenet() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.Linear(2048, 1024))


def resnext() -> nn.Module:
    from torchvision.models import resnext50_32x4d  # of the extra `vision`

    return resnext50_32x4d()


NETWORKS = {"LeNet-300-100": lenet, "1024-2048-2048-1024": wide, "ResNeXt-50 32x4d": resnext}


def raw(state_dict: Mapping[str, Tensor]) -> bytes:
    """What torch writes."""
    buffer = io.BytesIO()
    torch.save(dict(state_dict), buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class Figures:
    """Of a sparse file."""

    limit: float  # bytes over the entropy limit
    gzip: float  # bytes over gzip -6
    write: Ratio  # times as fast as gzip -6

    def tell(self, what: str) -> None:
        """The headlines."""
        headline(f"bytes over the entropy limit, {what}", self.limit, at_most=1.03)
        headline(f"bytes over gzip -6, {what}", self.gzip, at_most=0.88)
        headline(f"written as many times as fast as gzip -6, {what}", self.write, at_least=8)


def measure(
    build: Callable[[], nn.Module], sparsity: float, folder: Path, repeats: int, xz: bool
) -> tuple[str, Figures]:
    """One line of the table, and its figures."""
    torch.manual_seed(0)
    model = build()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.kaiming_normal_(p)
    lp.prune(model, sparsity)
    state_dict = {name: p.detach() for name, p in model.state_dict().items()}
    sparse, zipped, plain, sizes = folder / "sparse", folder / "gzip", raw(state_dict), size(state_dict)

    def write_sparse() -> None:
        sparse.unlink(missing_ok=True)  # to replace a file costs more than to write a small one
        lp.save_sparse(state_dict, sparse)

    def write_gzip() -> None:
        zipped.unlink(missing_ok=True)
        with replacing(zipped) as file, gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6) as target:
            target.write(plain)

    def read_gzip() -> None:
        with gzip.open(zipped, "rb") as source:
            torch.load(io.BytesIO(source.read()), weights_only=True)

    ways = {
        "ours": write_sparse,
        "gzip": write_gzip,
        "load": lambda: lp.load_sparse(sparse),
        "unzip": read_gzip,
    }
    times = alternated({name: timed(way) for name, way in ways.items()}, repeats)
    write, read = ratio(times["gzip"], times["ours"]), ratio(times["unzip"], times["load"])
    loaded = lp.load_sparse(sparse)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state_dict.items())
    assert sparse.stat().st_size == sizes.sparse
    against_xz = f"{sizes.sparse / len(lzma.compress(plain, preset=6)):7.3f}" if xz else "      -"
    found = Figures(sizes.sparse / limit(state_dict), sizes.sparse / sizes.gzip, write)
    return (
        f"{sparsity:8.0%} {sizes.raw / 1e6:9.3f} {sizes.gzip / 1e6:9.3f} {sizes.sparse / 1e6:9.3f} "
        f"{found.limit:9.3f} {found.gzip:8.3f} {against_xz} {write!s:>12} {read!s:>11}"
    ), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="ResNeXt-50 too, and xz of all")
    full: bool = parser.parse_args().full
    print(machine())
    print(
        f"{'sparsity':>8} {'raw MB':>9} {'gzip MB':>9} {'sparse MB':>9} {'/ limit':>9} {'/ gzip':>8}", end=" "
    )
    print(f"{'/ xz':>7} {'write time':>12} {'read time':>11}")
    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in NETWORKS.items():
            if model is resnext and not full:
                continue
            print(name)
            for sparsity in SPARSITIES:
                repeats = 5 if model is lenet else 3
                line, figures = measure(model, sparsity, Path(folder), repeats, full or model is lenet)
                print(line, flush=True)
                if sparsity == 0.9:
                    found[f"{name} at {sparsity:.0%}"] = figures
    for what, figures in found.items():
        figures.tell(what)


if __name__ == "__main__":
    main()
