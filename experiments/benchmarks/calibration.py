"""Calibration: accuracy of a network without some of its channels, before any retraining.

`python -m experiments.benchmarks.calibration [--seeds N]`: a convolutional network on MNIST-1D, trained, cut,
with the statistics of its batch normalizations as they were, and taken anew from eight training batches.
"""

import argparse
import warnings
from copy import deepcopy
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lightning_prune as lp
from experiments.benchmarks.headlines import headline
from lightning_prune.deploy.timing import machine
from lightning_prune.structured.calibration import calibrate
from lightning_prune.study.data import mnist1d

STEPS, BATCH, BATCHES = 2000, 100, 8


def network() -> nn.Sequential:
    """Four convolutions with batch normalizations."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 40))]
    for before, after, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        layers += [nn.Conv1d(before, after, 5, stride, 2), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, 10))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The fraction of these that are right."""
    with torch.inference_mode():
        return float((model.eval()(x).argmax(1) == y).float().mean())


def of_seed(seed: int, sparsities: tuple[float, ...]) -> list[float]:
    """Accuracy of the dense network, and for each sparsity as it is cut and with new statistics."""
    torch.manual_seed(seed)
    data, model = mnist1d(), network()
    (x, y), test = data.train, data.test
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    found = [accuracy(model, *test)]
    for sparsity in sparsities:
        smaller = deepcopy(model)
        lp.prune_channels(smaller, sparsity, x[:2])
        found.append(accuracy(smaller, *test))
        calibrate(smaller, x.split(BATCH)[:BATCHES], lambda net, batch: net(batch))
        found.append(accuracy(smaller, *test))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds, sparsities = parser.parse_args().seeds, (0.3, 0.5)
    warnings.simplefilter("ignore")
    print(machine())
    dense, *rest = (
        mean(column) for column in zip(*(of_seed(s, sparsities) for s in range(seeds)), strict=True)
    )
    print(f"MNIST-1D, mean of {seeds} seeds: dense {dense:.1%}")
    for sparsity, cut, anew in zip(sparsities, rest[::2], rest[1::2], strict=True):
        print(
            f"  without {sparsity:.0%} of the channels {cut:.1%}, "
            f"with statistics of {BATCHES} batches {anew:.1%}"
        )
        headline(f"accuracy without {sparsity:.0%} of the channels: new statistics over old", anew / cut)


if __name__ == "__main__":
    main()
