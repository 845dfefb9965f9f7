"""Masks that grow: a step between two updates, an update, and memory, against fixed masks and none.

`python -m experiments.benchmarks.growth`: LeNet-300-100 at batch 60, ResNet-20 at batch 128, with RigL and
SRigL at 90 %. Memory is the highest that one process ever held, measured in a process for each.
"""

import logging
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from experiments.benchmarks.headlines import headline
from experiments.benchmarks.step import Task, step_time
from lightning_prune import DynamicSparseTraining, IterativeMagnitudePruning, prune
from lightning_prune.deploy.timing import alternated, low, machine, ratio
from lightning_prune.growth import FanIn
from lightning_prune.study.models import LeNet, ResNet20

SPARSITY = 0.9
EVERY = 10  # steps between two updates, where they are measured
NEVER = 10**6

Net = Callable[[], nn.Module]
CASES: dict[str, tuple[Net, tuple[int, ...], type[torch.optim.Optimizer], dict[str, float], int]] = {
    "LeNet-300-100, batch 60, fused Adam": (LeNet, (60, 1, 28, 28), torch.optim.Adam, {"lr": 1.2e-3}, 400),
    "ResNet-20, batch 128, fused SGD": (
        ResNet20,
        (128, 3, 32, 32),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9},
        20,
    ),
}


def nothing(task: Task) -> list[Callback]:
    """No callback."""
    return []


def fixed(task: Task) -> list[Callback]:
    """Masks that stay, of a callback that prunes."""
    masks = {f"net.{name}": mask for name, mask in prune(task.net, SPARSITY).items()}
    return [IterativeMagnitudePruning(rounds=0, masks=masks)]


def growing(task: Task, every: int, **options: Any) -> list[Callback]:
    """Masks that grow, with an update every so many steps up to the end."""
    until = NEVER * 2 if every == NEVER else NEVER
    return [DynamicSparseTraining(SPARSITY, every_n_train_steps=every, until_step=until, **options)]


WAYS: dict[str, Callable[[Task], list[Callback]]] = {
    "no callback": nothing,
    "fixed masks": fixed,
    "RigL between updates": partial(growing, every=NEVER),
    "RigL": partial(growing, every=EVERY, fraction=0.3),
    "SRigL": partial(growing, every=EVERY, fraction=0.3, granularity=FanIn()),
}


def a_step(case: str, way: str) -> float:
    """Seconds of a step in this way, updates included."""
    net, shape, make, options, steps = CASES[case]
    batch: tuple[Tensor, Tensor] = (torch.rand(shape), torch.randint(0, 10, shape[:1]))
    optimizer: Any = partial(make, fused=True, **options)
    return step_time(net, optimizer, batch, steps, WAYS[way])


def memory(case: str, way: str) -> float:
    """The highest memory, in bytes, of a process that trains this way."""
    command = [sys.executable, "-m", "experiments.benchmarks.growth", case, way]
    return 1024 * float(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if len(sys.argv) == 3:  # one case in a process of its own
        a_step(*sys.argv[1:])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    print(f"At {SPARSITY:.0%} sparsity, one thread. {machine()}")
    for case in CASES:
        times = alternated({way: partial(a_step, case, way) for way in WAYS}, 5)
        steps = {way: low(seconds) for way, seconds in times.items()}
        print(f"{case}: a step")
        for way, seconds in times.items():
            took = f"{1000 * steps[way]:.3f} ms, {ratio(seconds, times['no callback'])} of no callback"
            print(f"  {way}: {took}; {memory(case, way) / 1e6:.0f} MB")
        for way in ("RigL", "SRigL"):
            update = EVERY * (steps[way] - steps["RigL between updates"]) / steps["RigL between updates"]
            print(f"  an update of {way} takes as long as {update:.1f} steps between updates")
            headline(f"an update of {way} in steps, {case}", update, at_most=5, unit=" steps")


if __name__ == "__main__":
    main()
