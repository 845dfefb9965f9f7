"""Strategies: on which of Lightning's ways to spread a training masks hold."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_prune import folders
from lightning_prune.callbacks import _lightning
from lightning_prune.callbacks.messages import warn


def check_strategy(trainer: Trainer, *, whole: str | None = None) -> None:
    """Refuse a strategy that shards parameters such that no mask can be put on them.

    Args:
        trainer: with the strategy.
        whole: why weights are needed whole, so that ModelParallelStrategy is refused, too.

    Raises:
        ValueError: then.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        if whole is None:
            _check_averages(trainer)
            _say_torn(trainer)
            return
        raise ValueError(
            f"strategy: ModelParallelStrategy shards parameters over processes, and {whole}. Allowed are a "
            "single device and DDP. Use one of them, or IterativeMagnitudePruning."
        )
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(
        strategy, DeepSpeedStrategy
    ):
        instead = "a single device and DDP" if whole else "a single device, DDP and ModelParallelStrategy"
        raise ValueError(
            f"strategy: {type(strategy).__name__} may shard parameters over devices, and masks need "
            f"whole ones, or such as FSDP2 and tensor parallel make. Allowed are {instead}. Use one of them."
        )


def _check_averages(trainer: Trainer) -> None:
    for callback in _lightning.callbacks_of(trainer):
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            name = type(callback).__name__
            raise ValueError(
                f"strategy: ModelParallelStrategy shards parameters over processes, and {name} keeps a copy "
                "of the module, which torch cannot make of FSDP2, and Lightning not resume. Allowed is one "
                f"of the two. Leave out {name}, or train on a single device or with DDP."
            )


def _say_torn(trainer: Trainer) -> None:
    """Say which checkpoints of shards were not written to their end: Lightning takes them for some."""
    for saver in trainer.checkpoint_callbacks:
        place = Path(saver.dirpath or "") if isinstance(saver, ModelCheckpoint) else Path()
        there = sorted(place.glob("*.ckpt")) if place.name else []
        folders_there = [path for path in there if path.is_dir()]
        for path in folders_there:
            if folders.is_folder(path):
                continue
            whole = [other for other in folders_there if folders.is_folder(other)]
            newest = max(whole, key=lambda other: (other / folders.REST).stat().st_mtime, default=None)
            warn(
                f"{path} has no {folders.REST}, which is written last: a process was killed as it wrote this "
                "checkpoint, and nothing resumes from it, though ckpt_path='last' may choose it. Remove it. "
                + (f"The newest whole one is {newest}." if newest else "There is no whole one beside it.")
            )


def check_optimizers(trainer: Trainer) -> None:
    """Refuse an optimizer that shards its state over ranks, which cannot be rewound.

    Raises:
        ValueError: then.
    """
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            raise ValueError(
                "optimizer: ZeroRedundancyOptimizer keeps a part of its state on each rank, so no rank can "
                "take a snapshot of it. Allowed are optimizers that every rank has whole, and those of "
                "ModelParallelStrategy. Use the one that it wraps."
            )
