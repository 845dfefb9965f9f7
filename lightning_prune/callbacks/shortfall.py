"""Shortfall: fewer prunings than were asked for, said as a fit starts if it is known then, or as it ends."""

from lightning.pytorch import Trainer

from lightning_prune.callbacks.rounds import Clock, Rounds, end_of_fit


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
