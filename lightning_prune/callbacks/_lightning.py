"""Lightning in one room: every touch of what is private to it, or depends on its version.

Each was checked with Lightning 2.6.6; tests/test_lightning.py fails where a later version moves.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.optim.swa_utils import AveragedModel


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks (an attribute that its class does not declare)."""
    return trainer.callbacks  # type: ignore[attr-defined]


def log_interval(trainer: Trainer) -> int:
    """`log_every_n_steps`, at least 1 (an attribute that its class does not declare)."""
    return trainer.log_every_n_steps or 1  # type: ignore[attr-defined]


def is_a_trial(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run` (an attribute that its class does not declare)."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def averages_of(trainer: Trainer) -> list[nn.Module]:
    """The averaged copies of the module that `WeightAveraging` and `StochasticWeightAveraging` keep."""
    found = [getattr(callback, "_average_model", None) for callback in callbacks_of(trainer)]
    there = [average for average in found if average is not None]
    return [average.module if isinstance(average, AveragedModel) else average for average in there]


def averaged_models(trainer: Trainer) -> list[nn.Module]:
    """The averages of `WeightAveraging` as it keeps them, with their counters."""
    return [
        callback._average_model
        for callback in callbacks_of(trainer)
        if isinstance(callback, WeightAveraging) and callback._average_model is not None
    ]


def has_replaced_its_scheduler(averaging: StochasticWeightAveraging) -> bool:
    """Whether stochastic weight averaging has begun, which replaces the learning rate scheduler."""
    return averaging._swa_scheduler is not None


def loaders_of(trainer: Trainer) -> CombinedLoader | None:
    """The training data loaders of the fit, once they are there."""
    return trainer.fit_loop._combined_loader


def mode_of(loaders: CombinedLoader) -> Any:
    """How a combined loader combines."""
    return loaders._mode


def is_stateful(loaders: CombinedLoader) -> bool:
    """Whether one of the loaders restores its own place in its data."""
    return bool(loaders._state_dicts())


def draw_anew(trainer: Trainer) -> None:
    """Make the data iterator of this epoch again, which draws its order."""
    assert trainer.fit_loop._data_fetcher is not None
    iter(trainer.fit_loop._data_fetcher)


def has_iterator(trainer: Trainer) -> bool:
    """Whether the data iterator of this epoch is there."""
    return trainer.fit_loop._data_fetcher is not None


def goes_on_within_epoch(trainer: Trainer) -> bool:
    """Whether the loop is on its way from a checkpoint and makes no new data iterator for this epoch."""
    return trainer.fit_loop.is_resuming or trainer.fit_loop.epoch_loop.restarting


def batch_before_transfer(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch as the module's own hooks before its transfer to the device make it."""
    return pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))


def leaves_its_processes(trainer: Trainer) -> bool:
    """Whether the fit runs in forked or spawned processes, which end with it."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
