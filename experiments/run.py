"""Run an experiment from its config.

`python -m experiments.run experiment=lenet_mnist kind=ticket seed=1`, or `--multirun` with lists of values.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate, to_absolute_path
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments.oneshot import sweep
from experiments.progress import ExperimentProgress
from experiments.records import Records, read, write

log = logging.getLogger(__name__)

# What does not change the numbers of a run may differ when it is resumed.
_FREE = ("progress", "runs", "claims", "hydra")


def run(cfg: DictConfig) -> Path:
    """Train one experiment in its folder; a run that was interrupted goes on, a finished one is left alone.

    Returns:
        The folder, with `config.yaml`, `records.jsonl`, `survived.pt` and the checkpoint.
    """
    folder = Path(to_absolute_path(f"{cfg.runs}/{cfg.name}/{cfg.kind}-{cfg.seed}"))
    folder.mkdir(parents=True, exist_ok=True)
    config, done = folder / "config.yaml", folder / "DONE"
    if config.is_file():
        _same_config(OmegaConf.load(config), cfg, folder)
    resolved = OmegaConf.to_yaml(cfg, resolve=True)
    config.with_suffix(".tmp").write_text(resolved)
    config.with_suffix(".tmp").replace(config)
    if done.is_file():
        log.info("%s is finished already; delete it to run it again.", os.path.relpath(folder))
        return folder

    _hush()
    torch.set_num_threads(cfg.threads)
    batches = instantiate(cfg.batches)
    seed_everything(cfg.seed + cfg.init_offset, verbose=False)
    task = instantiate(cfg.task)
    seed_everything(cfg.seed, verbose=False)  # data order: the same for a ticket and its controls
    checkpoint = folder / "resume.ckpt"
    callbacks = [
        instantiate(cfg.pruner),
        *([instantiate(cfg.rewind)] if cfg.rewind else []),
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
    steps = (cfg.rounds + 1) * cfg.steps_per_round
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=logger, max_steps=steps)
    with logging_redirect_tqdm():  # lines of the log appear above the bar
        trainer.fit(task, batches, ckpt_path=str(checkpoint) if checkpoint.is_file() else None)
    if cfg.oneshot:
        methods = instantiate(cfg.oneshot, _convert_="all")
        _, test = batches.val_dataloader()
        path = folder / "records.jsonl"
        trained = [r for r in read(path)[0] if r["kind"] not in methods]
        write(path, trained + sweep(task, methods, test, cfg.seed))
    trainer.save_checkpoint(folder / "final.ckpt")
    done.touch()
    log.info("written: %s", os.path.relpath(folder))
    return folder


def _same_config(there: Any, here: DictConfig, folder: Path) -> None:
    old, new = (_flat(OmegaConf.to_container(c, resolve=True)) for c in (there, here))
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k) and k.split(".")[0] not in _FREE]
    if changed:
        shown = "; ".join(f"{k}: {old.get(k)} there, {new.get(k)} now" for k in sorted(changed)[:5])
        raise ValueError(
            f"{os.path.relpath(folder)} holds a run of another config ({shown}). "
            "Set runs=<another folder> or name=<another name>, or delete that folder."
        )


def _flat(node: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        k: v for key, child in node.items() for k, v in _flat(child, f"{prefix}.{key}".lstrip(".")).items()
    }


def _hush() -> None:
    """Silence what Lightning advises and these experiments do on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # batches are sliced from memory
        ".*Checkpoint directory .* exists and is not empty.*",  # the run's own folder
        ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 on torch 2.14
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """The entry that Hydra wraps."""
    run(cfg)


if __name__ == "__main__":
    main()
