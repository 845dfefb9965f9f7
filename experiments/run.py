"""Run an experiment from its config.

`python -m experiments.run experiment=lenet_mnist kind=ticket seed=1`, or `--multirun` with lists of values.
"""

import logging
import os
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)

# What does not change the numbers of a run may differ when it is resumed.
_FREE = ("progress", "runs", "claims", "figures", "tables", "hydra")


def run(cfg: DictConfig) -> Path:
    """Run one experiment in its folder; one that was interrupted goes on, a finished one is left alone.

    Returns:
        The folder, with `config.yaml`, `records.jsonl` and, after a training, its checkpoints.
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

    torch.set_num_threads(cfg.threads)
    instantiate(cfg.run)(cfg, folder)
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


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """The entry that Hydra wraps."""
    run(cfg)


if __name__ == "__main__":
    main()
