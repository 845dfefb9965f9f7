"""Train a network round by round: what `lightning-prune run` does unless a config names something else."""

import logging
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig
from torch.nn.functional import cross_entropy
from typing_extensions import final, override

from lightning_prune.callbacks import _lightning
from lightning_prune.study.configs import build, plain
from lightning_prune.study.mask_images import MaskImages
from lightning_prune.study.objective import Objective
from lightning_prune.study.oneshot import sweep
from lightning_prune.study.progress import ExperimentProgress, lines_above
from lightning_prune.study.provenance import content
from lightning_prune.study.recording import Records
from lightning_prune.study.records import read, write
from lightning_prune.study.shared_rounds import dense_round
from lightning_prune.study.tasks import Classification


def train(cfg: DictConfig, folder: Path) -> None:
    """Train in a folder, going on from its checkpoint if there is one; prune the result once if asked to.

    The folder then holds `records.jsonl`, the masks of each round and the checkpoints.
    """
    batches, task = build(cfg, "batches"), built(cfg)
    fits(cfg, task, batches)
    pruner, *others = _callbacks(cfg)
    dense = dense_round(cfg, folder, pruner, content(batches, plain(cfg.batches)))
    callbacks: list[Callback] = [pruner, *others, *([dense] if dense else []), Final(folder / "final.ckpt")]
    if cfg.objective is not None and not cfg.oneshot:  # else it is a metric of what comes after the training
        callbacks.append(Objective(cfg.objective, cfg.monitor))
    with dense.shared(folder, folder / "resume.ckpt") if dense else nullcontext():
        fit(cfg, folder, task, batches, callbacks, (cfg.rounds + 1) * cfg.steps_per_round)
    if cfg.oneshot:
        methods = instantiate(cfg.oneshot, _convert_="all")
        _, test = batches.val_dataloader()
        path = folder / "records.jsonl"
        trained = [r for r in read(path)[0] if r["kind"] not in methods]
        write(path, trained + sweep(task, methods, test, cfg.seed))


def built(cfg: DictConfig) -> Any:
    """The network on its task, at the initialization of the run's seed."""
    seed_everything(cfg.seed, verbose=False)
    return build(cfg, "task")


def fits(cfg: DictConfig, task: Any, batches: Any) -> None:
    """Refuse a network that cannot take the data, before anything is trained.

    Raises:
        ValueError: naming both.
    """
    if not isinstance(task, Classification):
        return  # what another module does with a batch is its own
    training = task.training
    try:
        with isolate_rng(), torch.no_grad():
            x, y = (tensor[:2] for tensor in next(iter(batches.train_dataloader())))
            cross_entropy(task.eval()(x), y)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"model={cfg.model.get('_target_')}, data={cfg.data.get('_target_')}: the network and batches of "
            f"these data do not go together ({str(error).splitlines()[0]}). They must. Choose those that do: "
            "data=mnist1d for model=residual_mlp, data=mnist for model=lenet and deep_ffn, data=cifar10 for "
            "the convolutional ones; batches.augment=null for what is no image."
        ) from error
    finally:
        task.train(training)


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
        folder: that gets `records.jsonl`, the masks of each round and `resume.ckpt`.
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
        Records(folder, cfg.kind, cfg.seed, cfg.evaluate_every, cfg.monitor),
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
    logger: Any = False
    if cfg.logger:
        logger = instantiate(cfg.logger, save_dir=str(folder / cfg.logger.get("save_dir", ".")))
    options: dict[str, Any] = {"logger": logger}
    if not isinstance(task, Classification):
        options["num_sanity_val_steps"] = 1  # whether it logs what is monitored is seen before training
    trainer = _trainer(cfg, callbacks, steps, **options)
    seed_everything(cfg.order_seed if order is None else order, verbose=False)
    with lines_above(get_class(cfg.progress) if cfg.progress else None):
        try:
            trainer.fit(task, batches, ckpt_path=str(checkpoint) if checkpoint.is_file() else None)
        finally:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()  # else the next run of a sweep would be logged in this one
    return trainer


@final
class Final(Callback):
    """A checkpoint when all is trained, from the process that trained it.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


@final
class Quick(Callback):
    """Trains a `Classification` with `PlainSteps` where Lightning's own steps would come to the same."""

    def __init__(self) -> None:
        self._steps: _lightning.PlainSteps | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, Classification) and _lightning.trains_plainly(trainer):
            self._steps = _lightning.PlainSteps(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._steps is not None:
            self._steps.leave()
            self._steps = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


@final
class Until(Callback):
    """Ends a training.

    Args:
        step: after which.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = trainer.global_step >= self.step


@dataclass(frozen=True)
class Cost:
    """What a training costs: time a step, evaluations included, and the size of a checkpoint."""

    seconds_per_step: float
    checkpoint_bytes: int


def trial(cfg: DictConfig) -> Cost:
    """Train until the first evaluation, to see what it costs."""
    hush()
    torch.set_num_threads(cfg.threads)
    task, timer = built(cfg), Timer()
    steps = min(cfg.evaluate_every, cfg.steps_per_round)
    whole = (cfg.rounds + 1) * cfg.steps_per_round  # of which updates of masks that grow are a part
    trainer = _trainer(
        cfg, [*_callbacks(cfg), timer, Until(steps)], whole, logger=False, enable_checkpointing=False
    )
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the fit ended in round")  # so short is a trial
        trainer.fit(task, instantiate(cfg.batches))
        trainer.save_checkpoint(Path(folder, "trial.ckpt"))
        return Cost(timer.time_elapsed("train") / steps, Path(folder, "trial.ckpt").stat().st_size)


def _callbacks(cfg: DictConfig) -> list[Any]:
    return [instantiate(cfg.pruner), *([instantiate(cfg.rewind)] if cfg.rewind else [])]


def _trainer(cfg: DictConfig, callbacks: list[Callback], steps: int, **options: Any) -> Trainer:
    given: dict[str, Any] = {"callbacks": [*callbacks, Quick()], "max_steps": steps}
    trainer: Trainer = instantiate(cfg.trainer, **given, **options)
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        raise ValueError(
            f"trainer.strategy={cfg.trainer.get('strategy')}: it would start this command anew for every "
            "device. Allowed are strategies whose processes end with the run. Give trainer=ddp, which is "
            "ddp_fork, or trainer=fsdp2."
        )
    return trainer


def hush() -> None:
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
