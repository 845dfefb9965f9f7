"""Masks that grow at several densities: one training for each, side by side with a ticket's rounds."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
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


def longer(cfg: DictConfig, overrides: Sequence[str] | None = None) -> str | None:
    """What to say of a command that gives `rounds` to a kind whose masks grow; None where it does not.

    >>> rigl = DictConfig({"kind": "rigl", "grows": "rigl", "rounds": 1, "steps_per_round": 1500})
    >>> longer(rigl, ["rounds=1"])[:76]
    'rounds=1: masks of kind=rigl grow in one training, as long as 2 rounds (3000'

    Args:
        cfg: of a run.
        overrides: as on Hydra's command line; None: those of the command that runs.
    """
    if overrides is None:
        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    if (
        not cfg.get("grows")
        or not cfg.get("rounds")
        or not any(re.match(r"\+*rounds=", given) for given in overrides)
    ):
        return None
    steps = f" ({(cfg.rounds + 1) * cfg.steps_per_round} steps)" if cfg.get("steps_per_round") else ""
    return (
        f"rounds={cfg.rounds}: masks of kind={cfg.kind} grow in one training, as long as {cfg.rounds + 1} "
        f"rounds{steps}. For one as long as a round leave rounds out."
    )


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
