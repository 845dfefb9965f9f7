"""Train a network round by round: what `experiments.run` does unless a config names something else."""

import logging
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from omegaconf import DictConfig
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments.dense import dense_round
from experiments.oneshot import sweep
from experiments.pictures import MaskImages
from experiments.progress import ExperimentProgress
from experiments.records import Records, read, write
from experiments.sweeps import Checkpoints


def train(cfg: DictConfig, folder: Path) -> None:
    """Train in a folder, going on from its checkpoint if there is one; prune the result once if asked to.

    The folder then holds `records.jsonl`, `survived.pt` and the checkpoints.
    """
    batches, task = _made(cfg)
    checkpoint = folder / "resume.ckpt"
    pruner = instantiate(cfg.pruner)
    callbacks = [
        pruner,
        *([instantiate(cfg.rewind)] if cfg.rewind else []),
        Records(folder, cfg.kind, cfg.seed),
        ModelCheckpoint(
            folder,
            checkpoint.stem,
            every_n_epochs=cfg.checkpoint_every_n_epochs,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
        *([ExperimentProgress(cfg.kind, get_class(cfg.progress))] if cfg.progress else []),
        *([MaskImages()] if cfg.logger else []),
    ]
    logger = instantiate(cfg.logger, save_dir=str(folder)) if cfg.logger else False
    steps = (cfg.rounds + 1) * cfg.steps_per_round
    trainer = _trainer(cfg, callbacks, logger=logger, max_steps=steps)
    with ExitStack() as stack:
        # The generators of the other ranks are in no checkpoint, so only a training on one device is shared.
        if trainer.world_size == 1 and (dense := dense_round(cfg, folder, pruner)):
            trainer.callbacks.insert(0, dense)  # type: ignore[attr-defined]
            stack.callback(dense.release)
            dense.begin(folder, checkpoint)
        stack.enter_context(logging_redirect_tqdm())  # lines of the log appear above the bar
        trainer.fit(task, batches, ckpt_path=str(checkpoint) if checkpoint.is_file() else None)
    if cfg.oneshot:
        methods = instantiate(cfg.oneshot, _convert_="all")
        _, test = batches.val_dataloader()
        path = folder / "records.jsonl"
        trained = [r for r in read(path)[0] if r["kind"] not in methods]
        write(path, trained + sweep(task, methods, test, cfg.seed))


@dataclass(frozen=True)
class Cost:
    """What a training costs: time a step, evaluations included, and the size of a checkpoint."""

    seconds_per_step: float
    checkpoint_bytes: int


def trial(cfg: DictConfig) -> Cost:
    """Train until the first evaluation, to see what it costs."""
    torch.set_num_threads(cfg.threads)
    batches, task = _made(cfg)
    callbacks = [
        instantiate(cfg.pruner),
        *([instantiate(cfg.rewind)] if cfg.rewind else []),
        timer := Timer(),
    ]
    steps = min(cfg.evaluate_every, cfg.steps_per_round)
    trainer = _trainer(cfg, callbacks, logger=False, max_steps=steps, enable_checkpointing=False)
    with TemporaryDirectory() as folder:
        trainer.fit(task, batches)
        trainer.save_checkpoint(Path(folder, "trial.ckpt"))
        return Cost(timer.time_elapsed("train") / steps, Path(folder, "trial.ckpt").stat().st_size)


def _made(cfg: DictConfig) -> tuple[LightningDataModule, LightningModule]:
    _hush()
    batches = instantiate(cfg.batches)
    seed_everything(cfg.seed + cfg.init_offset, verbose=False)
    task = instantiate(cfg.task)
    seed_everything(cfg.seed, verbose=False)  # data order: the same for a ticket and its controls
    return batches, task


def _trainer(cfg: DictConfig, callbacks: list[Callback], **options: Any) -> Trainer:
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, plugins=[Checkpoints()], **options)
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        raise ValueError(
            f"trainer.strategy={cfg.trainer.get('strategy')}: it would start this command anew for every "
            "device. Allowed are strategies whose processes end with the run: ddp_spawn (trainer=ddp), ddp_fork."
        )
    return trainer


def _hush() -> None:
    """Silence what Lightning advises and these experiments do on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # batches are sliced from memory
        ".*Checkpoint directory .* exists and is not empty.*",  # the run's own folder
        ".*The dirpath has changed from .*",  # a dense round that another run has trained
        ".*callbacks used to create the checkpoint need to be provided.*",  # a bar, pictures
        ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 on torch 2.14
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)
