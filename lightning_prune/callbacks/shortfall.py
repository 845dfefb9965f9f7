"""Shortfall: less pruning than was asked for, said as early as it is known."""

from collections.abc import Sequence

from lightning.pytorch import Trainer

from lightning_prune.callbacks.rounds import Clock, Rounds, end_of_fit
from lightning_prune.checks import named
from lightning_prune.schedules import Schedule
from lightning_prune.structured.targets import Removed


def cut_off(
    schedule: Schedule | float, rounds: int, argument: str = "schedule", unit: str = "round"
) -> str | None:
    """What to say of a schedule that goes on after the last round, or update; None where it does not.

    >>> from lightning_prune.schedules import Cubic
    >>> cut_off(Cubic(0.9, rounds=20), rounds=2)[:75]
    'schedule: in round 2, the last one, Cubic(sparsity=0.9, rounds=20, start=0,'
    >>> cut_off(Cubic(0.9, rounds=2), rounds=2)

    Args:
        schedule: of a callback. One that does not say which is its `last` round is taken to end in time.
        rounds: of the callback.
        argument: that gives the schedule.
        unit: what the schedule counts, "round" or "update".
    """
    if isinstance(schedule, Removed):
        schedule = schedule.schedule
    last: int | None = getattr(schedule, "last", None)
    if not callable(schedule) or last is None or rounds >= last:
        return None
    reached, asked = schedule(rounds), schedule(last)
    if reached >= asked:
        return None
    more = f"Give the callback rounds={last}" if unit == "round" else "Give a lower every_n_train_steps"
    return (
        f"{argument}: in {unit} {rounds}, the last one, {named(schedule)} is at sparsity {reached:.4g}, and "
        f"it reaches {asked:.4g} only in {unit} {last}. {more}, or a schedule that ends sooner."
    )


def without_effect(given: float, levels: Sequence[float]) -> str | None:
    """What to say of masks to start from that are sparser than the schedule in its first rounds.

    >>> without_effect(0.8, [0.25, 0.5, 0.75])[:76]
    'masks: they are at sparsity 0.8000, and the schedule is at 0.7500 in round 3'
    >>> without_effect(0.2, [0.25, 0.5, 0.75])

    Args:
        given: sparsity of these masks.
        levels: the sparsities of rounds 1, 2, ... Of a schedule that is 0 in all of them nothing is said: it
            is to hold the masks.
    """
    without = sum(0 < level <= given for level in levels)
    if not without:
        return None
    which = "none of the prunings takes" if without == len(levels) else f"the first {without} prunings take"
    return (
        f"masks: they are at sparsity {given:.4f}, and the schedule is at {levels[without - 1]:.4f} in round "
        f"{without}: {which} a weight. Sparsity counts what is dead already; give a schedule that begins "
        "there, or fewer rounds."
    )


def without_room(trainer: Trainer, rounds: Rounds, asked: int) -> str | None:
    """What to say as a fit starts that ends before all prunings have come; None where they have room.

    Args:
        trainer: whose fit it is.
        rounds: where the training is, on the clock of this fit.
        asked: number of prunings in all.
    """
    if rounds.number >= asked:
        return None
    end = end_of_fit(trainer, rounds.clock)
    room, unit = rounds.to_come(end), rounds.clock.value
    if rounds.number + room < asked:
        return (
            f"the fit has room for {room} of the {asked - rounds.number} prunings that are left (it ends "
            f"with {unit[:-1]} {end:.0f}, a round has {rounds.length}). Train longer, make rounds shorter, "
            "or lower rounds; a later fit goes on from there."
        )
    last = end - rounds.ends - (asked - rounds.number - 1) * rounds.length
    if last < rounds.length:
        return (
            f"the fit has room for {last:.0f} of the {rounds.length} {unit} of the last round (it ends with "
            f"{unit[:-1]} {end:.0f}). Train longer, make rounds shorter, or lower rounds."
        )
    return None


def ended_early(rounds: Rounds, asked: int, sparsity: float, trained: bool, moved: bool = True) -> str | None:
    """What to say as a fit ends before all prunings have come; None where they have.

    >>> from lightning_prune.callbacks.rounds import Clock
    >>> ended_early(Rounds(Clock.EPOCHS, length=1, number=1), asked=2, sparsity=0.2, trained=True)[:60]
    'the fit ended in round 1, after 1 of 2 prunings and at spars'

    Args:
        rounds: where the training is.
        asked: number of prunings in all.
        sparsity: that was reached.
        trained: whether the fit has trained at all.
        moved: whether the global step has moved.
    """
    if rounds.number >= asked:
        return None
    what = f"after {rounds.number} of {asked} prunings and at sparsity {sparsity:.4f}"
    if trained and not moved and rounds.clock is Clock.STEPS:
        return (
            f"the fit ended in round {rounds.number}, {what}: rounds are counted in steps, and none was "
            "counted. Lightning counts those of self.optimizers(); step these, or count rounds "
            "with every_n_epochs."
        )
    if trained:
        return (
            f"the fit ended in round {rounds.number}, {what}. Train longer, let EarlyStopping wait longer, "
            "or end rounds by it, with end_round_on_early_stop=True; a later fit goes on from here."
        )
    return (
        f"the fit ended in round {rounds.number} without a step, {what}: this training was at its end, or "
        "had no batches. Raise max_epochs, max_steps or limit_train_batches."
    )
