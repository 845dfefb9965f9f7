"""Finished tickets: what a run left behind, and trainings that start from it, a round at a time."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate, to_absolute_path
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from typing_extensions import final, override

from lightning_prune.evidence import asked, call
from lightning_prune.files import replacing
from lightning_prune.masks import Masks
from lightning_prune.rewind import Snapshot
from lightning_prune.study.configs import load, plain
from lightning_prune.study.names import FREE
from lightning_prune.study.provenance import changed_since, made_of
from lightning_prune.study.records import Record, read, write
from lightning_prune.study.round_masks import masks_of
from lightning_prune.study.training import built, fit

log = logging.getLogger(__name__)

# Another version of these is said, and trains alike as a rule.
_FRAMEWORKS = ("lightning", "lightning_prune", "torch")
# In what a control may differ from the ticket: what it does with it, and what changes no numbers.
NOT_OF_TRAINING = (
    *(*FREE, "kind", "name", "oneshot", "order_seed", "pruner.rounds", "rounds", "run", "seed", "threads"),
)


@dataclass(frozen=True)
class Start:
    """What a training begins with: parameters and buffers by name, and the masks put on them."""

    tensors: dict[str, Tensor]
    masks: Masks


@dataclass(frozen=True)
class Ticket:
    """What a finished run left behind.

    Args:
        snapshot: the state that each of its rounds began with, but for the masks.
        steps: for which it trained after a rewind.
        masks: of each round that it trained.
    """

    snapshot: Snapshot
    steps: int
    masks: Mapping[int, Masks]

    @property
    def rounds(self) -> list[int]:
        """The rounds that it trained."""
        return list(self.masks)

    def start(self, round: int) -> Start:
        """What this round began with."""
        return Start(self.snapshot.tensors, self.masks[round])


def check(cfg: DictConfig) -> None:
    """Refuse controls of tickets whose rounds did not all begin with one state, before anything is trained.

    Such a ticket goes on from weights, or optimizers, of the round before, and these are not kept; or its
    rounds end at different steps, so that a control would be trained for longer or shorter.

    Raises:
        ValueError: then.
    """
    advice = "Give rewind=initialization, step or epoch, which the ticket then has, too."
    if not cfg.rewind:
        raise ValueError(
            f"rewind=none: kind={cfg.kind} trains from the state that the ticket rewound to, and this ticket "
            f"does not rewind. Allowed are tickets that go back to an early state. {advice}"
        )
    rewind: Any = instantiate(cfg.rewind)
    if "final" in asked(rewind.policy):
        raise ValueError(
            f"rewind.policy={_name(rewind.policy)}: kind={cfg.kind} trains from what each of the ticket's "
            "rounds began with, and under this policy that comes from the round before and is not kept. "
            f"Allowed are policies that go back to one early state, as everything does. {advice}"
        )
    if rewind.until is not None:
        raise ValueError(
            f"rewind.until={rewind.until}: kind={cfg.kind} trains as long as the ticket's rounds, and these "
            f"end at different steps. Allowed are rounds of one length. {advice}"
        )


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))


def finished(cfg: DictConfig) -> Ticket:
    """The ticket in the folder `cfg.ticket`.

    Raises:
        FileNotFoundError: when there is no finished run.
        ValueError: when its rounds did not all begin with one state, or it was trained in another way.
    """
    check(cfg)
    masks = finished_masks(cfg)
    _check_config(cfg)
    rewind: Any = instantiate(cfg.rewind)
    state = torch.load(_folder(cfg) / "final.ckpt", map_location="cpu", weights_only=True)["callbacks"]
    rewind.load_state_dict(state[rewind.state_key])
    behind = 0 if rewind.shorten is False else state[rewind.state_key]["behind"]  # rounds count steps
    return Ticket(call(rewind.policy, rewind.snapshot), cfg.steps_per_round - behind, masks)


def finished_masks(cfg: DictConfig) -> Mapping[int, Masks]:
    """The masks of the rounds that the run in the folder `cfg.ticket` trained.

    Raises:
        FileNotFoundError: when there is no finished run, or its masks are missing.
        ValueError: when the data, or the code that its config names, have changed since.
    """
    folder = _folder(cfg)
    if not (folder / "final.ckpt").is_file():
        raise FileNotFoundError(
            f"ticket={cfg.ticket}: there is no finished run. A control needs the ticket's: start the "
            "same command with kind=ticket first."
        )
    _check_sources(cfg, folder)
    masks = masks_of(folder)
    trained = {r["round"] for r in read(folder / "records.jsonl")[0]}
    if missing := sorted(trained - set(masks)):
        raise FileNotFoundError(
            f"ticket={cfg.ticket}: the masks of its rounds {missing} are not there. A control needs those of "
            f"every round. Delete {folder} and start the same command with kind=ticket first."
        )
    return masks


def _check_config(cfg: DictConfig) -> None:
    path = _folder(cfg) / "config.yaml"
    if not path.is_file():
        return
    there, here = plain(load(path), NOT_OF_TRAINING), plain(cfg, NOT_OF_TRAINING)
    if changed := sorted(k for k in {**there, **here} if there.get(k) != here.get(k)):
        shown = "; ".join(f"{k}: {there.get(k)} there, {here.get(k)} here" for k in changed[:5])
        raise ValueError(
            f"ticket={cfg.ticket}: it was trained in another way ({shown}). A control must differ from its "
            "ticket in one thing alone. Give the same options, or ticket=<a run that has them>."
        )


def _check_sources(cfg: DictConfig, folder: Path) -> None:
    changed = changed_since(folder, made_of(cfg))
    if own := [name for name in changed if name not in _FRAMEWORKS]:
        raise ValueError(
            f"ticket={cfg.ticket}: {', '.join(own)} has changed since it was made. A control must differ "
            f"from its ticket in one thing alone. Undo that change, or delete {folder} and give the same "
            "command again, which makes the ticket first."
        )
    if changed:
        log.warning("%s has changed since the ticket %s was made.", ", ".join(changed), folder)


def _folder(cfg: DictConfig) -> Path:
    return Path(to_absolute_path(cfg.ticket))


def each_round(
    cfg: DictConfig,
    folder: Path,
    there: Sequence[int],
    train_one: Callable[[int, Path], list[Record]],
    dense: bool = False,
) -> None:
    """Train a round at a time, each in a folder of its own; what is recorded already is done.

    Args:
        cfg: of the run.
        folder: of the run.
        there: the ticket's rounds; `cfg.controls_at` names some of them.
        train_one: trains a round in a folder, and returns its records.
        dense: whether round 0 is trained first in any case.
    """
    path = folder / "records.jsonl"
    done = {r["round"] for r in read(path)[0]}
    for round in chosen(cfg, there, dense):
        if round in done:
            continue
        own = folder / f"round-{round:02}"
        own.mkdir(exist_ok=True)
        write(path, sorted([*read(path)[0], *train_one(round, own)], key=lambda r: r["round"]))
        shutil.rmtree(own)


def chosen(cfg: DictConfig, there: Sequence[int], dense: bool = False) -> list[int]:
    """The rounds that a control trains.

    Raises:
        ValueError: when `controls_at` names others than there are.
    """
    rounds = there if cfg.controls_at is None else list(cfg.controls_at)
    if missing := sorted(set(rounds) - set(there)):
        raise ValueError(
            f"controls_at: the ticket's run has no rounds {missing}; it has {list(there)}. Allowed "
            "are these. Name some of them."
        )
    return sorted({*rounds, 0} if dense else set(rounds))


def train_from(
    cfg: DictConfig,
    folder: Path,
    task: LightningModule,
    round: int,
    steps: int,
    begin: "Begin | None" = None,
    order: int | None = None,
) -> None:
    """Train one round, from a start or from initialization, and record it as that round.

    Nothing is pruned, whatever the schedule says.
    """
    options: Any = OmegaConf.to_container(cfg.pruner, resolve=True)
    changed = {"schedule": {"_target_": "lightning_prune.schedules.Hold"}, "masks": None, "rounds": round}
    pruner = instantiate({**options, **changed})
    pruner.start_from(begin.masks if begin is not None else {}, round)
    callbacks: list[Callback] = [pruner]
    if begin is not None and not (folder / "resume.ckpt").is_file():
        callbacks = [begin, pruner]  # which puts the masks on what the other has begun with
    fit(cfg, folder, task, instantiate(cfg.batches), callbacks, steps, order)


def trained_from(
    cfg: DictConfig,
    folder: Path,
    round: int,
    steps: int,
    begin: "Begin",
    order: int | None = None,
) -> dict[str, Tensor]:
    """The state dict at the end of one round, which is trained by `train_from` unless the folder has it."""
    end = folder / "end.pt"
    if not end.is_file():
        folder.mkdir(exist_ok=True)
        train_from(cfg, folder, task := built(cfg), round, steps, begin, order)
        with replacing(end) as file:
            torch.save(task.state_dict(), file)
    return torch.load(end, weights_only=True)


@final
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
