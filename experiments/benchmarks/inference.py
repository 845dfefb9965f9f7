"""Inference of pruned networks, dense against `accelerate`, end to end.

`python -m experiments.benchmarks.inference [--sparsity S ...]`. Prints ratios of alternated runs,
measured anew after `accelerate` has chosen, and the form of each layer. Every layer is equally sparse.
"""

import argparse
import logging
from functools import partial
from typing import Any, cast

import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.deploy.timing import alternated, low, machine, ratio, timed
from lightning_prune.study.models import LeNet

CASES = {
    "LeNet-300-100": (LeNet, 784, (1, 32, 256)),
    "1024-2048-1024": (
        lambda: nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 1024)),
        1024,
        (32,),
    ),
}


def measure(model: nn.Module, x: torch.Tensor, rounds: int) -> str:
    """One line of the table."""
    fast = lp.accelerate(model, x)
    with torch.inference_mode():
        worst = float((fast(x) - model(x)).abs().max() / model(x).abs().max())
        works = {"dense": timed(partial(model, x)), "ours": timed(partial(fast, x))}
        times = alternated(works, rounds, warm_up=3)
    report = cast(Any, fast).acceleration
    forms = ", ".join(choice.form for choice in report.layers) if report.speed_up > 1 else "dense copy"
    gain, dense = ratio(times["dense"], times["ours"]), 1e6 * low(times["dense"])
    return f"{dense:9.0f} {gain!s:>10} {report.measured!s:>10} {worst:9.0e}  {forms}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--rounds", type=int, default=501)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    print(machine())
    print(
        f"{'sparsity':>8} {'batch':>5} {'dense us':>9} {'speed-up':>10} {'in choice':>10} {'error':>9}  forms"
    )
    for name, (build, inputs, batches) in CASES.items():
        print(name)
        for sparsity in arguments.sparsity:
            model = build().eval()
            lp.prune(model, sparsity, allocate=lp.allocation.uniform)
            for batch in batches:
                row = measure(model, torch.randn(batch, inputs), arguments.rounds)
                print(f"{sparsity:8.0%} {batch:5d} {row}")


if __name__ == "__main__":
    main()
