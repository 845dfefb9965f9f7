"""History: one row for each round that is over."""

from dataclasses import dataclass

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
        metrics: what was logged last, of one number each. A mean over an epoch within which the fit was
            resumed is over the batches since, as Lightning logs it.
    """

    round: int
    sparsity: float
    alive: int
    total: int
    steps: int
    metrics: dict[str, float]


def with_round(
    history: list[RoundRecord], round: int, units: Masks, steps: int, metrics: dict[str, float]
) -> list[RoundRecord]:
    """The history and a row of this round, as it is now.

    A round that goes on in another fit has one row, so this one takes the place of that round's earlier row,
    whose metrics stay where nothing was logged since.
    """
    earlier = next((row.metrics for row in history if row.round == round), {})
    metrics = {**earlier, **metrics}
    left, total = alive(units), sum(mask.numel() for mask in units.values())
    sparsity = (total - left) / total if total else 0.0
    return [
        *(r for r in history if r.round < round),
        RoundRecord(round, sparsity, left, total, steps, metrics),
    ]
