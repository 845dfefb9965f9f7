"""Channels: time to plan and cut against torch-pruning, latency of what is left, epochs as a network shrinks.

`python -m experiments.benchmarks.channels [--rounds N]`. Prints medians of the ratios of alternated pairs.
"""

import argparse
import logging
import warnings
from copy import deepcopy
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

import lightning_prune as lp
from experiments.benchmarks.headlines import headline
from experiments.benchmarks.step import Task
from lightning_prune.deploy.timing import alternated, low, machine, ratio, seconds, timed
from lightning_prune.study.channel_cuts import torch_pruning
from lightning_prune.study.models import ResNet20


class Net(Task):
    """A user's module."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class EpochSteps(Callback):
    """The median step of every epoch, in seconds."""

    def __init__(self) -> None:
        self.start, self.steps = 0.0, list[float]()
        self.epochs: list[float] = []

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.start = perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(perf_counter() - self.start)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(median(self.steps))
        self.steps = []


def cifar_resnet18() -> nn.Module:
    """The ResNet-18 of torchvision with the stem for 32x32 images: 3x3, no stride, no pooling."""
    from torchvision.models import resnet18

    net: Any = resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def trained(
    net: nn.Module, pruner: Callback, batches: int, batch: int, epochs: int, *others: Callback
) -> None:
    """Train on noise, in two or three lines as a user would."""
    data = TensorDataset(torch.rand(batches * batch, 3, 32, 32), torch.randint(0, 10, (batches * batch,)))
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[pruner, *others], **quiet)
    trainer.fit(Net(net, partial(torch.optim.SGD, lr=0.01, momentum=0.9)), DataLoader(data, batch))


def plan_and_cut(name: str, aim: float, rounds: int) -> None:
    """Half of a network's channels by L1: ours, with its trial on a copy, and torch-pruning's own pruner."""
    import timm

    net, shape = timm.create_model(name), [1, 3, 64, 64]

    def timed(cut: Any) -> float:
        copy = deepcopy(net)
        return seconds(lambda: cut(copy))

    ours = partial(lp.prune_channels, sparsity=0.5, example_input=shape)
    theirs = partial(torch_pruning, sparsity=0.5, shape=shape)
    candidates = {"ours": partial(timed, ours), "torch-pruning": partial(timed, theirs)}
    times = alternated(candidates, rounds, warm_up=1)
    print(f"plan and cut {name}: " + ", ".join(f"{k} {low(v):.2f} s" for k, v in times.items()))
    against = ratio(times["ours"], times["torch-pruning"])
    headline(f"plan, try and cut {name} over torch-pruning, which tries nothing", against, at_most=aim)


def half_width(rounds: int) -> None:
    """A ResNet-18 that lost half of its channels in training, against dense, batch 32."""
    dense = cifar_resnet18()
    net, x = deepcopy(dense), torch.rand(32, 3, 32, 32)
    trained(net, lp.StructuredChannelPruning(lp.schedules.OneShot(0.5)), batches=1, batch=8, epochs=2)
    before, after = (lp.summarize(network.eval(), x) for network in (dense, net))
    print("ResNet-18 (CIFAR), half of the channels: " + after.against(before))
    with torch.inference_mode():
        candidates = {"dense": timed(partial(dense, x)), "cut": timed(partial(net, x))}
        times = alternated(candidates, rounds)
    shown = ", ".join(f"{k} {1000 * low(v):.1f} ms" for k, v in times.items())
    print(f"  {shown}")
    headline("ResNet-18 of half the channels, batch 32", ratio(times["dense"], times["cut"]), at_least=2.5)


def shrinking(batches: int) -> None:
    """The steps of each epoch of a ResNet-20 that loses a quarter of its channels after each."""
    watch, schedule = EpochSteps(), lp.schedules.Linear(sparsity=0.75, rounds=3)
    pruner = lp.StructuredChannelPruning(schedule, rounds=3, remove="each_round")
    trained(ResNet20(), pruner, batches, 128, 4, watch)
    print("epochs as ResNet-20 shrinks, batch 128, channels left and median step:")
    for epoch, step in enumerate(watch.epochs):
        times = watch.epochs[0] / step
        print(f"  {1 - schedule(epoch):4.0%} {1000 * step:7.1f} ms, {times:.2f}x as fast as dense")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="alternated pairs")
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    print(machine())
    for name, aim in (("resnet50", 2), ("mixnet_s", 5), ("skresnet18", 5)):
        plan_and_cut(name, aim, rounds)
    half_width(rounds)
    shrinking(rounds)


if __name__ == "__main__":
    main()
