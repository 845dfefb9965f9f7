"""Patience: `EarlyStopping` that ends a round, and not the fit."""

import sys
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from typing_extensions import final


def exhausted(trainer: Trainer) -> bool:
    """Whether an `EarlyStopping` has waited for a better metric as long as it waits."""
    return any(_has_waited(s, s.patience) for s in trainer.early_stopping_callbacks)


def _has_waited(stopper: EarlyStopping, patience: int) -> bool:
    return stopper.wait_count >= max(1, patience)


@final
class RoundPatience:
    """While this is there, no `EarlyStopping` of a trainer ends the fit because a metric no longer improves.

    What else they end a fit for, such as a metric that is not finite, still does.

    Args:
        trainer: whose callbacks of that class wait until `give_back`.

    Attributes:
        due: whether they have looked at a metric since they were asked.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.due = True
        self._given = [(stopper, stopper.patience) for stopper in trainer.early_stopping_callbacks]
        for stopper, _ in self._given:
            stopper.patience = sys.maxsize

    def is_exhausted(self, trainer: Trainer) -> bool:
        """Whether one of them, in any process, would have ended the fit. All processes ask together."""
        self.due = False
        here = any(_has_waited(stopper, patience) for stopper, patience in self._given)
        return trainer.strategy.reduce_boolean_decision(here, all=False)

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint hold the patience that was given."""
        for stopper, patience in self._given:
            if state := checkpoint.get("callbacks", {}).get(stopper.state_key):
                state["patience"] = patience

    def give_back(self) -> None:
        """Let them end the fit again."""
        for stopper, patience in self._given:
            stopper.patience = patience
        self._given = []
