"""Resumption: what a checkpoint still has to give back to the training that goes on from it."""

from typing import Any

from lightning.pytorch import Trainer
from typing_extensions import final

from lightning_prune.callbacks import _lightning, generators


@final
class Resumption:
    """The random number generators of a checkpoint, until the resumed training has begun its first batch.

    Lightning makes the iterator of an epoch before training goes on, and from a checkpoint written at the end
    of a validation it first replays the end of that epoch; so the generators are set more than once.

    Args:
        ranks: the generators of each process, as `generators.capture` returns them.
    """

    def __init__(self, ranks: list[dict[str, Any]]) -> None:
        self.ranks = ranks

    def on_train_start(self, trainer: Trainer) -> None:
        """Draw on from here."""
        generators.go_on(trainer, self.ranks)

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Draw on from here where Lightning makes the data iterator of a later epoch anew."""
        if trainer.current_epoch > 0 and not _lightning.goes_on_within_epoch(trainer):
            generators.restore_own(trainer, self.ranks)
