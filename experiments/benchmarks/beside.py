"""The step with fixed masks, here and in another checkout, such as that of an earlier commit.

`git worktree add ../before COMMIT`, then `python -m experiments.benchmarks.beside ../before`: LeNet-300-100
at batch 60, with the callback and without, in processes of the one checkout and the other in turn.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback

from experiments.benchmarks import step
from experiments.benchmarks.peers import unlogged

RUNS, PAIRS, STEPS = 6, 9, 600


def nothing(task: Any) -> list[Callback]:
    """No callback."""
    return []


def of_plain() -> float:
    """How much of the time of a step without the callback one with it takes: the median of pairs."""
    batch = (torch.rand(60, 1, 28, 28), torch.randint(0, 10, (60,)))
    make = partial(torch.optim.Adam, fused=True, lr=1.2e-3)
    ways: list[Callable[[Any], list[Callback]]] = [nothing, step.holding]
    ratios: list[float] = []
    for pair in range(PAIRS):
        times = {way: step.step_time(step.LeNet, make, batch, STEPS, way) for way in ways[:: (-1) ** pair]}
        ratios.append(times[step.holding] / times[nothing])
    return median(ratios)


def measured(checkout: Path) -> float:
    """The same in a process whose package and benchmark are those of a checkout."""
    call = [sys.executable, str(Path(__file__).resolve()), "--here"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    said = subprocess.run(call, env=environment, check=True, capture_output=True, text=True).stdout
    return float(said.split()[-1])


@unlogged()
def main() -> None:
    """Measure and print."""
    if sys.argv[1:] == ["--here"]:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        print(of_plain())
        return
    checkouts = {"here": Path(step.__file__).parents[2], "there": Path(sys.argv[1]).resolve()}
    found: dict[str, list[float]] = {name: [] for name in checkouts}
    for _ in range(RUNS):
        for name, checkout in checkouts.items():
            found[name].append(measured(checkout))
    for name, ratios in found.items():
        low, high = min(ratios), max(ratios)
        print(f"{name}: {median(ratios):.3f}x of no callback ({low:.3f} to {high:.3f}, {RUNS} runs)")


if __name__ == "__main__":
    main()
