"""One global pruning of sharded weights: bytes sent, seconds, memory, bits that differ.

`python -m experiments.benchmarks.sharded [--largest N]`: 2 and 4 processes that talk by gloo, 1M weights and
each ten times as many. Ours against gathering all scores on one process, which sends the masks back, and
against pruning each shard alone, whose masks are others. Bytes are all that passed the loopback interface of
the machine meanwhile, so nothing else should talk there. Then, on paper, what is sent for 7B and 70B weights.
"""

import argparse
import ctypes
import multiprocessing
import os
import pickle
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.data import DataLoader
from typing_extensions import override

from experiments.benchmarks.headlines import headline
from lightning_prune import IterativeMagnitudePruning, LotteryTicketRewind
from lightning_prune.deploy.timing import machine
from lightning_prune.masks import Masks, count
from lightning_prune.pruning import next_masks
from lightning_prune.schedules import Geometric
from lightning_prune.shards import local, placed

SPARSITY, TENSORS, WIDTH = 0.8, 40, 50  # 40 tensors of rows of 50
SIZES = (1_000_000, 10_000_000, 100_000_000)
WORLDS = (2, 4)
ROUNDS = 3


def weights(
    n: int, rank: int, world: int, tensors: int = TENSORS, rows_differ: bool = False
) -> dict[str, Tensor]:
    """This process's rows of `n` normal weights; each row with a scale of its own where rows differ."""
    generator = torch.Generator().manual_seed(rank)
    shape = (n // tensors // WIDTH // world, WIDTH)
    drawn = {f"w{i}": torch.randn(shape, generator=generator) for i in range(tensors)}
    if rows_differ:
        for w in drawn.values():
            w *= torch.randn((shape[0], 1), generator=generator).exp()
    return drawn


def sharded(parts: dict[str, Tensor], world: int) -> dict[str, Tensor]:
    """The same as shards."""
    mesh = init_device_mesh("cpu", (world,))
    return {name: DTensor.from_local(p, mesh, [Shard(0)], run_check=False) for name, p in parts.items()}


def all_alive(params: dict[str, Tensor]) -> Masks:
    """The masks of dense weights."""
    return {name: placed(torch.ones_like(local(p), dtype=torch.bool), p) for name, p in params.items()}


def ours(params: dict[str, Tensor], masks: Masks) -> list[Tensor]:
    """lightning_prune."""
    return [local(m) for m in next_masks(params, masks, [(list(params), SPARSITY)]).values()]


def gathering(params: dict[str, Tensor], masks: Masks) -> list[Tensor]:
    """All scores on process 0, which selects as one process does and sends each its masks."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    scores: dict[str, Tensor] = {}
    for name, p in params.items():
        here = local(p).abs()
        parts = [torch.empty_like(here) for _ in range(world)] if rank == 0 else None
        distributed.gather(here, parts)
        if parts:
            scores[name] = torch.cat(parts)
    chosen: Masks = {}
    if rank == 0:
        chosen = next_masks(scores, all_alive(scores), [(list(scores), SPARSITY)])
        del scores
    found: list[Tensor] = []
    for name, p in params.items():
        mine = torch.empty(local(p).shape, dtype=torch.bool)
        distributed.scatter(mine, list(chosen.pop(name).chunk(world)) if rank == 0 else None)
        found.append(mine)
    return found


def alone(params: dict[str, Tensor], masks: Masks) -> list[Tensor]:
    """Each process its own shard, to the same sparsity."""
    parts, here = ({name: local(t) for name, t in tensors.items()} for tensors in (params, masks))
    return list(next_masks(parts, here, [(list(parts), SPARSITY)]).values())


METHODS: dict[str, Callable[[dict[str, Tensor], Masks], list[Tensor]]] = {
    "ours": ours,
    "gathering": gathering,
    "alone": alone,
}


@dataclass
class Told:
    """What a process gives to collectives: numbers in tensors, objects, and how often."""

    numbers: int = 0
    objects: int = 0
    calls: int = 0


@contextmanager
def listening() -> Generator[Told]:
    """Count what this process gives to the two collectives that ours is made of."""
    told, theirs = Told(), (distributed.all_reduce, distributed.all_gather_object)

    def reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        told.numbers, told.calls = told.numbers + tensor.nbytes, told.calls + 1
        return theirs[0](tensor, *args, **options)

    def gather(objects: list[Any], mine: Any, *args: Any, **options: Any) -> Any:
        told.objects += len(pickle.dumps(mine))
        told.calls += 2  # the sizes first
        return theirs[1](objects, mine, *args, **options)

    distributed.all_reduce, distributed.all_gather_object = reduce, gather
    try:
        yield told
    finally:
        distributed.all_reduce, distributed.all_gather_object = theirs


def on_loopback() -> int:
    """Bytes that the loopback interface has sent since the machine started."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _peak(work: Callable[[], object]) -> int:
    """Bytes by which the memory of this process rises above what it has now."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _rank(rank: int, world: int, port: int, n: int, folder: str) -> None:
    """What one process measures."""
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=world, timeout=timedelta(minutes=5)
    )
    found: dict[str, Any] = {}
    small = sharded(weights(100_000, rank, world), world)
    params = sharded(weights(n, rank, world), world)
    for name, method in METHODS.items():
        for shards, rounds in ((small, 1), (params, ROUNDS)):  # first what is loaded on first use
            dense = all_alive(shards)
            times, sent, peaks = [], [], []
            for _ in range(rounds):
                distributed.barrier()
                before, start = on_loopback(), perf_counter()
                peaks.append(_peak(partial(method, shards, dense)))
                distributed.barrier()
                times.append(perf_counter() - start)
                sent.append(on_loopback() - before)
            found[name] = {"seconds": median(times), "sent": median(sent), "peak": max(peaks)}
    for differ in (False, True):
        params = sharded(weights(n, rank, world, rows_differ=differ), world)
        dense = all_alive(params)
        masks, others = ours(params, dense), alone(params, dense)
        found[f"bits {differ}"] = sum(count(a ^ b) for a, b in zip(masks, others, strict=True))
    torch.save(found, Path(folder, f"{rank}.pt"))
    distributed.barrier()
    distributed.destroy_process_group()


def _one_process(n: int, folder: str) -> None:
    """The peak memory of the same pruning in one process that has all weights whole."""
    torch.set_num_threads(1)
    peak = 0
    for size in (100_000, n):
        params = weights(size, 0, 1)
        dense = all_alive(params)
        peak = _peak(partial(next_masks, params, dense, [(list(params), SPARSITY)]))
    torch.save(peak, Path(folder, "one.pt"))


def _run(work: Callable[..., None], many: list[tuple[Any, ...]]) -> None:
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=work, args=args) for args in many]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if codes := [process.exitcode for process in started if process.exitcode]:
        raise RuntimeError(f"processes ended with {codes}; allowed is 0. Look at what they said.")


def measured(n: int, world: int) -> tuple[list[dict[str, Any]], int]:
    """What each process measured, and the peak memory of one that has everything."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        _run(_rank, [(rank, world, port, n, folder) for rank in range(world)])
        _run(_one_process, [(n, folder)])
        ranks = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world)]
        return ranks, torch.load(Path(folder, "one.pt"), weights_only=True)


def tell(n: int, world: int, ranks: list[dict[str, Any]]) -> None:
    """The headlines: gathering over ours."""
    what = f"of one global pruning of {n / 1e6:g}M weights on {world} processes, gathering over ours"
    for key, words, aim in (("sent", "bytes sent", 100), ("seconds", "time", 1)):
        theirs, mine = (max(rank[method][key] for rank in ranks) for method in ("gathering", "ours"))
        headline(f"{words} {what}", theirs / mine, at_least=aim)


def lines(n: int, world: int, ranks: list[dict[str, Any]], one: int) -> Iterator[str]:
    """Rows of the table, one for each method, of what `measured` found."""
    share = 4 * n / world
    for name in METHODS:
        mine = [rank[name] for rank in ranks]
        seconds, sent = max(result["seconds"] for result in mine), max(result["sent"] for result in mine)
        peak = max(result["peak"] for result in mine)
        bits = "0 / 0"
        if name == "alone":
            bits = " / ".join(
                f"{sum(rank[f'bits {differ}'] for rank in ranks):,}" for differ in (False, True)
            )
        of_one = (share + peak) / ((4 * n + one) / world)
        cells = f"{n:,}", f"{world}", name, f"{sent / world / 1e3:,.1f}", f"{seconds:.3f}"
        yield " | ".join(["", *cells, f"{peak / 1e6:,.1f}", f"{of_one:.2f}", bits, ""]).strip()


# --------------------------------------------------------------------------------------------- in a fit


class _Net(LightningModule):
    """Square layers, as many as there are tensors, each a group of its own where they are sharded."""

    def __init__(self, n: int) -> None:
        super().__init__()
        width = round((n / TENSORS) ** 0.5)
        self.net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(TENSORS)])

    @override
    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for part in (*self.net, self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch[:, : self.net[0].in_features]).square().mean()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Four batches."""
        return DataLoader(torch.randn(16, 4096), batch_size=4 // self.trainer.world_size)  # type: ignore[arg-type]


class _Begins(Callback):
    """Before the pruner: as an epoch begins, what is free goes back to the system, and the mark is reset."""

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # of the training and the whole network before it was sharded
        Path("/proc/self/clear_refs").write_text("5")


class _Ends(Callback):
    """After pruner and rewind: the highest that the memory was while they worked."""

    def __init__(self) -> None:
        self.peaks: list[int] = []

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and trainer.current_epoch:
            self.peaks.append(_status("VmHWM"))


def _fit(rank: int, world: int, port: int, n: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": f"{rank}",
        "LOCAL_RANK": f"{rank}",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "fit",
    }
    os.environ |= {"WORLD_SIZE": f"{world}", "LOCAL_WORLD_SIZE": f"{world}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    if world > 1:
        distributed.init_process_group("gloo", timeout=timedelta(minutes=2))
    peak = 0
    for size in (100_000, n):  # first what is loaded on first use
        before, ends = _status("VmRSS"), _Ends()
        ticket = [IterativeMagnitudePruning(Geometric(to=SPARSITY), rounds=2), LotteryTicketRewind()]
        options: dict[str, Any] = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        }
        if world > 1:
            strategy = ModelParallelStrategy(world, 1, process_group_backend="gloo")
            options |= {"strategy": strategy, "devices": world}
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=3,
            callbacks=[_Begins(), *ticket, ends],
            enable_model_summary=False,
            **options,
        )
        trainer.fit(_Net(size))
        peak = max(ends.peaks) - before
    torch.save(peak, Path(folder, f"{world}-{rank}.pt"))
    if world > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def in_a_fit(n: int) -> Iterator[str]:
    """Rows of a table: the memory of a process while a fit prunes and rewinds."""
    one = 0
    for world in (1, *WORLDS):
        with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            _run(_fit, [(rank, world, port, n, folder) for rank in range(world)])
            peak = max(
                torch.load(Path(folder, f"{world}-{rank}.pt"), weights_only=True) for rank in range(world)
            )
        one = one or peak
        yield f"| {n:,} | {world} | {peak / 1e6:,.1f} | {peak / n * world:.1f} | {peak * world / one:.2f} |"


# --------------------------------------------------------------------------------------------- on paper


@dataclass(frozen=True)
class Network:
    """A transformer: weights that are pruned, and in how many tensors they are."""

    name: str
    weights: float
    tensors: int


@dataclass(frozen=True)
class Link:
    """What connects processes: bytes a second that each sends, and seconds until one of them is there."""

    name: str
    bandwidth: float
    latency: float


NETWORKS = (Network("7B", 7e9, 32 * 7), Network("70B", 70e9, 80 * 7))
LINKS = {8: Link("NVLink, 450 GB/s", 450e9, 5e-6), 64: Link("400 Gb/s Ethernet or InfiniBand", 50e9, 2e-5)}


def on_paper(few: Told, many: Told, tensors: tuple[int, int]) -> Iterator[str]:
    """What each process would send; what it tells grows with the number of tensors, as was measured twice.

    A ring sends 2 (N - 1) / N of what is summed, in 2 (N - 1) steps; of objects each passes on those of
    all others. To gather scores in bfloat16, two bytes a weight go through the link of one process, and back
    comes a byte a weight.
    """

    def at(a: int, b: int, n: int) -> float:
        return a + (b - a) / (tensors[1] - tensors[0]) * (n - tensors[0])

    for net in NETWORKS:
        for n, link in LINKS.items():
            numbers, objects, calls = (
                at(a, b, net.tensors) for a, b in zip(vars(few).values(), vars(many).values(), strict=True)
            )
            sent = 2 * (n - 1) / n * numbers + (n - 1) * objects
            seconds = sent / link.bandwidth + calls * 2 * (n - 1) * link.latency
            through = (n - 1) / n * net.weights * 3
            cells = f"{net.name}", f"{n}, {link.name}", f"{sent / 1e6:.1f} MB", f"{seconds * 1e3:.0f} ms"
            others = f"{through / 1e9:.0f} GB", f"{through / link.bandwidth:.2f} s"
            need = f"{3 * net.weights / 1e9:.0f} GB"
            yield " | ".join(["", *cells, *others, need, ""]).strip()


def _tell(rank: int, world: int, port: int, tensors: int, folder: str) -> None:
    where = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    params = sharded(weights(1_000_000, rank, world, tensors), world)
    with listening() as told:
        ours(params, all_alive(params))
    torch.save(vars(told), Path(folder, f"{rank}.pt"))
    distributed.barrier()
    distributed.destroy_process_group()


def told(tensors: int, world: int = 2) -> Told:
    """What a process tells to prune weights in so many tensors."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        _run(_tell, [(rank, world, port, tensors, folder) for rank in range(world)])
        return Told(**torch.load(Path(folder, "0.pt"), weights_only=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=float, default=1e8, help="weights of the largest pruning")
    parser.add_argument("--fit", action="store_true", help="only the memory of a pruning within a fit")
    given = parser.parse_args()
    largest = given.largest
    if given.fit:
        print(
            "Memory of the fullest process while a fit prunes and rewinds, from before the network was made:"
        )
        print("weights, masks, gradients, optimizer, snapshot and what the pruning needs.\n")
        print("| weights | processes | MB | bytes a weight of its share | over its share of one process |")
        print("|---|---|---|---|---|")
        for n in (size for size in SIZES if size <= largest):
            for line in in_a_fit(n):
                print(line, flush=True)
        return
    print(f"One global pruning to {SPARSITY:.0%} of float32 weights in {TENSORS} tensors. {machine()}")
    print("Sent by a process, seconds of all, what the memory of the fullest process rises by and, with its")
    print(
        "weights, over its share of what one process needs; bits that differ from the masks of one process:"
    )
    print("weights drawn alike / rows of scales of their own.\n")
    print("| weights | processes | | kB sent | s | MB | of its share | bits |")
    print("|---|---|---|---|---|---|---|---|")
    found = None
    for n in (size for size in SIZES if size <= largest):
        for world in WORLDS:
            found = n, world, *measured(n, world)
            for line in lines(*found):
                print(line, flush=True)
    if found:
        tell(*found[:3])
    print("\nOn paper, for scores in bfloat16: sent by a process and its time, without that of computing;")
    print("to gather scores instead, what passes through one process, its time, and memory there.\n")
    print("| weights | processes | sent | time | gathered | time | memory |")
    print("|---|---|---|---|---|---|---|")
    few, many = 40, 160
    for line in on_paper(told(few), told(many), (few, many)):
        print(line)


if __name__ == "__main__":
    main()
