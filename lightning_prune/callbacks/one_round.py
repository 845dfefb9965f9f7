"""One round: how long it is for a learning rate schedule that every round goes through."""

from dataclasses import dataclass
from math import ceil, inf

from lightning.pytorch import Trainer

from lightning_prune.callbacks._lightning import Limits
from lightning_prune.callbacks.learning_rates import steps_per_epoch
from lightning_prune.callbacks.rounds import Clock


@dataclass(frozen=True)
class OneRound:
    """A round as a learning rate schedule sees it that is rewound to a step or an epoch.

    Args:
        clock: what rounds are counted in.
        length: of the first round, by the clock.
        steps: that later rounds end later in the schedule than the first one, having begun at that step.
        epochs: the same in epochs.
    """

    clock: Clock
    length: int
    steps: int = 0
    epochs: int = 0

    def end(self, interval: str, per_epoch: float) -> float:
        """Where the schedule is when a round ends that began with a rewind.

        >>> late = OneRound(Clock.EPOCHS, length=4, epochs=1)
        >>> late.end("epoch", per_epoch=10), late.end("step", per_epoch=10)
        (5, 50)

        Args:
            interval: "step" or "epoch": how often the schedule steps.
            per_epoch: optimizer steps in an epoch; infinite where nobody knows.
        """
        epochs, more = self.length + self.epochs, self.steps
        if self.clock is Clock.STEPS:
            more += self.length
            epochs = self.epochs
        elif interval == "epoch":
            return epochs + int(more // per_epoch)
        steps = (epochs * per_epoch if epochs else 0) + more
        return steps if interval == "step" or steps == inf else int(steps // per_epoch)

    def first(self, interval: str, per_epoch: float) -> float:
        """The length of the first round, by the steps of the schedule."""
        return OneRound(self.clock, self.length).end(interval, per_epoch)

    def early(self, true: Limits) -> Limits:
        """What a trainer says of a round as if it were the fit, before the data can be asked.

        >>> OneRound(Clock.EPOCHS, length=4).early((20, -1))
        (4, -1)
        """
        epochs, steps = true
        if self.clock is Clock.STEPS:
            return epochs, _least(self.length + self.steps, steps)
        return _least(self.length + self.epochs + bool(self.steps), epochs), steps

    def exact(self, trainer: Trainer, true: Limits) -> Limits:
        """What a trainer says of a round as if it were the fit, where the data can be asked.

        They are asked only if it takes their length to say it, as the order of the first epoch is drawn then.
        """
        epochs, steps = true
        mixed = steps >= 0 or self.steps if self.clock is Clock.EPOCHS else epochs >= 0 or self.epochs
        if not mixed or not trainer.lightning_module.automatic_optimization:
            return self.early(true)
        trainer.fit_loop.setup_data()
        if not 0 < (per_epoch := steps_per_epoch(trainer)) < inf:
            return self.early(true)
        end = self.end("step", per_epoch)
        return _least(ceil(end / per_epoch), epochs), _least(int(end), steps)


def _least(a: int, b: int) -> int:
    """The lower of two limits, of which the second may be -1: none."""
    return a if b < 0 else min(a, b)
