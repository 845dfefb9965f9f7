"""Scale on paper: bytes and seconds of pruning, rewinding and checkpoints for 1B, 7B and 70B weights.

`python -m experiments.benchmarks.scale [--n N]` measures each part at N float32 weights, in layers of
4096 x 1024 that Adam trains, and at a quarter of them, which says whether it is linear. Bytes and seconds of
large networks are in proportion. One process, on the CPU; the disk is that of the temporary folder.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_prune as lp
from experiments.benchmarks.headlines import headline
from experiments.benchmarks.selection import peak
from lightning_prune.deploy.timing import alternated, low, machine, timed
from lightning_prune.masks import bits, pack
from lightning_prune.rewind import Snapshot

LAYER = (4096, 1024)
SPARSITY = 0.9
SIZES = {"1B": 1e9, "7B": 7e9, "70B": 70e9}
ROUNDS = 3


@dataclass(frozen=True)
class Part:
    """What a part takes for each weight of the network."""

    name: str
    where: str
    bytes: float
    seconds: float


def network(n: float) -> nn.Module:
    """A network of about `n` weights."""
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Linear(*reversed(LAYER), bias=False) for _ in range(max(1, round(n / LAYER[0] / LAYER[1])))
    )


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """An Adam that has stepped, so that it knows of each weight."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def measured(n: float, folder: Path) -> tuple[int, list[Part]]:
    """The number of weights that were measured, and what each part takes for one of them."""
    model = network(n)
    optimizer = trained(model)
    weights = sum(p.numel() for p in model.parameters())
    masks = lp.prune(model, SPARSITY)
    snapshot = Snapshot.take(model, [optimizer])
    kept = sum(t.nbytes for t in snapshot.tensors.values())
    states = [value for state in snapshot.optimizers for s in state["state"].values() for value in s.values()]
    kept += sum(value.nbytes for value in states)
    plain: dict[str, Any] = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    packed = pack(masks)

    def written(what: Any) -> Callable[[], None]:
        def write() -> None:
            with open(folder / "file", "wb") as file:
                torch.save(what, file)
                file.flush()
                os.fsync(file.fileno())

        return write

    def size(write: Callable[[], object]) -> int:
        write()
        return (folder / "file").stat().st_size

    params = {name: p.detach() for name, p in model.named_parameters()}
    in_memory: dict[str, tuple[Callable[[], object], float]] = {  # and the bytes that it takes
        "prune": (
            lambda: lp.prune(model, SPARSITY, masks=masks),
            weights * peak("ours", max(weights // 4, 1_000_000), "float32"),
        ),
        "take a snapshot": (lambda: Snapshot.take(model, [optimizer]), kept),
        "rewind to it": (lambda: snapshot.restore(model, [optimizer]), 0),
        "masks on": (  # while they hold there are as many bits as the weight has, too
            lambda: lp.apply_masks(model, masks),
            sum(mask.nbytes + bits(mask, like=params[name]).nbytes for name, mask in masks.items()),
        ),
        "pack masks": (
            lambda: pack(masks),
            sum(torch.as_tensor(one["bits"]).nbytes for one in packed.values()),
        ),
    }
    on_disk: dict[str, Callable[[], object]] = {
        "a checkpoint of weights and optimizer": written(plain),
        "the masks in it": written({"masks": packed}),
        "a snapshot in it": written(snapshot.tensors | {"optimizers": snapshot.optimizers}),
        "a sparse file": lambda: lp.save_sparse(model.state_dict(), folder / "file"),
    }
    works = {name: work for name, (work, _) in in_memory.items()} | on_disk
    runs = alternated({name: timed(work) for name, work in works.items()}, ROUNDS)
    takes = {name: n for name, (_, n) in in_memory.items()} | {n: size(work) for n, work in on_disk.items()}
    where = dict.fromkeys(in_memory, "memory") | dict.fromkeys(on_disk, "disk")
    each = {name: (takes[name] / weights, low(runs[name]) / weights) for name in works}
    return weights, [Part(name, where[name], *each[name]) for name in works]


def table(parts: list[Part]) -> Iterator[str]:
    """Each part for each size of network, and which takes longest and most."""
    yield "| | " + " | ".join(f"{size}: bytes | time" for size in SIZES) + " |"
    yield "|---|" + "---|---|" * len(SIZES)
    for part in parts:
        cells = [f"{_bytes(part.bytes * n)} | {_seconds(part.seconds * n)}" for n in SIZES.values()]
        yield f"| {part.name} ({part.where}) | " + " | ".join(cells) + " |"
    slowest = max(parts, key=lambda part: part.seconds)
    largest = max((part for part in parts if part.where == "memory"), key=lambda part: part.bytes)
    yield ""
    yield f"What takes longest is {slowest.name}; what takes most memory is {largest.name}."


def _bytes(n: float) -> str:
    return "-" if not n else f"{n / 1e9:.1f} GB" if n < 1e12 else f"{n / 1e12:.2f} TB"


def _seconds(s: float) -> str:
    return f"{s:.1f} s" if s < 100 else f"{s / 60:.1f} min" if s < 6000 else f"{s / 3600:.1f} h"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=float, default=5e7, help="weights that are measured")
    n = parser.parse_args().n
    with tempfile.TemporaryDirectory() as folder:
        (few, quarter), (many, parts) = (measured(size, Path(folder)) for size in (n / 4, n))
    print(f"Each part at {many:,} float32 weights, at {SPARSITY:.0%} sparsity. {machine()}")
    print(f"{'':40} {'bytes a weight':>15} {'ns a weight':>12} {f'{many / few:.0f} times as many take':>24}")
    grows = {
        part.name: part.seconds * many / (small.seconds * few)
        for part, small in zip(parts, quarter, strict=True)
    }
    for part in parts:
        print(f"{part.name:40} {part.bytes:15.3f} {1e9 * part.seconds:12.2f} {grows[part.name]:23.1f}x")
    worst = max(grows, key=lambda name: grows[name])
    headline(f"{many / few:.1f} times as many weights, {worst}", grows[worst], unit=" times as long")
    shares = {part.name: part.bytes for part in parts}
    part = shares["the masks in it"] / shares["a checkpoint of weights and optimizer"]
    headline("masks in a checkpoint over the rest of it", 100 * part, unit=" %")
    print("\nOn paper, for one process:\n")
    for line in table(parts):
        print(line)


if __name__ == "__main__":
    main()
