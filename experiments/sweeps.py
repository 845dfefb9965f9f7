"""Runs that survive: which config a folder belongs to, one writer at a time."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


def plain(cfg: DictConfig | Any, without: Sequence[str] = ()) -> dict[str, Any]:
    """A resolved config as {dotted key: value}, without some keys and what is below them.

    >>> plain(OmegaConf.create({"a": {"b": 1, "c": 2}, "d": "${a.b}"}), without=["a.c"])
    {'a.b': 1, 'd': 1}
    """
    flat = flattened(OmegaConf.to_container(cfg, resolve=True))
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


def locked(path: Path, what: str) -> FileLock:
    """The lock of this file, once nobody else holds it; that of a process that was killed is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s is being made by another process: waiting for it.", what)
        lock.acquire()
    return lock


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
