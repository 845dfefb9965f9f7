"""A training step with fixed masks: ours, the same Trainer without a callback, Lightning's ModelPruning.

`python -m experiments.benchmarks.step`: LeNet-300-100 at batch 60, ResNet-20 at batch 128; no bar, no logger.
"""

import logging
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from typing_extensions import override

from experiments.benchmarks.headlines import headline
from lightning_prune import IterativeMagnitudePruning, prune
from lightning_prune.deploy.timing import alternated, low, machine, ratio, wait
from lightning_prune.study.data import Sliced
from lightning_prune.study.models import LeNet, ResNet20

SPARSITY = 0.8
AIMS = {"LeNet": {"plain": 1.03, "ModelPruning": 0.75}, "ResNet-20": {"plain": 1.01}}


class Task(LightningModule):
    """A network, cross-entropy and an optimizer, nothing else."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.make = net, optimizer

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


class Stopwatch(Callback):
    """Time from the end of the first tenth of the steps to the end of the last."""

    def __init__(self, steps: int) -> None:
        self.first, self.start, self.a_step = steps // 10, 0.0, 0.0

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.first:
            wait()
            self.start = perf_counter()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wait()
        self.a_step = (perf_counter() - self.start) / (trainer.global_step - self.first)


def holding(task: Task) -> list[Callback]:
    """Our callback, masks fixed."""
    masks = {f"net.{name}": mask for name, mask in prune(task.net, SPARSITY).items()}
    return [IterativeMagnitudePruning(rounds=0, masks=masks)]


def model_pruning(task: Task) -> list[Callback]:
    """Lightning's callback, pruned once at the end of the first epoch of one batch and never again."""
    pairs = [(m, "weight") for m in task.net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    callback = ModelPruning(
        "l1_unstructured", pairs, amount=SPARSITY, use_lottery_ticket_hypothesis=False, apply_pruning=False
    )
    callback.apply_pruning(SPARSITY)
    return [callback]


def step_time(
    net: Callable[[], nn.Module],
    optimizer: Callable[..., torch.optim.Optimizer],
    batch: tuple[Tensor, Tensor],
    steps: int,
    callbacks: Callable[[Task], list[Callback]],
    accelerator: str = "cpu",
) -> float:
    """Seconds of a step; on a GPU the batches lie there, and what was started has ended."""
    torch.manual_seed(0)
    task = Task(net(), optimizer)
    size = len(batch[0])
    loader = DataLoader(
        Sliced((batch[0].repeat(50, *[1] * (batch[0].dim() - 1)), batch[1].repeat(50))),
        size,
        collate_fn=lambda b: b,
    )
    watch = Stopwatch(steps)
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=steps,
        callbacks=[*callbacks(task), watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, loader)
    return watch.a_step


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cases = (
        (
            "LeNet-300-100, batch 60, fused Adam",
            LeNet,
            (60, 1, 28, 28),
            torch.optim.Adam,
            {"lr": 1.2e-3},
            800,
            1,
        ),
        (
            "ResNet-20, batch 128, fused SGD",
            ResNet20,
            (128, 3, 32, 32),
            torch.optim.SGD,
            {"lr": 0.1, "momentum": 0.9},
            12,
            2,
        ),
    )
    print(f"One training step at {SPARSITY:.0%} sparsity, masks fixed; nine alternated runs of each")
    for name, net, shape, make, options, steps, threads in cases:
        torch.set_num_threads(threads)
        batch = (torch.rand(shape), torch.randint(0, 10, shape[:1]))

        def optimizer(
            params: Any, make: Any = make, options: dict[str, float] = options
        ) -> torch.optim.Optimizer:
            return make(params, fused=True, **options)

        candidates = {"plain": lambda task: [], "ours": holding, "ModelPruning": model_pruning}
        measure = {
            k: lambda c=c: step_time(net, optimizer, batch, steps, c)  # noqa: B023  (used within this turn)
            for k, c in candidates.items()
        }
        times = alternated(measure, 9)
        print(f"{name}. {machine()}")
        print("  " + ", ".join(f"{k} {1000 * low(v):.3f} ms" for k, v in times.items()))
        print(
            f"  ours/plain {ratio(times['ours'], times['plain'])}, "
            f"ModelPruning/plain {ratio(times['ModelPruning'], times['plain'])}, "
            f"ours/ModelPruning {ratio(times['ours'], times['ModelPruning'])}"
        )
        for against, aim in next(aims for start, aims in AIMS.items() if name.startswith(start)).items():
            what = f"a step with masks over {against}, {name}"
            headline(what, ratio(times["ours"], times[against]), at_most=aim)


if __name__ == "__main__":
    main()
