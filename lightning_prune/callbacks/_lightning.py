"""Lightning in one room: every touch of what is private to it, or depends on its version.

Each was checked with Lightning 2.6.6; tests/test_lightning.py fails where a later version moves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from lightning.pytorch.loops.progress import _ProcessedTracker, _Progress
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import final


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks (an attribute that its class does not declare)."""
    return trainer.callbacks  # type: ignore[attr-defined]


def log_interval(trainer: Trainer) -> int:
    """`log_every_n_steps`, at least 1 (an attribute that its class does not declare)."""
    return trainer.log_every_n_steps or 1  # type: ignore[attr-defined]


def is_a_trial(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run` (an attribute that its class does not declare)."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def prepare_for_weights(trainer: Trainer, module: nn.Module) -> None:
    """Make a module float64 before a checkpoint is loaded, with `precision="64-true"`.

    Lightning 2.6.6 does so only afterwards, whatever it is to do: the weights are rounded to float32 before.
    """
    if trainer.precision == "64-true":
        module.double()


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


def saves_between_validations(checkpoint: ModelCheckpoint) -> bool:
    """Whether a `ModelCheckpoint` writes by steps or by time, with whatever metrics there are."""
    return checkpoint._every_n_train_steps > 0 or checkpoint._train_time_interval is not None


def loaders_of(trainer: Trainer) -> CombinedLoader | None:
    """The training data loaders of the fit, once they are there."""
    return trainer.fit_loop._combined_loader


def mode_of(loaders: CombinedLoader) -> Any:
    """How a combined loader combines."""
    return loaders._mode


def validation_loaders_of(trainer: Trainer) -> CombinedLoader | None:
    """The validation data loaders of the fit, once they are there."""
    return trainer.fit_loop.epoch_loop.val_loop._combined_loader


def keeps_its_place(loader: Any) -> bool:
    """Whether a loader has a state of its own, which Lightning keeps in checkpoints."""
    return isinstance(loader, _Stateful)


def draw_anew(trainer: Trainer) -> None:
    """Make the data iterator of this epoch again, which draws its order."""
    assert trainer.fit_loop._data_fetcher is not None
    iter(trainer.fit_loop._data_fetcher)


def is_running(trainer: Trainer) -> bool:
    """Whether a call of the trainer is under way: it has neither come to its end nor failed."""
    return trainer.state.status == TrainerStatus.RUNNING


def has_drawn(trainer: Trainer) -> bool:
    """As an epoch starts: whether the data iterator of this epoch is there already."""
    fit = trainer.fit_loop
    return trainer.current_epoch == 0 or fit.is_resuming or fit.epoch_loop.restarting


def is_within_epoch(trainer: Trainer) -> bool:
    """Whether an epoch has begun that is not processed yet."""
    _, epoch = counts(trainer.fit_loop.epoch_progress)
    return epoch.started > epoch.processed


def accumulates(trainer: Trainer) -> bool:
    """Whether the gradients of the last batch go into a step of Lightning's that is still to come."""
    return is_within_epoch(trainer) and trainer.fit_loop._should_accumulate()


def counts(progress: _Progress) -> tuple[_ProcessedTracker, _ProcessedTracker]:
    """What is counted in all, and in this run of the loop."""
    return cast("_ProcessedTracker", progress.total), cast("_ProcessedTracker", progress.current)


@dataclass(frozen=True)
class Place:
    """Where in a training a checkpoint was written.

    Attributes:
        within_epoch: after a batch of an epoch, and not between two epochs.
        batches: how many batches of the epoch are trained.
        is_last: whether these are all of the epoch.
        within_batch: before the next batch was trained through; it is trained anew.
        before_end_of_batch: before the module's own `on_train_batch_end`.
    """

    within_epoch: bool
    batches: int = 0
    is_last: bool = False
    within_batch: bool = False
    before_end_of_batch: bool = False


def go_on_from(trainer: Trainer, progress: dict[str, Any]) -> Place:
    """As training starts: set the loops to the place of a checkpoint, to do what was still to be done there.

    Lightning 2.6 by itself does not come back to every place. With `max_steps` it takes a finished epoch for
    one that goes on, and trains a batch more of it; after a checkpoint of a batch's end it leaves out the
    validation that was due, and after the last batch also the epoch's end; and learning rate schedules that
    wait for a metric miss a step.

    Args:
        trainer: in `on_train_start`.
        progress: the state of the fit loop in the checkpoint.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    fit.load_state_dict(progress)
    for each in (fit, loop, loop.val_loop):
        each._restarting = each._loaded_from_state_dict = each._resuming_from_checkpoint = False
        each.reset_restart_stage()
    epochs, batches = counts(fit.epoch_progress), counts(loop.batch_progress)
    epoch, batch = epochs[1], batches[1]
    if epoch.started == epoch.processed:  # between epochs
        if epoch.completed < epoch.processed and loop._num_ready_batches_reached():
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        for count in epochs:
            count.ready = count.started = count.completed = count.processed
        return Place(within_epoch=False)

    fit._restart_stage = "restarted_mid_epoch"
    loop._restarting, loop._restart_stage = True, "restarted_on_last"
    loop.val_loop._has_run = False
    within_batch = batch.ready > batch.processed
    before_end = not within_batch and batch.processed > batch.completed
    if within_batch:
        loop.batch_progress.is_last_batch = False
        for count in batches:
            count.ready = count.started = count.processed = count.completed
    elif before_end:
        loop.batch_progress.increment_completed()
        assert fit._data_fetcher is not None
        if loop._should_check_val_fx(fit._data_fetcher):
            loop.val_loop._restart_stage = "restarted_mid_evaluation"
        else:
            loop.update_lr_schedulers("step", update_plateau_schedulers=True)
            loop._batches_that_stepped += not loop._should_accumulate()
    is_last = not within_batch and loop._num_ready_batches_reached()
    return Place(True, batch.ready, is_last, within_batch, before_end)


def load_places(trainer: Trainer) -> None:
    """Give loaders that have a state of their own that of the checkpoint, and make the iterator anew."""
    fit = trainer.fit_loop
    if fit._combined_loader is not None and fit._combined_loader_states_to_load:
        fit._combined_loader._load_state_dicts(fit._combined_loader_states_to_load)
        fit._combined_loader_states_to_load = []
        draw_anew(trainer)


def pass_over(trainer: Trainer, n: int) -> None:
    """Draw the first n batches of this epoch, for nothing. Lightning counts them itself as it goes on.

    Raises:
        ValueError: when there are not as many.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    try:
        for _ in range(n):
            next(fetcher)
    except StopIteration:
        raise ValueError(
            f"ckpt_path: the checkpoint was written after {n} batches of an epoch, and the training data "
            "have fewer now. Allowed are the data of that run. Give them, or resume from an epoch's end."
        ) from None
    fetcher.fetched -= n


def end_epoch(trainer: Trainer) -> None:
    """Let this epoch have no more batches."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    fetcher.done = True
    if isinstance(fetcher, _PrefetchDataFetcher):
        fetcher.batches = []


def fetches_ahead(trainer: Trainer) -> bool:
    """Whether a batch is drawn before it is asked for, since nobody knows which is the last one."""
    return trainer.fit_loop._data_fetcher is not None and trainer.fit_loop._data_fetcher.length is None


def lets_module_fetch(trainer: Trainer) -> bool:
    """Whether `training_step` asks for its batches itself."""
    return isinstance(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher)


def show_metrics(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Let `trainer.callback_metrics` have these, as if they were logged."""
    trainer._logger_connector._callback_metrics.update(metrics)


def writes_folders(trainer: Trainer) -> bool:
    """Whether checkpoints are folders to which each process writes its part."""
    strategy = trainer.strategy
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


def batch_before_transfer(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch as the module's own hooks before its transfer to the device make it."""
    return pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))


def leaves_its_processes(trainer: Trainer) -> bool:
    """Whether the fit runs in forked or spawned processes, which end with it."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


_WITHIN_STEP = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
_OF_BATCH = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_OF_MODULE = (
    *_WITHIN_STEP,
    *_OF_BATCH,
    "on_train_batch_start",
    "on_train_batch_end",
    "backward",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
)


def trains_plainly(trainer: Trainer) -> bool:
    """Whether a step is forward, backward and `optimizer.step` and nothing else, on the CPU in one process.

    Then nobody has a hook within the step or round the transfer of a batch, and there is no mixed precision,
    clipping, accumulation or profiler.
    """
    # Lightning sets these two without declaring them.
    data, profiler = (getattr(trainer, name) for name in ("datamodule", "profiler"))
    module = trainer.lightning_module
    return (
        module.automatic_optimization
        and type(trainer.strategy) is SingleDeviceStrategy
        and trainer.strategy.root_device.type == "cpu"
        and type(trainer.precision_plugin) is Precision
        and type(profiler) is PassThroughProfiler
        and trainer.accumulate_grad_batches == 1
        and not trainer.gradient_clip_val
        and not lets_module_fetch(trainer)
        and not any(is_overridden(hook, module) for hook in _OF_MODULE)
        and not any(is_overridden(hook, data) for hook in _OF_BATCH)
        and not any(is_overridden(hook, c) for c in callbacks_of(trainer) for hook in _WITHIN_STEP)
    )


@final
class PlainSteps:
    """Let a fit that trains plainly go from batch to batch with only what such a step needs.

    Lightning's own step calls some twenty hooks on all callbacks, most of which have none of them; on a small
    network that takes half as long as the training. This one calls the callbacks that have the hook. It does
    the rest in Lightning's order and counts with Lightning's counters, so that results, hooks, progress and
    checkpoints are the same.

    Args:
        trainer: in `on_train_start`, where `trains_plainly`. Its module's `training_step` returns the loss.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._module = trainer, trainer.lightning_module
        self._starts, self._ends = (
            [getattr(c, hook) for c in callbacks_of(trainer) if is_overridden(hook, c)]
            for hook in ("on_train_batch_start", "on_train_batch_end")
        )
        self._loop = trainer.fit_loop.epoch_loop
        self._theirs = self._loop.advance
        self._loop.advance = self._advance

    def leave(self) -> None:
        """Let Lightning take its own steps again."""
        vars(self._loop).pop("advance", None)

    def _advance(self, data_fetcher: Any) -> None:
        """Train a batch, as `_TrainingEpochLoop.advance` does."""
        loop, trainer, module = self._loop, self._trainer, self._module
        if loop.restarting:  # A validation may be due first.
            return self._theirs(data_fetcher)
        progress, connector = loop.batch_progress, trainer._logger_connector
        batch, _, _ = next(data_fetcher)
        index = loop.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        progress.increment_ready()
        connector.on_batch_start(batch)
        self._within("on_train_batch_start")
        for hook in self._starts:
            hook(trainer, module, batch, index)
        progress.increment_started()
        self._within("training_step")
        outputs = {"loss": self._step(batch, index)}
        progress.increment_processed()
        loop.update_lr_schedulers("step", update_plateau_schedulers=False)
        if loop._num_ready_batches_reached():
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        self._within("on_train_batch_end")
        for hook in self._ends:
            hook(trainer, module, outputs, batch, index)
        self._within(None)
        connector.on_batch_end()
        progress.increment_completed()
        connector.update_train_step_metrics()
        return None

    def _step(self, batch: Any, index: int) -> Tensor:
        """Forward, backward and the optimizer's step. Returns the loss, of several the last."""
        optimizer = cast("Any", self._trainer.optimizers[0])
        counts = self._loop.automatic_optimization.optim_progress.optimizer

        losses: list[Tensor] = []

        @torch.enable_grad()
        def closure() -> Tensor:
            loss = cast("Tensor", self._module.training_step(batch, index))
            counts.zero_grad.increment_ready()
            counts.zero_grad.increment_started()
            optimizer.zero_grad()
            counts.zero_grad.increment_completed()
            loss.backward()
            losses.append(loss.detach())
            return losses[-1]

        counts.step.increment_ready()
        optimizer.step(closure)
        counts.step.increment_completed()
        return losses[-1]

    def _within(self, hook: str | None) -> None:
        """Say which hook is called, which `log` asks."""
        vars(self._module)["_current_fx_name"] = hook  # A module looks at all that is set on it, and slowly.


Limits = tuple[int, int]  # max_epochs and max_steps; -1: unlimited


@final
class ShownLimits:
    """Let the trainer say other limits of a fit while optimizers and learning rate schedules are made.

    From `setup` of a callback, and so in `setup` of the module, until the strategy has made them; and again
    whenever it makes them anew. At all other times the trainer says the true limits.

    Args:
        trainer: in `setup` of a callback.
        early: true limits -> what the trainer says at once.
        exact: true limits -> what it says while the strategy makes optimizers. The loaders may be asked then.
    """

    def __init__(
        self, trainer: Trainer, early: Callable[[Limits], Limits], exact: Callable[[Limits], Limits]
    ) -> None:
        self._trainer, self._exact = trainer, exact
        self._true: Limits | None = self._now()
        self._say(early(self._true))
        self._theirs = trainer.strategy.setup_optimizers
        self._ours = trainer.strategy.setup_optimizers = partial(self._make, self._theirs)

    def _now(self) -> Limits:
        epochs = self._trainer.max_epochs
        return -1 if epochs is None else epochs, self._trainer.max_steps

    def _say(self, limits: Limits) -> None:
        loop = self._trainer.fit_loop
        loop.max_epochs, loop.epoch_loop.max_steps = limits

    def _make(self, make: Callable[[Trainer], None], trainer: Trainer) -> None:
        self._true = self._true or self._now()
        try:
            self._say(self._exact(self._true))
            make(trainer)
        finally:
            self._put_back()

    def _put_back(self) -> None:
        if self._true is not None:
            self._say(self._true)
        self._true = None

    def leave(self) -> None:
        """Take everything away again."""
        self._put_back()
        own = vars(self._trainer.strategy)
        if own.get("setup_optimizers") is self._ours:
            del own["setup_optimizers"]
            if self._trainer.strategy.setup_optimizers != self._theirs:
                own["setup_optimizers"] = self._theirs
