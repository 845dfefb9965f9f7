"""Random number generators of a training: what a checkpoint of Lightning lacks, and a resumed run needs."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune import rng
from lightning_prune.callbacks import _lightning


def of_loaders(trainer: Trainer) -> list[torch.Generator]:
    """The generators that training data are drawn with, where they have some of their own."""
    running = _lightning.loaders_of(trainer)
    found: dict[int, torch.Generator] = {}
    for loader in running.flattened if running is not None else ():
        batches = getattr(loader, "batch_sampler", None)
        for draws in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            if isinstance(generator := getattr(draws, "generator", None), torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def capture(trainer: Trainer | None) -> dict[str, Any]:
    """The state of this process's generators, also between fits."""
    return rng.capture(of_loaders(trainer) if trainer else ())


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Set this process's generators to the state that `capture` returned."""
    rng.restore(state, of_loaders(trainer))


def restore_own(trainer: Trainer, ranks: list[dict[str, Any]]) -> None:
    """Set the generators to those of this rank, if there are as many as here are processes."""
    if len(ranks) == trainer.world_size:
        restore(trainer, ranks[trainer.global_rank])


def go_on(trainer: Trainer, ranks: list[dict[str, Any]]) -> None:
    """As a resumed training starts: draw on from the generators of a checkpoint, one state for each rank."""
    if len(ranks) != trainer.world_size:
        rank_zero_warn(
            f"the checkpoint has the random number generators of {len(ranks)} processes, and "
            f"here are {trainer.world_size}: masks, weights and rounds go on, random numbers do not."
        )
    restore_own(trainer, ranks)
    loaders = _lightning.loaders_of(trainer)
    if loaders is not None and _lightning.has_iterator(trainer) and not _lightning.is_stateful(loaders):
        _lightning.draw_anew(trainer)  # the iterator of this epoch is there already, and drew other numbers
