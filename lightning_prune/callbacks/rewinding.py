"""LotteryTicketRewind: when to take the snapshot, when to go back to it."""

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import lr_scheduler
from typing_extensions import override

from lightning_prune.callbacks.pruning import IterativeMagnitudePruning, callbacks_of
from lightning_prune.masks import Masks
from lightning_prune.rewind import Snapshot
from lightning_prune.surgery import Plan, cut_snapshot


class LotteryTicketRewind(Callback):
    """After each pruning, go back to the state of an early step: the lottery ticket procedure.

    The snapshot is taken at the start of the first batch with `trainer.global_step == to_step` and holds
    parameters, all buffers, optimizers and learning rate schedulers. It is part of the checkpoint. After each
    pruning all of it is restored, bit for bit, and the masks are put on. The gradient scaler of mixed
    precision is not rewound.

    Args:
        to_step: the optimizer step to rewind to; 0 is initialization. Less than the length of the first
            round.

    Raises:
        ValueError: when `to_step` is negative, or as training starts: without a pruning callback, with
            several, or with a `to_step` beyond the first round.

    Reference: Frankle & Carbin (2019), arXiv:1803.03635; to a later step: Frankle et al. (2020),
        arXiv:1912.05671.
    """

    def __init__(self, to_step: int = 0) -> None:
        if not isinstance(to_step, int) or to_step < 0:
            raise ValueError(f"to_step={to_step!r}: allowed are whole numbers from 0 on, such as 0.")
        self.to_step = to_step
        self.snapshot: Snapshot | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and (length := _pruner(trainer).every_n_train_steps) is not None:
            self._check_step(length)

    def _check_step(self, length: int | float) -> None:
        if self.to_step >= length:
            raise ValueError(
                f"to_step={self.to_step}: allowed is 0 to {length - 1}, within a round. Lower it."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruner = _pruner(trainer)
        length = pruner.steps_per_round
        self._check_step(length)
        for config in trainer.lr_scheduler_configs:
            horizon = _horizon(config.scheduler)
            epochs = pruner.every_n_epochs if pruner.every_n_train_steps is None else None
            its = length if config.interval == "step" else epochs
            if horizon is not None and its is not None and horizon * config.frequency > its:
                warnings.warn(
                    f"{type(config.scheduler).__name__} is made for {horizon * config.frequency} "
                    f"{config.interval}s and a round has {its}: every round rewinds it before its end. "
                    "Make it for the pruning callback's `steps_per_round`.",
                    stacklevel=2,
                )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.snapshot is not None or trainer.global_step < self.to_step:
            return
        if trainer.global_step > self.to_step:
            raise ValueError(
                f"to_step={self.to_step}: training is at step {trainer.global_step} without a snapshot. "
                "Allowed is a step still to come at which a batch begins (those of all optimizers count), or "
                "a checkpoint of a run with this callback. Use one of these."
            )
        self.snapshot = Snapshot.take(pl_module, trainer.optimizers, _schedulers(trainer))

    def on_cut(self, trainer: Trainer, pl_module: LightningModule, plan: Plan) -> None:
        """Channels were removed from the network: the snapshot loses the same ones."""
        if self.snapshot is not None:
            self.snapshot = cut_snapshot(self.snapshot, plan, pl_module, trainer.optimizers)

    def on_prune(self, trainer: Trainer, pl_module: LightningModule, masks: Masks) -> None:
        """Rewind; the pruning callback puts the masks on."""
        if self.snapshot is not None:  # a pruning at initialization may come before it
            self.snapshot.restore(pl_module, trainer.optimizers, _schedulers(trainer))

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.snapshot.state_dict() if self.snapshot else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.snapshot = Snapshot(**state_dict) if state_dict else None


def _pruner(trainer: Trainer) -> IterativeMagnitudePruning:
    pruners = [c for c in callbacks_of(trainer) if isinstance(c, IterativeMagnitudePruning)]
    if len(pruners) != 1:
        raise ValueError(
            f"LotteryTicketRewind goes with exactly one pruning callback; here are {len(pruners)}. Add "
            "IterativeMagnitudePruning, or put several schedules into one: schedule={pattern: schedule}."
        )
    return pruners[0]


def _schedulers(trainer: Trainer) -> list[Any]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def _horizon(scheduler: Any) -> int | None:
    """How many of its steps a scheduler that ends somewhere is made for."""
    if isinstance(scheduler, lr_scheduler.CosineAnnealingLR):
        return int(scheduler.T_max)
    if isinstance(scheduler, lr_scheduler.OneCycleLR):
        return int(scheduler.total_steps)
    if isinstance(scheduler, (lr_scheduler.LinearLR, lr_scheduler.PolynomialLR)):
        return int(scheduler.total_iters)
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        last = _horizon(scheduler._schedulers[-1])
        return None if last is None else int(scheduler._milestones[-1]) + last
    return None
