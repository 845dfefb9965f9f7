"""The dense round is trained once: runs that begin with the same one go on from its checkpoint."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from typing_extensions import final, override

from lightning_prune.callbacks.masked import MaskedTraining
from lightning_prune.callbacks.pruning import IterativeMagnitudePruning
from lightning_prune.evidence import asked
from lightning_prune.files import replacing
from lightning_prune.masks import Masks
from lightning_prune.study.configs import digest, plain
from lightning_prune.study.locks import locked
from lightning_prune.study.names import FREE, GROWTH
from lightning_prune.study.provenance import sources
from lightning_prune.study.recording import VERSION
from lightning_prune.study.records import read

# What a dense round does not depend on. A key that is not named here is taken to matter.
LATER = [
    *(*FREE, *GROWTH, "sparsities", "kind", "monitor", "name", "oneshot"),
    *("rounds", "rate", "output_rate", "schedule", "criterion", "allocation", "granularity"),
    *(f"pruner.{key}" for key in ("rounds", "schedule", "criterion", "allocate", "granularity")),
]


@final
class DenseRound(Callback):
    """Take over the checkpoint of a dense round like this one, or write it for those that follow.

    It is that of the last epoch that ends within the round: one from which training resumes to the same bits.
    Who trains the round holds a lock until then, and others wait for it.

    Args:
        path: of the checkpoint, named after what the round depends on.
        steps: length of the round.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        self._lock: FileLock | None = None

    @contextmanager
    def shared(self, folder: Path, resume: Path) -> Generator[None, None, None]:
        """Make `resume` the shared checkpoint if there is one and the run in `folder` is not beyond it."""
        try:
            if not read(folder / "records.jsonl")[0]:
                self._lock = locked(self.path.with_suffix(".lock"), "the dense round")
                if self.path.is_file():
                    with self.path.open("rb") as shared, replacing(resume) as file:
                        shutil.copyfileobj(shared, file)
                    self.release()
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Let the others go on."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.num_training_batches > self.steps:
            self.release()  # no epoch ends within the round

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._lock is not None and trainer.global_step + trainer.num_training_batches > self.steps:
            trainer.save_checkpoint(self.path)
            self.release()

    def on_prune(self, trainer: Trainer, pl_module: LightningModule, masks: Masks) -> None:
        """The round is over, whatever it left."""
        self.release()


def dense_round(cfg: DictConfig, folder: Path, pruner: MaskedTraining, data: str) -> DenseRound | None:
    """The dense round of a run, if others may share it.

    It is shared by what starts from the same weights, data, order and settings on one device, whatever it
    prunes later. The generators of other devices are in no checkpoint.

    Args:
        cfg: of the run.
        folder: of the run.
        pruner: what it prunes with.
        data: a digest of the data.
    """
    if not isinstance(pruner, IterativeMagnitudePruning):
        return None
    schedules = pruner.schedule.values() if isinstance(pruner.schedule, dict) else [pruner.schedule]
    if any(asked(schedule) or schedule(0) > 0 for schedule in schedules):
        return None
    devices = cfg.trainer.get("devices", 1 if cfg.trainer.accelerator == "cpu" else "auto")
    if str(devices) != "1" or cfg.trainer.get("num_nodes", 1) != 1:
        return None
    if cfg.rewind and cfg.rewind.get("until"):
        return None  # its end depends on what would be pruned
    depends: dict[str, Any] = plain(cfg, without=LATER)
    depends["sources"] = sources(plain(cfg, without=LATER))
    depends["data"] = data
    depends["version of the records"] = VERSION
    depends["keeps the initial weights"] = "initial" in asked(pruner.criterion)
    return DenseRound(folder.parents[1] / ".dense" / f"{digest(depends)}.ckpt", cfg.steps_per_round)
