"""One global magnitude pruning: ours, torch's `global_unstructured`, concatenation with `numpy.partition`.

`python -m experiments.benchmarks.selection [--largest N]`: time, extra peak memory of a pruning in a process
of its own, and whether the masks differ in more than exact ties, for 1M weights and each ten times as many,
in float32, bfloat16 and float16. What does not fit into the free memory is left out, and so is numpy for
halves.
"""

import argparse
import cProfile
import json
import pstats
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from experiments.benchmarks.headlines import headline
from lightning_prune.deploy.timing import Ratio, alternated, low, machine, ratio, timed
from lightning_prune.masks import count
from lightning_prune.pruning import next_masks

TENSORS = 50
SPARSITY = 0.8


SIZES = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
DTYPES = ("float32", "bfloat16", "float16")
NEEDS = {"ours": 12, "torch": 56, "numpy": 17}  # bytes a weight, with those of the float32 weight


def weights(n: int, dtype: str = "float32") -> dict[str, Tensor]:
    """`n` normal weights in 50 tensors."""
    generator = torch.Generator().manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    return {
        f"w{i}": torch.randn(n // TENSORS, generator=generator, dtype=torch_dtype) for i in range(TENSORS)
    }


def ours(params: dict[str, Tensor]) -> Callable[[], list[Tensor]]:
    """lightning_prune."""
    dense = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    return lambda: list(next_masks(params, dense, [(list(params), SPARSITY)]).values())


def torchs(params: dict[str, Tensor]) -> Callable[[], list[Tensor]]:
    """torch.nn.utils.prune.global_unstructured."""

    def work() -> list[Tensor]:
        modules = [nn.Module() for _ in params]
        for module, p in zip(modules, params.values(), strict=True):
            module.weight = nn.Parameter(p, requires_grad=False)
        total = sum(p.numel() for p in params.values())
        pairs = [(module, "weight") for module in modules]
        torch_prune.global_unstructured(
            pairs, torch_prune.L1Unstructured, amount=total - round((1 - SPARSITY) * total)
        )
        return [module.get_buffer("weight_mask").bool() for module in modules]

    return work


def numpys(params: dict[str, Tensor]) -> Callable[[], list[Tensor]]:
    """Concatenation and numpy.partition."""

    def work() -> list[Tensor]:
        scores = [np.abs(p.numpy()) for p in params.values()]
        flat = np.concatenate(scores)
        dead = len(flat) - round((1 - SPARSITY) * len(flat))
        cut = np.partition(flat, dead)[dead]
        return [torch.from_numpy(s >= cut) for s in scores]

    return work


METHODS = {"ours": ours, "torch": torchs, "numpy": numpys}


def peak(method: str, n: int, dtype: str) -> float:
    """Extra peak memory of one pruning in bytes a weight, measured in a process of its own."""
    command = [sys.executable, "-m", "experiments.benchmarks.selection", "--peak", method]
    command += ["--n", str(n), "--dtype", dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_here(method: str, n: int, dtype: str) -> float:
    params = weights(n, dtype)
    METHODS[method](weights(100_000, dtype))()  # what is loaded on first use
    work = METHODS[method](params)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the high-water mark
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / n


def differing(a: list[Tensor], b: list[Tensor], params: dict[str, Tensor]) -> int:
    """In how many places masks of the same number of survivors differ.

    Raises:
        ValueError: when they do in more than exact ties.
    """
    places = [(x != y).nonzero().flatten() for x, y in zip(a, b, strict=True)]
    values = torch.cat([p[i].abs() for p, i in zip(params.values(), places, strict=True)])
    if sum(map(count, a)) != sum(map(count, b)) or values.unique().numel() > 1:
        raise ValueError(f"the masks differ in {len(values)} places, and not in ties of one score")
    return len(values)


def available() -> int:
    """Bytes of memory that are free for a process."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def measure(n: int, dtype: str) -> tuple[str, dict[str, Ratio | float]]:
    """One line of the table, and its figures: as fast as a peer by its name, and `bytes` a weight."""
    names = [m for m in METHODS if NEEDS[m] * n < available() and (m != "numpy" or dtype == "float32")]
    if "ours" not in names:
        return f"{n:13,} {dtype:>8}  needs {NEEDS['ours'] * n / 1e9:.0f} GB of memory", {}
    params = weights(n, dtype)
    works = {name: METHODS[name](params) for name in names}
    first = {name: work() for name, work in works.items()}  # also warms up
    ties = differing(first["ours"], first["torch"], params) if "torch" in names else None
    del first
    rounds = 3 if n >= 100_000_000 else 9
    times = alternated({name: timed(work) for name, work in works.items()}, rounds)
    mine = low(times["ours"])
    cells = [f"{n:13,} {dtype:>8} {mine:9.4f} {1e9 * mine / n:6.2f}"]
    gains: dict[str, Ratio | float] = {m: ratio(times[m], times["ours"]) for m in names if m != "ours"}
    cells += [f"{gains[m]!s:>9}" if m in names else 8 * " " + "-" for m in ("torch", "numpy")]
    del params, works  # their memory is that of the other processes
    extra = {name: peak(name, n, dtype) for name in names}
    cells += [f"{extra[name]:7.1f}" if name in names else "      -" for name in METHODS]
    line = " ".join([*cells, "-".rjust(8) if ties is None else f"{ties:8,}"])
    return line, {**gains, "bytes": extra["ours"]}


def profiled(n: int, times: int = 20) -> str:
    """Where the time of one pruning of ours goes, and how many Python calls it makes for each tensor."""
    work = ours(weights(n))
    work()
    profile = cProfile.Profile()
    profile.runcall(lambda: [work() for _ in range(times)])
    stats: Any = pstats.Stats(profile)
    took = {key[2]: entry[3] for key, entry in stats.stats.items()}  # with what each function calls
    shares = (
        f"{name} {took[name] / stats.total_tt:.0%}" for name in ("threshold", "keep_top", "check_finite")
    )
    calls = stats.total_calls / times / TENSORS
    return f"profile of {n:,} weights: {calls:.0f} calls for each tensor; of the time {', '.join(shares)}"


def tell(n: int, figures: dict[str, Ratio | float]) -> None:
    """The headlines of a pruning of float32."""
    aims = {"torch": 12, "numpy": 1}
    for name in sorted(aims.keys() & figures.keys()):
        headline(f"one global pruning of {n / 1e6:g}M weights, {name} over ours", figures[name], aims[name])
    if "bytes" in figures:
        headline(
            f"its extra memory for {n / 1e6:g}M weights", figures["bytes"], at_most=6, unit=" bytes each"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=float, default=1e8, help="weights of the largest pruning")
    parser.add_argument("--profile", type=int, metavar="N", help="only where the time goes for N weights")
    parser.add_argument("--peak", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(_peak_here(args.peak, args.n, args.dtype[0])))
        return
    if args.profile:
        print(f"{profiled(args.profile)}. {machine()}")
        return
    print(f"One global pruning to {SPARSITY:.0%}, {TENSORS} tensors. {machine()}")
    print("Seconds and ns a weight of ours, times over ours, extra peak memory in bytes a weight, and in how")
    print("many places the masks of ours and torch differ: all of them exact ties.")
    print(f"{'weights':>13} {'dtype':>8} {'ours s':>9} {'ns':>6}", end=" ")
    print(f"{'torch':>9} {'numpy':>9} {'ours B':>7} {'torch B':>7} {'numpy B':>7} {'ties':>8}")
    figures: dict[str, dict[str, Ratio | float]] = {}
    largest = 0
    for dtype in args.dtype:
        for n in SIZES:
            if n <= args.largest:
                line, figures[dtype] = measure(n, dtype)
                largest = n
                print(line, flush=True)
    if "float32" in figures:
        tell(largest, figures["float32"])


if __name__ == "__main__":
    main()
