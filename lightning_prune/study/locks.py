"""One writer at a time, and files that are on the disk when it is said so."""

import logging
import os
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


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
