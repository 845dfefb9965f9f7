"""One progress bar for the whole experiment: rounds are many and epochs short."""

import sys
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import TqdmExperimentalWarning, tqdm
from typing_extensions import final, override

from lightning_prune.study.recording import pruner_of


@final
class ExperimentProgress(Callback):
    """A bar over all optimizer steps: kind of run, round, weights left, best validation so far, time left.

    Args:
        kind: shown first.
        bar: the class of the bar, `tqdm.tqdm` or one like it, such as `tqdm.rich.tqdm`.
        every: steps between two refreshes.
    """

    def __init__(self, kind: str, bar: Any = tqdm, every: int = 50) -> None:
        self.kind, self.bar, self.every = kind, bar, every
        self.best: dict[str, float] = {}
        self._bar: Any = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        options: dict[str, Any] = {"unit": "step", "file": sys.stderr, "dynamic_ncols": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmExperimentalWarning)  # rich's
            self._bar = self.bar(total=trainer.max_steps, initial=trainer.global_step, **options)
        self._show(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for metric, better in (("val_acc", max), ("val_loss", min)):
            if metric in trainer.callback_metrics:
                value = float(trainer.callback_metrics[metric])
                self.best[metric] = better(value, self.best.get(metric, value))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None and trainer.global_step % self.every == 0:
            self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        pruner = pruner_of(trainer)
        left = f"{100 * (1 - pruner.sparsity):.1f}% of weights"
        best = next((f", best {name} {value:.4g}" for name, value in self.best.items()), "")
        said = f"{self.kind}: round {pruner.round}/{pruner.rounds}, {left}{best}"
        self._bar.set_description(said, refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._show(trainer)
            self._bar.close()
            self._bar = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = dict(state_dict["best"])
