"""Masks that grow at several densities: one training for each, side by side with a ticket's rounds."""

from pathlib import Path

from omegaconf import DictConfig

from lightning_prune.study import round_masks, training
from lightning_prune.study.records import Record, read
from lightning_prune.study.tickets import each_round


def train(cfg: DictConfig, folder: Path) -> None:
    """Train at `cfg.sparsity`, or once for each of `cfg.sparsities` that is above 0.

    The place of a sparsity in that list is the round under which its training is recorded. So it stands
    beside the round of a ticket whose schedule has the same list, and the dense network is the ticket's
    round 0.
    """
    if not cfg.sparsities:
        training.train(cfg, folder)
        return

    def train_one(round: int, own: Path) -> list[Record]:
        training.train(at(cfg, round), own)
        round_masks.save(folder, round, round_masks.masks_of(own)[0])
        return [{**record, "round": round} for record in read(own / "records.jsonl")[0]]

    each_round(cfg, folder, rounds_of(cfg), train_one)


def at(cfg: DictConfig, round: int) -> DictConfig:
    """The config of the training that is recorded under a round."""
    this = cfg.copy()
    this.sparsity = cfg.sparsities[round] if cfg.sparsities else cfg.sparsity
    return this


def steps_of(cfg: DictConfig) -> dict[int, int]:
    """How many steps the trainings have, by the round under which each is recorded."""
    return {k: (at(cfg, k).rounds + 1) * cfg.steps_per_round for k in rounds_of(cfg)}


def as_dense(sparsity: float) -> int:
    """How many rounds after the first give a sparse training the multiply-adds of a dense one's first.

    A step of a network of linear layers costs as many as weights are alive.

    >>> as_dense(0.8), as_dense(0.98)
    (4, 49)
    """
    return round(1 / (1 - sparsity)) - 1


def rounds_of(cfg: DictConfig) -> list[int]:
    """Under which rounds the trainings of a run are recorded.

    >>> rounds_of(DictConfig({"sparsities": [0.0, 0.8, 0.9]})), rounds_of(DictConfig({"sparsities": None}))
    ([1, 2], [0])
    """
    return [k for k, sparsity in enumerate(cfg.sparsities) if sparsity > 0] if cfg.sparsities else [0]
