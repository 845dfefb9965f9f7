"""Folders: checkpoints that several processes wrote, each of them its part of every tensor.

Lightning writes them with `ModelParallelStrategy(save_distributed_checkpoint=True)`: the weights and what
optimizers know of them by `torch.distributed.checkpoint`, and everything else in the file `meta.pt`, which
comes last. The sharded tensors in the state of a callback are set apart, so that they go the first way.

To read such a folder is to trust it: torch and Lightning keep some of it as pickles, which may run code.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.shards import evenly, is_sharded

REST = "meta.pt"  # Lightning's name
_APART = "set apart as"  # the only key of what stands for a tensor that was set apart


def is_folder(path: str | Path) -> bool:
    """Whether a checkpoint is such a folder, and whole."""
    return Path(path, REST).is_file()


def set_apart(state: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """A state, of nested containers, with a name in the place of each sharded tensor; and these by name.

    >>> set_apart({"w": [torch.ones(1)]}, "state")
    ({'w': [tensor([1.])]}, {})
    """
    if is_sharded(state):
        return {_APART: name}, {name: state}
    if type(state) not in (dict, list, tuple):
        return state, {}
    items = state.items() if type(state) is dict else enumerate(state)
    parts = {key: set_apart(value, f"{name}/{key}") for key, value in items}
    apart = {each: tensor for _, tensors in parts.values() for each, tensor in tensors.items()}
    left = {key: value for key, (value, _) in parts.items()}
    return left if type(state) is dict else type(state)(left.values()), apart


def put_together(state: Any, folder: str | Path, shards: bool) -> Any:
    """The state of which `set_apart` gave the first part, with the tensors that the folder holds.

    Args:
        state: nested containers.
        folder: of the checkpoint that the tensors were written to.
        shards: whether the tensors come in even shards over all processes, which must all call it then. If
            not, they are whole.
    """
    names = set(_names(state))
    return _with(state, _read(folder, names, shards)) if names else state


def _names(state: Any) -> Iterator[str]:
    if type(state) is dict and state.keys() == {_APART}:
        yield state[_APART]
    elif type(state) in (dict, list, tuple):
        for value in state.values() if type(state) is dict else state:
            yield from _names(value)


def _with(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    if type(state) is dict:
        if state.keys() == {_APART}:
            return tensors[state[_APART]]
        return {key: _with(value, tensors) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(_with(value, tensors) for value in state)
    return state


def _read(folder: str | Path, names: Collection[str], shards: bool) -> dict[str, Tensor]:
    contents = _contents(folder)
    stored = {path[-1]: key for key, (path, _) in contents.items() if path[-1] in names}
    values = {key: value for key, (_, value) in contents.items() if value is not None}
    make = evenly if shards else partial(torch.empty_like, device="cpu")
    there = {key: make(values[key]) for key in stored.values()}
    _load(there, folder, alone=not shards)
    return {name: there[key] for name, key in stored.items()}


def whole(folder: str | Path, weights_only: bool | None = True) -> dict[str, Any]:
    """All of a checkpoint, with whole tensors, as a Trainer on one device writes it.

    Args:
        folder: of the checkpoint.
        weights_only: as in `torch.load`, of what is not sharded.
    """
    rest: dict[str, Any] = torch.load(Path(folder, REST), map_location="cpu", weights_only=weights_only)
    contents = _contents(folder)
    values: dict[str, Any] = {
        key: None if value is None else torch.empty_like(value, device="cpu")
        for key, (_, value) in contents.items()
    }
    _load(values, folder, alone=True)
    apart = {path[-1]: values[key] for key, (path, _) in contents.items()}
    found: dict[Any, Any] = {}
    for key, (path, _) in contents.items():
        *outer, last = path
        place = found
        for step in outer:
            place = place.setdefault(step, {})
        place[last] = values[key]
    optimizers = [found[f"optimizer_{i}"] for i in range(len(found)) if f"optimizer_{i}" in found]
    states = [_by_number(state) for state in optimizers if "param_groups" in state]
    return {**_with(rest, apart), "state_dict": found["state_dict"], "optimizer_states": states}


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by numbers of parameters, as optimizers have it, from one by their names."""
    groups = [dict(group) for _, group in sorted(state["param_groups"].items())]
    numbers: dict[str, int] = {}
    for group in groups:
        group["params"] = [numbers.setdefault(name, len(numbers)) for name in group["params"]]
    known = state.get("state", {})
    return {"state": {i: known[name] for name, i in numbers.items() if name in known}, "param_groups": groups}


_Contents = dict[str, tuple[tuple[Any, ...], Tensor | None]]


def _contents(folder: str | Path) -> _Contents:
    """What torch wrote: key -> (where it stands in nested containers, a tensor like it without memory)."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(folder).read_metadata()
    return {
        key: (
            tuple(metadata.planner_data[key]),
            torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
            if isinstance(stored, TensorStorageMetadata)
            else None,
        )
        for key, stored in metadata.state_dict_metadata.items()
    }


def _load(values: dict[str, Any], folder: str | Path, alone: bool) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
        load(values, storage_reader=FileSystemReader(folder), no_dist=alone)
