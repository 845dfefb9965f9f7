"""One progress bar for the whole experiment: rounds are many and epochs short."""

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm
from typing_extensions import override

from experiments.records import pruner_of


class ExperimentProgress(Callback):
    """A bar over all optimizer steps that names the kind of run, the round and the weights left.

    Args:
        kind: shown first.
        every: steps between two refreshes.
    """

    def __init__(self, kind: str, every: int = 50) -> None:
        self.kind, self.every = kind, every
        self._bar: tqdm[Any] | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total, done = trainer.max_steps, trainer.global_step
        self._bar = tqdm(total=total, initial=done, unit="step", file=sys.stderr, dynamic_ncols=True)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is None or trainer.global_step % self.every:
            return
        pruner = pruner_of(trainer)
        left = f"{100 * (1 - pruner.sparsity):.1f} % of weights left"
        self._bar.set_description(f"{self.kind}: round {pruner.round}/{pruner.rounds}, {left}", refresh=False)
        if "val_acc" in trainer.callback_metrics:
            self._bar.set_postfix_str(f"val acc {trainer.callback_metrics['val_acc']:.3f}", refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._bar.close()
            self._bar = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
