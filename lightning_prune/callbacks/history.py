"""History: one row for each round that is over."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_prune.checks import number, whole
from lightning_prune.masks import Masks, alive
from lightning_prune.pruning import budget
from lightning_prune.tables import table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundRecord:
    """What a round was: a row of a callback's `history`.

    Args:
        round: its number; round 0 is the first.
        sparsity: fraction of the units that was dead in it.
        alive: number of units that were alive.
        total: number of units.
        steps: optimizer steps in it, of all fits that it took.
        metrics: what was logged last, of one number each. A mean over an epoch within which the fit was
            resumed is over the batches since, as Lightning logs it.
        best: the best value in it of what a `ModelCheckpoint` monitors that keeps the best of each round,
            None where none does.
        checkpoint: the file in which that one kept it; empty where none did.
        cut: whether an `EarlyStopping` ended it before it had its length.
    """

    round: int
    sparsity: float
    alive: int
    total: int
    steps: int
    metrics: dict[str, float]
    best: float | None = None
    checkpoint: str = ""
    cut: bool = False


def with_round(
    history: list[RoundRecord],
    round: int,
    units: Masks,
    steps: int,
    metrics: dict[str, float],
    kept: tuple[float | None, str] = (None, ""),
    cut: bool = False,
) -> list[RoundRecord]:
    """The history and a row of this round, as it is now.

    A round that goes on in another fit has one row, so this one takes the place of that round's earlier row,
    whose metrics, and best checkpoint, stay where nothing was logged, or kept, since.
    """
    earlier = next((row for row in history if row.round == round), None)
    if earlier is not None:
        metrics = {**earlier.metrics, **metrics}
        kept = kept if kept[1] else (earlier.best, earlier.checkpoint)
    left, total = alive(units), sum(mask.numel() for mask in units.values())
    sparsity = (total - left) / total if total else 0.0
    return [
        *(r for r in history if r.round < round),
        RoundRecord(round, sparsity, left, total, steps, metrics, *kept, cut),
    ]


@dataclass(frozen=True)
class _Line:
    round: int
    sparsity: str
    alive: int
    steps: int
    ended: str
    best: str
    checkpoint: str


def tell(history: Sequence[RoundRecord], units: str, monitor: str = "", schedules: bool = False) -> None:
    """Show the rows as a table, with the best of each round where some round has kept one.

    Args:
        history: the rows.
        units: what is alive or not: "weights" or "channels".
        monitor: the metric whose best value the rows have.
        schedules: whether learning rates went by a schedule, which patience may have cut.
    """
    lines = [
        _Line(
            row.round,
            f"{100 * row.sparsity:.2f} %",
            row.alive,
            row.steps,
            "by patience" if row.cut else "-",
            "-" if row.best is None else f"{row.best:.4g}",
            Path(row.checkpoint).name or "-",
        )
        for row in history
    ]
    kept = any(row.checkpoint for row in history)
    cut = [str(row.round) for row in history if row.cut]
    without = [*([] if cut else ["ended"]), *([] if kept else ["best", "checkpoint"])]
    best = f", best: {monitor}" if kept and monitor else ""
    log.info(table(f"the rounds (alive: {units}{best}):", lines, without=without).rstrip())
    if cut and schedules:
        log.info(
            f"EarlyStopping ended {'round' if len(cut) == 1 else 'rounds'} {', '.join(cut)} early, so the "
            "learning rate schedule did not come to its end there. Let patience be longer, or do without "
            "EarlyStopping."
        )


def best_checkpoint(history: Sequence[RoundRecord], round: int | None, sparsity: float | None) -> Path:
    """The file of the best checkpoint of a round, or of the first round that is as sparse as asked for.

    Raises:
        ValueError: when both are given, there is no such round, or it kept no file.
    """
    if round is not None and sparsity is not None:
        raise ValueError(f"round={round}, sparsity={sparsity}: allowed is one of them. Leave one out.")
    if sparsity is not None:
        number("sparsity", sparsity, "are fractions from 0 to 1, such as 0.9", lambda v: 0 <= v <= 1)
    if round is not None:
        whole("round", round, 0)
    if not history:
        raise ValueError(
            "best: no round is over yet; allowed is after a fit. Fit with a ModelCheckpoint that names its "
            "files by rounds: ModelCheckpoint(filename='{round:.0f}', monitor=<a metric>)."
        )
    rows = [
        row
        for row in history
        if (round is None or row.round == round)
        and (sparsity is None or row.alive <= budget(sparsity, row.total))
    ]
    if not rows:
        asked = (
            f"round={round}: there was no such round"
            if sparsity is None
            else f"sparsity={sparsity}: no round was so sparse"
        )
        there = ", ".join(f"{row.round} ({row.sparsity:.4f})" for row in history)
        raise ValueError(
            f"{asked}. Allowed are the rounds there were, here with their sparsities: {there}. Ask for one "
            "of these, or fit for longer."
        )
    row = rows[-1] if sparsity is None else rows[0]
    if not row.checkpoint:
        raise ValueError(
            f"round {row.round} has no checkpoint of its own. Allowed are rounds of a fit with a "
            "ModelCheckpoint that names its files by them. Add ModelCheckpoint(filename='{round:.0f}', "
            "monitor=<a metric>)."
        )
    return Path(row.checkpoint)
