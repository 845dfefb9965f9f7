"""History: one row for each round that is over."""

from dataclasses import dataclass

from lightning.pytorch import Trainer

from lightning_prune.masks import Masks, alive


@dataclass(frozen=True)
class RoundRecord:
    """What a round was: a row of a callback's `history`.

    Args:
        round: its number; round 0 is the first.
        sparsity: fraction of the units that was dead in it.
        alive: number of units that were alive.
        total: number of units.
        steps: optimizer steps of the fit in which it ended.
        metrics: what was logged last, of one number each.
    """

    round: int
    sparsity: float
    alive: int
    total: int
    steps: int
    metrics: dict[str, float]


def with_round(
    history: list[RoundRecord], trainer: Trainer, round: int, units: Masks, steps: int
) -> list[RoundRecord]:
    """The history and a row of this round, as it is now.

    A round that goes on in another fit has one row, so this one takes the place of that round's earlier row.
    """
    metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if v.numel() == 1}
    left, total = alive(units), sum(mask.numel() for mask in units.values())
    sparsity = (total - left) / total if total else 0.0
    return [
        *(r for r in history if r.round < round),
        RoundRecord(round, sparsity, left, total, steps, metrics),
    ]
