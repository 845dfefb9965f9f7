"""Random number generators of a training: what a checkpoint of Lightning lacks, and a resumed run needs."""

from collections import deque
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_prune import rng
from lightning_prune.callbacks import _lightning

_FEW, _MANY = 64, 2000  # items of a container, and objects in all, that are looked into
_CLOSED = (Tensor, np.ndarray, nn.Module, Trainer, type, ModuleType, FunctionType, MethodType)


def own(*loaders: Any) -> dict[str, rng.Generator]:
    """The generators that loaders keep: theirs and those of samplers, data sets and transforms, by name.

    >>> import torch
    >>> from torch.utils.data import DataLoader
    >>> list(own(DataLoader(range(3), generator=torch.Generator())))
    ['0.generator']
    """
    found: dict[str, rng.Generator] = {}
    known: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque((str(i), loader) for i, loader in enumerate(loaders))
    while waiting and len(known) < _MANY:
        name, value = waiting.popleft()
        if id(value) in known or isinstance(value, _CLOSED):
            continue
        known.add(id(value))
        if isinstance(value, rng.KINDS):
            found[name] = value
        elif isinstance(value, dict):
            waiting += [(f"{name}.{key}", item) for key, item in value.items()] if len(value) < _FEW else []
        elif isinstance(value, (list, tuple)):
            waiting += [(f"{name}.{i}", item) for i, item in enumerate(value)] if len(value) < _FEW else []
        elif hasattr(value, "__dict__"):
            # A running iterator goes with its epoch.
            waiting += [(f"{name}.{key}", item) for key, item in vars(value).items() if key != "_iterator"]
    return found


def of_loaders(trainer: Trainer) -> dict[str, rng.Generator]:
    """The generators that training and validation data are drawn with, where they have some of their own."""
    training, validation = _lightning.loaders_of(trainer), _lightning.validation_loaders_of(trainer)
    return own(
        tuple(training.flattened) if training is not None else (),
        tuple(validation.flattened) if validation is not None else (),
    )


def capture(trainer: Trainer | None) -> dict[str, Any]:
    """The state of this process's generators, also between fits."""
    return rng.capture(of_loaders(trainer) if trainer else {})


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Set this process's generators to the state that `capture` returned."""
    rng.restore(state, of_loaders(trainer))
