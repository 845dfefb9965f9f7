"""Strategies: on which of Lightning's ways to spread a training masks hold."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch.distributed.optim import ZeroRedundancyOptimizer


def check_strategy(trainer: Trainer) -> None:
    """Refuse a strategy that may shard parameters.

    Raises:
        ValueError: then.
    """
    strategy = trainer.strategy
    whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    if not whole or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"strategy: {type(strategy).__name__} may shard parameters over devices, and masks need "
            "whole ones. Allowed are a single device and DDP. Use one of them."
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
                "take a snapshot of it. Allowed are optimizers that every rank has whole. Use the one that "
                "it wraps."
            )
