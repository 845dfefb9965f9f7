"""Strategies: on which of Lightning's ways to spread a training masks hold."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch.distributed.optim import ZeroRedundancyOptimizer


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
