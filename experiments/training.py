"""Train a network round by round: what `experiments.run` does unless a config names something else."""

import logging
import warnings
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments.oneshot import sweep
from experiments.progress import ExperimentProgress
from experiments.records import Records, read, write


def train(cfg: DictConfig, folder: Path) -> None:
    """Train in a folder, going on from its checkpoint if there is one; prune the result once if asked to.

    The folder then holds `records.jsonl`, `survived.pt` and the checkpoints.
    """
    batches, task = instantiate(cfg.batches), built(cfg)
    callbacks = [instantiate(cfg.pruner), *([instantiate(cfg.rewind)] if cfg.rewind else [])]
    trainer = fit(cfg, folder, task, batches, callbacks, (cfg.rounds + 1) * cfg.steps_per_round)
    if cfg.oneshot:
        methods = instantiate(cfg.oneshot, _convert_="all")
        _, test = batches.val_dataloader()
        path = folder / "records.jsonl"
        trained = [r for r in read(path)[0] if r["kind"] not in methods]
        write(path, trained + sweep(task, methods, test, cfg.seed))
    trainer.save_checkpoint(folder / "final.ckpt")


def built(cfg: DictConfig) -> Any:
    """The network on its task, at the initialization of the run's seed."""
    seed_everything(cfg.seed, verbose=False)
    return instantiate(cfg.task)


def fit(
    cfg: DictConfig,
    folder: Path,
    task: LightningModule,
    batches: LightningDataModule,
    callbacks: list[Callback],
    steps: int,
    order: int | None = None,
) -> Trainer:
    """Train in a folder, going on from its checkpoint if there is one, and write the records of the rounds.

    Args:
        cfg: of the run.
        folder: that gets `records.jsonl`, `survived.pt` and `resume.ckpt`.
        task: what is trained.
        batches: on what.
        callbacks: the pruning callback, and what goes with it.
        steps: of the optimizer, in all.
        order: seed of the data order (and of dropout); None: that of the run.
    """
    hush()
    checkpoint = folder / "resume.ckpt"
    callbacks = [
        *callbacks,
        Records(folder, cfg.kind, cfg.seed),
        ModelCheckpoint(
            folder,
            checkpoint.stem,
            every_n_epochs=cfg.checkpoint_every_n_epochs,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
        *([ExperimentProgress(cfg.kind)] if cfg.progress else []),
    ]
    logger = instantiate(cfg.logger, save_dir=str(folder)) if cfg.logger else False
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=logger, max_steps=steps)
    seed_everything(cfg.seed if order is None else order, verbose=False)
    with logging_redirect_tqdm():  # lines of the log appear above the bar
        trainer.fit(task, batches, ckpt_path=str(checkpoint) if checkpoint.is_file() else None)
    return trainer


def hush() -> None:
    """Silence what Lightning advises and these experiments do on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # batches are sliced from memory
        ".*Checkpoint directory .* exists and is not empty.*",  # the run's own folder
        ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 on torch 2.14
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)
