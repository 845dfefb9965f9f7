"""Rounds: where a training is in its rounds, as a value."""

from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from lightning.pytorch import Trainer

from lightning_prune.callbacks.learning_rates import steps_per_epoch


class Clock(Enum):
    """What rounds are counted in: epochs, or the steps of all optimizers together."""

    EPOCHS = "epochs"
    STEPS = "steps"

    def read(self, trainer: Trainer) -> int:
        """What the clock says now."""
        return trainer.current_epoch if self is Clock.EPOCHS else trainer.global_step


@dataclass(frozen=True)
class Rounds:
    """Where a training is in its rounds. Round 0 is the first; each begins where the one before it ends.

    >>> rounds = Rounds(Clock.EPOCHS, length=2, ends=2)
    >>> rounds.is_over(1), rounds.is_over(2), rounds.next(now=2, step=40).ends
    (False, True, 4)

    Args:
        clock: what rounds are counted in.
        length: of a round, by the clock.
        number: the round in progress.
        step: the global step at which it began; below 0 where it began in an earlier fit.
        ends: what the clock says when it is over.
        read: what the clock said when this value was last brought in line with it. Another fit may have a
            clock that says something else.
        reached: the global step then.
        opened: whether the first batch of round 0 has begun.
    """

    clock: Clock
    length: int
    number: int = 0
    step: int = 0
    ends: int = 0
    read: int = 0
    reached: int = 0
    opened: bool = False

    def is_over(self, now: int) -> bool:
        """Whether the round in progress has come to its end."""
        return now >= self.ends

    def next(self, now: int, step: int) -> "Rounds":
        """The next round, which begins now. It does not drift where the clock jumps over an end."""
        return replace(self, number=self.number + 1, step=step, ends=max(self.ends + self.length, now + 1))

    def ending(self, now: int) -> "Rounds":
        """The same round; it ends now, or earlier if it was to."""
        return replace(self, ends=min(self.ends, now))

    def shorter(self, by: int) -> "Rounds":
        """The same round; it ends so much earlier."""
        return replace(self, ends=self.ends - by)

    def on(self, now: int, step: int) -> "Rounds":
        """The same place in the rounds on the clock of another fit, which says `now`, at its global step."""
        since = self.step + step - self.reached  # before that fit by what the round has had
        return replace(self, ends=self.ends + now - self.read, read=now, step=since, reached=step)

    def at(self, now: int, step: int) -> "Rounds":
        """The same place in the rounds, in line with what the clock and the global step are now."""
        return replace(self, read=now, reached=step)

    def to_come(self, end: float) -> float:
        """How many rounds can still begin before the clock says `end`."""
        return max(0, -int((self.ends - end) // self.length)) if end < float("inf") else float("inf")

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {**asdict(self), "clock": self.clock.value}

    @staticmethod
    def of(state: dict[str, Any]) -> "Rounds":
        """The rounds that `state_dict` described."""
        return Rounds(Clock(state["clock"]), **{name: v for name, v in state.items() if name != "clock"})


def end_of_fit(trainer: Trainer, clock: Clock) -> float:
    """What the clock will say when the fit ends; infinity where that cannot be known as the fit starts.

    A fit that is limited in time, or ended by another callback, may end before.
    """
    steps = float(trainer.max_steps) if trainer.max_steps >= 0 else float("inf")
    epochs = float("inf") if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs
    each = steps_per_epoch(trainer) if trainer.lightning_module.automatic_optimization else float("inf")
    if clock is Clock.STEPS:
        return min(steps, epochs * each)
    return min(epochs, steps / each if each < float("inf") else epochs)
