"""The callback that writes, while an experiment trains, a record and the masks of each round."""

import re
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import final, override

from lightning_prune.callbacks.growing import DynamicSparseTraining
from lightning_prune.callbacks.masked import MaskedTraining
from lightning_prune.masks import Masks
from lightning_prune.shards import whole
from lightning_prune.study import round_masks
from lightning_prune.study.records import curve, described, read, summary, write

_OF_EVALUATION = re.compile(r"(val|valid|validation|test)[_/.-]")
VERSION = 2  # of the state in checkpoints; 1 held how many prunings each weight survived


@final
class Records(Callback):
    """Append a line to `records.jsonl` when a round has been trained, and say when it is evaluated.

    Every so many steps of a round, and at its end, wherever that lies on Lightning's own grid of batches. The
    masks of a round are written to a file of their own when it begins; `round_masks` reads them. A training
    whose masks grow is one round; its line and masks are those of its end, and the line's metrics say
    `explored`, the fraction of the weights that was ever alive.

    A line: round, kind, seed, sparsity, alive, total, layers {name: density}, metrics, curve {metric: its
    values at the steps of the round's evaluations}, seconds. Early stopping is read off the evaluations of
    the round, not done: `early_stop_step` is the step of minimum validation loss (the first of equals) and
    `censored` says that it is the round's last evaluation. Accuracies are fractions.

    Args:
        folder: of the run.
        kind: ticket, reinit, random, ...
        seed: of the run.
        evaluate_every: steps.
        monitor: a metric of the evaluations: a round is at its best where this is lowest.
    """

    def __init__(
        self, folder: str | Path, kind: str, seed: int, evaluate_every: int, monitor: str = "val_loss"
    ) -> None:
        self.path = Path(folder) / "records.jsonl"
        self.kind, self.seed, self.evaluate_every, self.monitor = kind, seed, evaluate_every, monitor
        self._round: dict[str, Any] = {}
        self._evaluations: list[dict[str, float]] = []
        self._began = 0
        self._seconds = 0.0
        self._since = time.monotonic()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruner = pruner_of(trainer)
        if not self._round:
            self._round = described(0 if grows(pruner) else pruner.round, pruner.masks)
        self._since = time.monotonic()
        if trainer.is_global_zero:
            # A killed run may have finished rounds after its last checkpoint: they are trained again.
            write(self.path, [r for r in read(self.path)[0] if r["round"] < self._round["round"]])
        self._save(trainer, self._round["round"], pruner.masks)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step - self._began, self.evaluate_every
        last = self._evaluations[-1]["step"] if self._evaluations else 0
        ends = trainer.global_step == trainer.max_steps
        if not grows(pruner := pruner_of(trainer)):
            ends = ends or pruner.is_over(trainer)
        now = step > last and (ends or step // every > last // every)  # a step may take several batches
        trainer.val_check_batch = 1 if now else sys.maxsize  # of the batches: every one, or none

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = evaluated(trainer, self.monitor)
        if self.monitor not in found:
            raise ValueError(
                f"monitor={self.monitor}: no evaluation logs it. Allowed is what one does: "
                f"{', '.join(sorted(found)) or 'nothing yet'}. Give one of these, or "
                "log it in validation_step."
            )
        if trainer.sanity_checking:
            return
        self._evaluations.append({"step": trainer.global_step - self._began, **found})

    def on_prune(self, trainer: Trainer, pl_module: LightningModule, masks: Masks) -> None:
        """Write the line of the round that is over, and the masks of the one that begins."""
        if grows(pruner_of(trainer)):
            return  # an update: the round goes on
        if pruner_of(trainer).round != self._round["round"]:  # else round 0 is pruned before its first step
            self._finish(trainer)
        self._round = described(pruner_of(trainer).round, masks)
        self._began = trainer.global_step
        self._save(trainer, self._round["round"], masks)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last line, if the run was killed between its last checkpoint and that line.

        There is nothing left to train then, and Lightning skips the hooks of training.
        """
        written = {r["round"] for r in read(self.path)[0]}
        if self._round and self._round["round"] not in written:
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        metrics = summary(self._evaluations, self.monitor)
        if isinstance(pruner := pruner_of(trainer), DynamicSparseTraining):
            metrics["explored"] = pruner.explored
            self._round = described(0, pruner.masks)
            self._save(trainer, 0, pruner.masks)
        seconds = self._seconds + time.monotonic() - self._since
        record = {
            "kind": self.kind,
            "seed": self.seed,
            **self._round,
            "metrics": metrics,
        }
        record |= {"curve": curve(self._evaluations), "seconds": round(seconds, 3)}
        if trainer.is_global_zero:
            write(self.path, [*read(self.path)[0], record])
        self._evaluations, self._seconds, self._since = [], 0.0, time.monotonic()

    def _save(self, trainer: Trainer, round: int, masks: Masks) -> None:
        # where masks are sharded, all processes put them together
        wholes = {name: whole(mask) for name, mask in masks.items()}
        if trainer.is_global_zero:
            round_masks.save(self.path.parent, round, wholes)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "round": self._round,
            "evaluations": self._evaluations,
            "began": self._began,
            "seconds": self._seconds + time.monotonic() - self._since,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (version := state_dict.get("version", 1)) != VERSION:
            raise ValueError(
                f"ckpt_path: the checkpoint holds records of version {version}; allowed is version "
                f"{VERSION}, which cannot go on from another. Delete {self.path.parent} and start the run "
                "again."
            )
        self._round = state_dict["round"]
        self._evaluations = list(state_dict["evaluations"])
        self._began = state_dict["began"]
        self._seconds = state_dict["seconds"]
        self._since = time.monotonic()


def evaluated(trainer: Trainer, monitor: str) -> dict[str, float]:
    """The metrics of the last evaluation: those of the splits, and what is monitored."""
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name == monitor or _OF_EVALUATION.match(name)
    }


def pruner_of(trainer: Trainer) -> MaskedTraining:
    """The callback of a trainer that prunes, or whose masks grow."""
    return next(c for c in trainer.callbacks if isinstance(c, MaskedTraining))  # type: ignore[attr-defined]


def grows(pruner: MaskedTraining) -> bool:
    """Whether its rounds are updates of the masks of one training, not trainings of their own."""
    return isinstance(pruner, DynamicSparseTraining)
