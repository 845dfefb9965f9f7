"""Configs: where those of this package lie, what two of them differ in, and old ones under today's names."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

_PACKAGE = Path(__file__).parents[1]
# In a wheel the configs lie in the package; in a clone, and where one is installed to be edited, beside it.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())

# The rooms that the first version had in `experiments` and that have another name here.
_MOVED = {"channels": "channel_cuts"}
_OLD = re.compile(r"\bexperiments\.(?=[a-z_]+\.)([a-z_]+)")


def load(path: Path) -> DictConfig:
    """A config that a run left, of whatever version: what it names has the names of today."""
    config = OmegaConf.create(renamed(path.read_text()))
    assert isinstance(config, DictConfig)
    return config


def renamed(text: str) -> str:
    """The text of a config of the first version, with the names of today.

    >>> renamed("_target_: experiments.figures.WeightsLeft")
    '_target_: lightning_prune.study.figures.WeightsLeft'
    """
    return _OLD.sub(lambda found: f"lightning_prune.study.{_MOVED.get(found[1], found[1])}", text)


def build(cfg: DictConfig, key: str) -> Any:
    """What a key describes, built.

    Raises:
        ValueError: naming the key, when it cannot be built.
    """
    try:
        return instantiate(cfg[key])
    except InstantiationException as error:
        where = str(error).rpartition("full_key: ")[2].strip() or key
        why = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        do = "Change this option, or choose another."
        if "ModuleNotFoundError" in why:
            do = "Give the command in the folder of that module, or PYTHONPATH=<that folder>."
        raise ValueError(
            f"{where.removeprefix('pruner.')} of {cfg.name}, kind={cfg.kind}: {why}. It must be built before "
            f"the training. {do}"
        ) from error


def plain(cfg: DictConfig | Any, without: Sequence[str] = ()) -> dict[str, Any]:
    """A resolved config as {dotted key: value}, without some keys and what is below them.

    >>> plain(OmegaConf.create({"a": {"b": 1, "c": 2}, "d": "${a.b}"}), without=["a.c"])
    {'a.b': 1, 'd': 1}
    """
    return left_of(flattened(OmegaConf.to_container(cfg, resolve=True)), without)


def left_of(flat: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """What is left of {dotted key: value} without some keys and what is below them.

    >>> left_of({"data.root": "data", "data.seed": 1, "logger.name": "csv"}, ["data.root", "logger"])
    {'data.seed': 1}
    """
    return {k: v for k, v in flat.items() if not any(f"{k}.".startswith(f"{out}.") for out in without)}


def flattened(node: object, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted key: value}."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    below = [flattened(child, f"{prefix}.{key}".lstrip(".")) for key, child in node.items()]
    return {k: v for part in below for k, v in part.items()}


def digest(content: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that name this content.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
