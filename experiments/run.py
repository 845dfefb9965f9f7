"""Run an experiment from its config.

`python -m experiments.run experiment=lenet_mnist kind=ticket seed=1`, or `--multirun` with lists of values.
"""

import json
import logging
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)

# What does not change the numbers of a run may differ when it is resumed.
_FREE = ("progress", "runs", "ticket", "controls_at", "claims", "figures", "tables", "hydra")


def run(cfg: DictConfig) -> Path:
    """Run one experiment in its folder; one that was interrupted goes on, a finished one is left alone.

    Returns:
        The folder, with `config.yaml`, `run.json` (what the run was made with), `records.jsonl` and, after a
        training, its checkpoints.
    """
    folder = Path(to_absolute_path(f"{cfg.runs}/{cfg.name}/{cfg.kind}-{cfg.seed}"))
    folder.mkdir(parents=True, exist_ok=True)
    config, done = folder / "config.yaml", folder / "DONE"
    if config.is_file() and (folder / "records.jsonl").is_file():  # else nothing was run: it was refused
        _same_config(OmegaConf.load(config), cfg, folder)
    _write(config, OmegaConf.to_yaml(cfg, resolve=True))
    if done.is_file():
        log.info("%s is finished already; delete it to run it again.", os.path.relpath(folder))
        return folder

    torch.set_num_threads(cfg.threads)
    _write(folder / "run.json", json.dumps(provenance(), indent=1) + "\n")
    instantiate(cfg.run)(cfg, folder)
    done.touch()
    log.info("written: %s", os.path.relpath(folder))
    return folder


def provenance() -> dict[str, Any]:
    """What a run was made with: command, date, commit, versions and machine."""
    return {
        "command": " ".join(["python -m experiments.run", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or "not a git checkout",
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {name: version(name) for name in ("lightning-prune", "torch", "lightning", "hydra-core")},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _write(path: Path, text: str) -> None:
    """All or nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


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
