"""One global magnitude pruning: ours, torch's `global_unstructured`, concatenation with `numpy.partition`.

Prints time and extra peak memory, with the masks compared:
`python -m experiments.benchmarks.selection [--largest N]`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from experiments.benchmarks.timing import alternated, machine, ratio, seconds
from lightning_prune.pruning import next_masks

TENSORS = 50
SPARSITY = 0.8


def weights(n: int) -> dict[str, Tensor]:
    """`n` normal weights in 50 tensors."""
    generator = torch.Generator().manual_seed(0)
    return {f"w{i}": torch.randn(n // TENSORS, generator=generator) for i in range(TENSORS)}


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


def peak(method: str, n: int) -> float:
    """Extra peak memory of one pruning in bytes a weight, measured in a process of its own."""
    command = [sys.executable, "-m", "experiments.benchmarks.selection", "--peak", method, "--n", str(n)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_here(method: str, n: int) -> float:
    params = weights(n)
    METHODS[method](weights(100_000))()  # what is loaded on first use
    work = METHODS[method](params)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the high-water mark
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / n


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=float, default=1e8, help="weights of the largest pruning")
    parser.add_argument("--peak", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(_peak_here(args.peak, args.n)))
        return
    print(f"One global pruning to {SPARSITY:.0%}, {TENSORS} float32 tensors. {machine()}")
    print(f"{'weights':>9} {'ours':>9} {'torch':>9} {'numpy':>9}  torch/ours  numpy/ours  masks that differ")
    sizes = [n for n in (1_000_000, 10_000_000, 100_000_000, 1_000_000_000) if n <= args.largest]
    for n in sizes:
        params = weights(n)
        works = {name: make(params) for name, make in METHODS.items()}
        results = {name: work() for name, work in works.items()}  # also warms up
        ties = sum(
            int((a != b).count_nonzero()) for a, b in zip(results["ours"], results["torch"], strict=True)
        )
        del results
        times = alternated(
            {name: lambda work=work: seconds(work) for name, work in works.items()}, 3 if n >= 1e8 else 9
        )
        figures = " ".join(f"{median(times[name]):8.3f}s" for name in METHODS)
        ratios = [ratio(times[name], times["ours"]) for name in ("torch", "numpy")]
        print(f"{n:9,} {figures}  {ratios[0]:9.1f}x  {ratios[1]:9.2f}x  {ties} (exact ties)")
    if os.path.exists("/proc/self/clear_refs"):
        extra = {name: peak(name, sizes[-1]) for name in METHODS}
        shown = ", ".join(f"{name} {extra[name]:.1f}" for name in METHODS)
        print(f"extra peak memory at {sizes[-1]:,} weights, bytes a weight: {shown}; ", end="")
        print(f"torch/ours {extra['torch'] / extra['ours']:.1f}x")


if __name__ == "__main__":
    main()
