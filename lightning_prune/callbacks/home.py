"""Home: a callback learns what became of it in a fit that ran in forked or spawned processes.

Such a fit trains copies of the callbacks, in processes that end with it. Of them Lightning brings back the
weights and `trainer.state`. The copy on rank 0 writes its state to a temporary file and puts a letter into
`trainer.state`; as that is unpickled in the first process, the letter finds the callback and is read.
"""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import mkstemp
from typing import Any, Protocol
from uuid import uuid4
from weakref import WeakValueDictionary

import torch
from lightning.pytorch import Trainer
from typing_extensions import final

from lightning_prune.callbacks import _lightning
from lightning_prune.callbacks.checkpoints import whole_state


class Traveller(Protocol):
    """A callback whose state can be brought home."""

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain containers."""
        ...

    def come_home(self, state: dict[str, Any]) -> None:
        """Take over the state that a copy had when a fit ended."""
        ...


_at_home: WeakValueDictionary[str, Traveller] = WeakValueDictionary()


def settle(callback: Traveller, address: str | None = None) -> str:
    """Give a callback an address in this process, and return it.

    Args:
        callback: the one that letters to the address go to.
        address: of the object that this one was copied from. It stays that of a copy in another process.
    """
    if address is None or address in _at_home:
        address = uuid4().hex
    _at_home[address] = callback
    return address


def write_home(trainer: Trainer, callback: Traveller, address: str) -> None:
    """As a fit ends: let the callback of the first process have the state of this copy of it."""
    if not _lightning.leaves_its_processes(trainer):
        return
    state = whole_state(callback.state_dict())
    if trainer.local_rank != 0:
        return
    handle, path = mkstemp(prefix="lightning_prune-", suffix=".state")
    with os.fdopen(handle, "wb") as file:
        torch.save(state, file)
    setattr(trainer.state, f"of_{address}", _Letter(address, path))


@final
class _Letter:
    """A path that is read, at the address, as soon as it is unpickled."""

    def __init__(self, address: str, path: str) -> None:
        self.address, self.path = address, path

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Letter":
        return self

    def __reduce__(self) -> tuple[Callable[[str, str], None], tuple[str, str]]:
        return _read, (self.address, self.path)


def _read(address: str, path: str) -> None:
    if (callback := _at_home.get(address)) is not None:
        callback.come_home(torch.load(path, map_location="cpu", weights_only=True))
    Path(path).unlink(missing_ok=True)
