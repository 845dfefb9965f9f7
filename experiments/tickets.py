"""Finished tickets: what a run left behind, and trainings that start from it, a round at a time."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate, to_absolute_path
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from torch import Tensor
from typing_extensions import override

from experiments.records import Record, read, write
from experiments.statistics import masks_of
from experiments.training import fit
from lightning_prune.masks import Masks
from lightning_prune.rewind import Snapshot


@dataclass(frozen=True)
class Start:
    """What a training begins with: parameters and buffers by name, and the masks put on them."""

    tensors: dict[str, Tensor]
    masks: Masks


@dataclass(frozen=True)
class Ticket:
    """What a finished run left behind.

    Args:
        snapshot: the state that it rewound to.
        steps: for which it trained after a rewind.
        survived: how many prunings each weight survived.
        rounds: those that it trained.
    """

    snapshot: Snapshot
    steps: int
    survived: dict[str, Tensor]
    rounds: list[int]

    def start(self, round: int) -> Start:
        """What this round began with."""
        return Start(self.snapshot.tensors, masks_of(self.survived, round))


def finished(cfg: DictConfig) -> Ticket:
    """The ticket in the folder `cfg.ticket`.

    Raises:
        FileNotFoundError: when there is no finished run.
        ValueError: when it did not rewind.
    """
    folder = Path(to_absolute_path(cfg.ticket))
    if not (folder / "final.ckpt").is_file():
        raise FileNotFoundError(
            f"ticket={cfg.ticket}: there is no finished run. A control starts from the ticket's: start the "
            "same command with kind=ticket first."
        )
    if not cfg.rewind:
        raise ValueError(
            f"ticket={cfg.ticket}: it did not rewind, so a control has nothing to start from. Choose an "
            "experiment, or a rewind, that goes back to an early step."
        )
    rewind: Any = instantiate(cfg.rewind)
    state = torch.load(folder / "final.ckpt", map_location="cpu", weights_only=True)["callbacks"]
    rewind.load_state_dict(state[rewind.state_key])
    return Ticket(
        rewind.snapshot,
        cfg.steps_per_round - (state[rewind.state_key]["behind"] if rewind.shorten else 0),
        torch.load(folder / "survived.pt", map_location="cpu", weights_only=True),
        sorted(r["round"] for r in read(folder / "records.jsonl")[0]),
    )


def each_round(
    cfg: DictConfig,
    folder: Path,
    ticket: Ticket,
    train_one: Callable[[int, Path], list[Record]],
    dense: bool = False,
) -> None:
    """Train a round at a time, each in a folder of its own; what is recorded already is done."""
    rounds = ticket.rounds if cfg.controls_at is None else list(cfg.controls_at)
    if missing := sorted(set(rounds) - set(ticket.rounds)):
        raise ValueError(f"controls_at: the ticket's run has no rounds {missing}; it has {ticket.rounds}.")
    path = folder / "records.jsonl"
    for round in sorted({*rounds, 0} if dense else rounds):
        records, _ = read(path)
        if any(r["round"] == round for r in records):
            continue
        own = folder / f"round-{round:02}"
        own.mkdir(exist_ok=True)
        trained = train_one(round, own)
        if not trained:  # it was killed after its last checkpoint and before its record
            shutil.rmtree(own)
            own.mkdir()
            trained = train_one(round, own)
        records += trained
        write(path, sorted(records, key=lambda r: r["round"]))
        shutil.rmtree(own)


def train_from(
    cfg: DictConfig,
    folder: Path,
    task: LightningModule,
    round: int,
    steps: int,
    begin: "Begin | None" = None,
    order: int | None = None,
) -> None:
    """Train one round, from a start or from initialization, and record it as that round."""
    pruner = instantiate(cfg.pruner)
    pruner.round = round
    callbacks: list[Callback] = [pruner]
    if begin is not None:
        pruner.masks = begin.masks
        if not (folder / "resume.ckpt").is_file():
            callbacks = [begin, pruner]  # which puts the masks on what the other has begun with
    fit(cfg, folder, task, instantiate(cfg.batches), callbacks, steps, order)


class Begin(Callback):
    """Training begins with this start.

    Learning rates and their schedules go on from the snapshot, and so does the rest of the optimizers' state,
    unless the weights are others.

    Args:
        start: what the control made of the ticket's.
        snapshot: the ticket's.
    """

    def __init__(self, start: Start, snapshot: Snapshot) -> None:
        self.masks = start.masks
        self._state = replace(snapshot, tensors=start.tensors, averages=[])
        if start.tensors is not snapshot.tensors:
            without = [{**optimizer, "state": {}} for optimizer in snapshot.optimizers]
            self._state = replace(self._state, optimizers=without)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._state.restore(pl_module, trainer.optimizers, schedulers)
