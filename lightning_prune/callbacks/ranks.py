"""What the processes of a distributed training tell each other."""

from typing import Any

from lightning.pytorch import Trainer
from torch import distributed

from lightning_prune.doctor import digest
from lightning_prune.masks import Masks, pack, unpack


def of_ranks(trainer: Trainer, value: Any) -> list[Any]:
    """What every rank has here, in order of ranks."""
    values = [value] * trainer.world_size
    if trainer.world_size > 1:
        distributed.all_gather_object(values, value)
    return values


def agreed(trainer: Trainer, masks: Masks) -> Masks:
    """The masks of rank 0, on every rank."""
    if trainer.world_size == 1:
        return masks
    packed = unpack(trainer.strategy.broadcast(pack(masks)))
    return {name: packed[name].to(mask.device) for name, mask in masks.items()}


def check_ranks(trainer: Trainer, masks: Masks) -> None:
    """Make sure that all ranks hold the same masks.

    Raises:
        RuntimeError: on every rank, when they do not.
    """
    if trainer.world_size == 1:
        return
    first, *others = of_ranks(trainer, digest(masks))
    if wrong := [rank for rank, its in enumerate(others, 1) if its != first]:
        raise RuntimeError(
            f"masks differ between processes: those of rank {', '.join(map(str, wrong))} are not those of "
            "rank 0. Give all the same masks=, change none in on_prune, and draw random numbers from the "
            "`generator` that a criterion may ask for: all must come to the same."
        )
