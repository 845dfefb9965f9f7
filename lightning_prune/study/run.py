"""Run an experiment from its config.

`lightning-prune run experiment=lenet_mnist kind=ticket seed=1`, or `--multirun` with lists of values.
`lightning-prune plan` says what there is to do, and does nothing. The same command again skips the runs that
are finished, goes on with those that were interrupted and starts those anew that failed.
"""

import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig, OmegaConf

from lightning_prune.checks import number, whole
from lightning_prune.files import write
from lightning_prune.growth import updates_before
from lightning_prune.study import controls
from lightning_prune.study.configs import CONF, build, digest, load, plain
from lightning_prune.study.densities import as_dense, longer
from lightning_prune.study.locks import locked, sync
from lightning_prune.study.names import FREE, GROWTH, variant
from lightning_prune.study.objective import objective
from lightning_prune.study.plan import Plan
from lightning_prune.study.provenance import changed_since, made_of, provenance
from lightning_prune.study.reading import unread
from lightning_prune.study.records import lost, read

log = logging.getLogger(__name__)

_WITH_VALUE = (
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--package",
    "-p",
    "--info",
)
_FOR_PLANS = ("hydra.searchpath", "hydra/sweeper", "hydra.sweeper")  # of what is said of Hydra itself
_APART = (*FREE, *GROWTH)  # of a config, when two runs are compared
_KEPT = (".hydra", ".lock", "run.log")  # of a run that is started anew


OmegaConf.register_new_resolver(
    "workers", lambda threads: max(1, (os.cpu_count() or 1) // threads), replace=True
)


def schedule_steps(grows: str | None, rounds: int, steps_per_round: int | None) -> int | None:
    """How long a learning rate schedule lasts: a round, or all of a training whose masks grow.

    >>> schedule_steps(None, 4, 1500), schedule_steps("rigl", 4, 1500)
    (1500, 7500)
    """
    return (rounds + 1) * steps_per_round if grows and steps_per_round else steps_per_round


def updates(rounds: int, steps_per_round: int | None, every: int) -> int | None:
    """How many updates a training has whose masks grow for three quarters of its steps.

    >>> updates(0, 1500, 100)
    11
    """
    if steps_per_round is None:
        return None  # nothing is trained
    return max(1, updates_before(int(0.75 * (rounds + 1) * steps_per_round), every))


OmegaConf.register_new_resolver("updates", updates, replace=True)
OmegaConf.register_new_resolver("schedule_steps", schedule_steps, replace=True)
OmegaConf.register_new_resolver("as_dense", as_dense, replace=True)


def run(cfg: DictConfig) -> Path:
    """Run one experiment in its folder; one that was interrupted goes on, a finished one is left alone.

    One process at a time: whoever comes second waits, and then finds it finished.

    Returns:
        The folder, with `config.yaml`, `run.json` (what the run was made with), `records.jsonl` and, after a
        training, its checkpoints. `DONE` says that all of these are on the disk, and holds the hash of the
        config; `FAILED` holds the error that ended a run.
    """
    folder = folder_of(cfg)
    lock = locked(folder / ".lock", os.path.relpath(folder))
    try:
        _run(cfg, folder)
    finally:
        lock.release()
        gc.collect()  # a Trainer and its callbacks refer to each other, and would keep the data
    return folder


def folder_of(cfg: DictConfig) -> Path:
    """Where a run lies."""
    return Path(to_absolute_path(cfg.folder))


def state_of(cfg: DictConfig) -> str:
    """How far a run is: new, interrupted, failed or finished.

    Raises:
        ValueError: when its folder holds the run of another config.
    """
    folder, config = folder_of(cfg), plain(cfg, _APART)
    if (folder / "FAILED").is_file():
        return "failed"
    if not (folder / "config.yaml").is_file():
        return "new"
    there = plain(load(folder / "config.yaml"), _APART)
    if changed := sorted(k for k in {**there, **config} if there.get(k) != config.get(k)):
        shown = "; ".join(f"{k}: {there.get(k)!r} there, {config.get(k)!r} now" for k in changed[:5])
        raise ValueError(
            f"{os.path.relpath(folder)} holds a run of another config ({shown}). "
            "A folder is allowed one run. Set runs=<another folder> or name=<another name>, or delete "
            "that folder."
        )
    if not (folder / "DONE").is_file():
        return "interrupted"
    if (folder / "DONE").read_text().strip() not in ("", digest(config)):
        raise ValueError(
            f"{os.path.relpath(folder)}/DONE is that of another config; it must be that of this one. "
            "Delete it to go on with the run from its last checkpoint, or delete the folder."
        )
    return "finished"


def check(cfg: DictConfig) -> None:
    """Refuse what else nobody looks at before the training.

    Raises:
        ValueError: naming the key.
    """
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(
            f"{', '.join(missing)}: the options that were chosen leave this open, and it is needed. Give "
            "it a value: "
            f"{' '.join(f'{key}=...' for key in missing)}."
        )
    for key, such_as in (("evaluate_every", 100), ("steps_per_round", 1500), ("batch_size", 100)):
        if cfg.get(key) is not None:  # what is no training may have none
            whole(key, cfg[key], 1, such_as)
    for key in ("seed", "order_seed"):
        whole(key, cfg[key], 0)
    if cfg.kinds is not None and cfg.kind not in cfg.kinds:
        raise ValueError(
            f"kind={cfg.kind}: {cfg.name} is no training in rounds, and has no such runs. Allowed is "
            f"kind={','.join(cfg.kinds)}; give that, or another experiment=."
        )
    option = HydraConfig.get().runtime.choices.get("growth") if HydraConfig.initialized() else cfg.grows
    growth = cfg.get("growth")
    if growth and (cfg.pruner != growth or option != cfg.grows):
        raise ValueError(
            f"growth={option}: kind={cfg.kind} is made by {cfg.grows or 'no growth'}, and its runs are "
            "recorded under that name: no other is allowed. Leave growth out, and give kind=rigl for RigL."
        )
    if not growth and (idle := [key for key in GROWTH if cfg.get(key) is not None]):
        raise ValueError(
            f"{idle[0]}={cfg[idle[0]]}: kind={cfg.kind} prunes. Allowed is this for kinds whose masks grow. "
            "Leave it out, or give kind=rigl."
        )
    if cfg.kinds is None:
        for key in ("pruner", "rewind"):
            build(cfg, key)
    for key, made_by in cfg.fixed.items():
        if (given := named(OmegaConf.select(cfg, key))) != made_by:
            raise ValueError(
                f"{key}={given}: kind={cfg.kind} is made by {made_by or f'no {key}'}, and its runs are "
                "recorded under that name: no other is allowed. Leave that option out, or give kind=ticket "
                "with it, and name=<another name>."
            )
    if cfg.after:
        controls.check(cfg)
    for key, such_as in (("checkpoint_every_n_epochs", 5), ("threads", 1)):
        whole(key, cfg[key], 1, such_as)
    for key in ("optimizer.lr", "task.lr"):
        rate = OmegaConf.select(cfg, key)
        if rate is not None and not OmegaConf.is_config(rate):  # a module of one's own may have several
            number(key, rate, "are numbers from 0 on, such as 0.001", lambda lr: 0 <= lr < float("inf"))
    if cfg.objective_at is not None:
        number("objective_at", cfg.objective_at, "are fractions of the weights, such as 0.5", _is_fraction)


def _is_fraction(value: float) -> bool:
    return 0 <= value <= 1


def named(node: Any) -> str | None:
    """What an option of an axis makes: the name of the function or class in its config.

    >>> named({"_target_": "hydra.utils.get_method", "path": "lightning_prune.allocation.uniform"})
    'lightning_prune.allocation.uniform'
    >>> named({"_target_": "lightning_prune.criteria.Random", "seed": 1})
    'lightning_prune.criteria.Random'
    """
    if not isinstance(node, Mapping):
        return None
    target = node.get("_target_")
    return node.get("path") if target in ("hydra.utils.get_method", "hydra.utils.get_class") else target


def _run(cfg: DictConfig, folder: Path) -> None:
    idle = unread(cfg)
    check(cfg)
    state = state_of(cfg)
    if state == "failed":
        log.info("%s failed before and is started anew.", os.path.relpath(folder))
        _clear(folder)
    write(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    for key in idle:
        log.warning("%s: nothing of this run reads it, so that it has no effect. Leave it out.", key)
    if said := longer(cfg):
        log.warning(said)
    of = made_of(cfg)
    changed = ", ".join(changed_since(folder, of))
    if state == "finished":
        log.info("%s is finished already; delete it to run it again.", os.path.relpath(folder))
        if changed:
            log.warning("%s has changed since that run was made, and its numbers do not show it.", changed)
        return
    if changed:
        log.warning(
            "%s has changed since %s began, which goes on with the new code. Delete that folder to start it "
            "again.",
            changed,
            os.path.relpath(folder),
        )
    _run_first(cfg)
    torch.set_num_threads(cfg.threads)
    write(folder / "run.json", json.dumps({**provenance(), "sources": of}, indent=1) + "\n")
    try:
        instantiate(cfg.run)(cfg, folder)
    except Exception:
        write(folder / "FAILED", traceback.format_exc())
        raise
    for metric, rounds in lost(read(folder / "records.jsonl")[0]).items():
        where = f"round{'s' if len(rounds) > 1 else ''} {', '.join(map(str, rounds))}"
        log.warning("%s: %s is no finite number in %s.", os.path.relpath(folder), metric, where)
    for path in folder.glob("*"):
        if path.is_file():
            sync(path)
    write(folder / "DONE", digest(plain(cfg, _APART)) + "\n")
    log.info("written: %s", os.path.relpath(folder))


def _clear(folder: Path) -> None:
    """Remove what a failed run left, the mark of its failure last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "FAILED"):
        if path.name not in _KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run_first(cfg: DictConfig) -> None:
    """Make the run that this one starts from, by the same command, unless it is there."""
    if not cfg.after or not HydraConfig.initialized():
        return
    overrides = [
        o for o in HydraConfig.get().overrides.task if not o.lstrip("+~").startswith(("kind=", "run."))
    ]
    first = hydra.compose("config", [*overrides, f"kind={cfg.after}"])
    first.variant = variant(overrides)
    if Path(to_absolute_path(cfg.ticket)) != folder_of(first):
        return  # it starts from another
    lock = locked(folder_of(first) / ".lock", os.path.relpath(folder_of(first)))
    lock.release()  # whoever was at it has finished, or never will
    if not (folder_of(first) / "DONE").is_file():
        log.info("%s starts from %s, which comes first.", cfg.kind, os.path.relpath(folder_of(first)))
        run(first)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> float | None:
    """The entry that Hydra wraps; what it returns is for sweepers that optimize."""
    return objective(cfg, run(cfg))


_PLANNED = Plan()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def plan(cfg: DictConfig) -> None:
    """What `--dry-run` does in place of `main`."""
    if not HydraConfig.get().sweeper._target_.endswith("BasicSweeper"):
        raise SystemExit(
            "hydra/sweeper: this sweeper chooses each run by what those before it gave, so no plan can list "
            "them. Leave --multirun out to see what one of them costs."
        )
    idle = unread(cfg)
    try:
        check(cfg)
        state = state_of(cfg)
    except ValueError as error:
        state = f"refused: {error}"
    _PLANNED.add(cfg, folder_of(cfg), state, idle, longer(cfg))


def dry_run(arguments: list[str]) -> None:
    """List what a command would run. Hydra expands the sweep; it leaves nothing behind."""
    with tempfile.TemporaryDirectory() as nowhere:
        overrides = [a for a in arguments if not a.startswith("hydra") or a.startswith(_FOR_PLANS)]
        overrides += [f"hydra.{key}={nowhere}" for key in ("run.dir", "sweep.dir")]
        overrides += [
            "hydra.output_subdir=null",
            "hydra/job_logging=disabled",
            "hydra/hydra_logging=disabled",
        ]
        sys.argv[1:] = flags_first(overrides)
        plan()
    _PLANNED.show()


def command(arguments: list[str]) -> None:
    """Run what these arguments of the command line say; with `--dry-run`, only list it."""
    if "--dry-run" in arguments:
        dry_run([a for a in arguments if a != "--dry-run"])
    else:
        sys.argv[1:] = flags_first(arguments)
        main()


def flags_first(arguments: list[str]) -> list[str]:
    """Flags before overrides: between overrides argparse takes those after a flag for unknown.

    >>> flags_first(["rate=0.1", "--multirun", "--config-dir", "conf", "seed=1,2"])
    ['--multirun', '--config-dir', 'conf', 'rate=0.1', 'seed=1,2']
    """
    flags: list[str] = []
    overrides: list[str] = []
    for before, given in zip(["", *arguments], arguments, strict=False):
        of_flag = before in _WITH_VALUE or given.startswith("-")
        (flags if of_flag else overrides).append(given)
    return flags + overrides
