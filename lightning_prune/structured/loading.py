"""Loading: a cut network into the full-size model, from all files that one may be in."""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import folders
from lightning_prune.deploy.storage import load_safetensors
from lightning_prune.files import check_archive, is_archive
from lightning_prune.shards import is_sharded, like, settle
from lightning_prune.structured import configuration, surgery
from lightning_prune.structured.trial import first_line
from lightning_prune.structured.units import after, cut_of, has_state, of_state, parameter

ALLOWED = "a Lightning checkpoint, a saved state_dict, or a file of lightning_prune.save_sparse"
File = str | Path | Mapping[str, Any]


def load_pruned(model: nn.Module, path: File, weights_only: bool = True) -> nn.Module:
    """Load a checkpoint of a cut network into a freshly built, full-size model, which becomes as small.

    Needs neither a Trainer nor torch-pruning. The shapes in the file say what was cut; in a checkpoint that
    was saved before the cut (`StructuredChannelPruning` with `remove="end"`), the state of the callback says
    which channels are dead, and they are cut while it is loaded: what comes out computes what the masked
    network in the checkpoint did. Names in the file may have a prefix that the model's do not have, or the
    other way round: `net.`, `model.`, `module.` (DistributedDataParallel, AveragedModel), `_orig_mod.`
    (torch.compile).

    Args:
        model: the model as it was built before pruning; changed in place. Of one that is sharded over
            processes each of them takes its part of the file, which must not be of a cut network.
        path: a Lightning checkpoint, a file with a `state_dict`, one of `save_sparse`, or the
            `model.safetensors` that `save_pretrained` of transformers writes. With weights_only=False also
            the folder that several processes wrote their shards to. Or what was loaded: a checkpoint, a
            `state_dict`.
        weights_only: False allows a checkpoint with other objects in it than tensors and plain containers,
            such as hyper-parameters that are enums or paths. That runs code from the file: only for files
            that you trust.

    Returns:
        The model.

    Raises:
        ValueError: when the file cannot be read, or the names or dimensions in it are not the model's. It is
            unchanged then.
    """
    stored = path if isinstance(path, Mapping) else _read(Path(path), weights_only)
    given = f"path, a {type(path).__name__}" if isinstance(path, Mapping) else f"path={str(path)!r}"
    state = _without_the_dead(_state_dict(stored, given), stored)
    settle(model)
    state = _alike(model, _renamed(_with_tied(state, model), model, given))
    state = _lying_as(model.state_dict(), state, given)
    reshape(model, state)
    with torch.inference_mode(any(t.is_inference() for t in (*model.parameters(), *model.buffers()))):
        model.load_state_dict(state)
    return model


def _read(path: Path, weights_only: bool) -> Mapping[str, Any]:
    if folders.is_folder(path):
        if not weights_only:
            return folders.whole(path, weights_only)
        raise ValueError(
            f"path={str(path)!r}: it is a folder of torch.distributed.checkpoint, which is read by pickle. "
            "Allowed are files of tensors and plain containers. If you trust it, load it with "
            "weights_only=False, which runs code from it."
        )
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file. Allowed is {ALLOWED}; name one.")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # of safetensors: the length of a JSON object, and the object
        return load_safetensors(path)
    try:
        if is_archive(path):
            check_archive(path)
        stored = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if not weights_only:
            raise _unreadable(path, error) from error
        raise ValueError(
            f"path={str(path)!r}: it cannot be read as tensors and plain containers, which are allowed. If "
            "it holds other objects (hyper-parameters that are enums or paths, say) and you trust it, load "
            f"it with weights_only=False, which runs code from it. ({first_line(error)})"
        ) from error
    except (
        *(zipfile.BadZipFile, NotImplementedError, OSError, RuntimeError, EOFError, ValueError),
        *(AttributeError, ImportError, LookupError),
    ) as error:
        raise _unreadable(path, error) from error
    if not isinstance(stored, Mapping):
        raise ValueError(
            f"path={str(path)!r}: it holds a {type(stored).__name__}; allowed is {ALLOWED}. Save the model's "
            "state_dict()."
        )
    return stored


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"path={str(path)!r}: it cannot be read ({first_line(error)}); allowed is {ALLOWED}. Give one."
    )


def _state_dict(stored: Mapping[str, Any], given: str) -> dict[str, Any]:
    state = stored.get("state_dict", stored)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{given}: there are no weights in it, only {', '.join(map(str, stored))}; allowed is "
            f"{ALLOWED}. Save the part that is a state_dict, or name it 'state_dict'."
        )
    return dict(state)


def _without_the_dead(state: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint without the channels that the callback in it has pruned and not yet cut."""
    callbacks = stored.get("callbacks")
    for value in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if has_state(value):
            couplings, alive, left = of_state(value)
            here = after(couplings, left)
            removed = cut_of(here, {name: alive[name][left[name]] for name in here})
            by_name = {(parameter(site), site[2]): gone for site, gone in removed.items()}
            state = surgery.cut_tensors(state, by_name)
    return state


def _with_tied(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state with all names of tied tensors, of which `save_pretrained` writes one."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            names.setdefault(id(tensor), []).append(name)
    tied = {name: [n for n in own if n in state] for own in names.values() for name in own}
    missing = {name: state[there[0]] for name, there in tied.items() if there and name not in state}
    return state | missing


def _renamed(state: dict[str, Any], model: nn.Module, given: str) -> dict[str, Any]:
    """The state with the model's own names; what lies in the file beside the model is left out."""
    own = {_plain(name): name for name in model.state_dict()}
    there = {_plain(name): name for name in state}
    if own.keys() == there.keys():
        return {own[name]: state[there[name]] for name in there}
    inner = _prefixes(there, own)  # the model is a part of what was saved
    if len(inner) > 1:
        raise ValueError(
            f"{given}: the names of {type(model).__name__} are there under several prefixes, "
            f"{', '.join(map(repr, inner))}; allowed is one. Load it into the module that holds them all."
        )
    for prefix in inner:
        return {own[name]: state[there[prefix + name]] for name in own}
    for prefix in _prefixes(own, there):  # what was saved is all of the model but the prefix
        if len(own) == len(there):
            return {own[prefix + name]: state[there[name]] for name in there}
    different = sorted(set(own) ^ set(there))
    where = "file" if different[0] in there else "model"
    raise ValueError(
        f"{given}: {different[0]} is only in the {where}, as are {len(different) - 1} other "
        f"names in one of the two; allowed is a checkpoint of {type(model).__name__}, whose names may have a "
        f"prefix in common. The first in the file is {next(iter(state))}, in the model {next(iter(own))}. "
        "Load one, or rename them."
    )


def _alike(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state where a tensor of several names, as of a layer used twice, is cut under all of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            names.setdefault(id(tensor), []).append(name)
    least = {
        name: min((state[each] for each in own), key=lambda tensor: tensor.numel())
        for own in names.values()
        if len({state[each].shape for each in own}) > 1
        for name in own
    }
    return state | least


def _lying_as(own: Mapping[str, Any], state: dict[str, Any], given: str) -> dict[str, Any]:
    """The state with each tensor sharded as that of the model is, of which each process takes its part."""
    shards = {name: tensor for name, tensor in own.items() if is_sharded(tensor)}
    for name, tensor in shards.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{given}: {name} is {tuple(state[name].shape)} there and {tuple(tensor.shape)} "
                "in the model, which is sharded over processes. Allowed are weights of its shapes, since "
                "channels are cut out of whole weights. Load it before the model is sharded."
            )
    return state | {name: like(state[name].to(tensor.device), tensor) for name, tensor in shards.items()}


def _plain(name: str) -> str:
    """A name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _prefixes(longer: Mapping[str, Any], names: Mapping[str, Any]) -> list[str]:
    """Prefixes under which all the names, and no others, are among the longer ones."""
    if not names:
        return []
    first = next(iter(names))
    found = [name.removesuffix(first) for name in longer if name.endswith(f".{first}")]
    under = {prefix: {name for name in longer if name.startswith(prefix)} for prefix in found}
    return [prefix for prefix, those in under.items() if those == {prefix + name for name in names}]


@torch.no_grad()
def reshape(
    model: nn.Module, state_dict: Mapping[str, Any], full: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Give a full-size model the shapes of a cut one's `state_dict`; what the new tensors hold is undefined.

    An expanded tensor, whose elements are one in memory, gets memory into which a `state_dict` can be loaded.

    >>> model = nn.Linear(3, 2)
    >>> reshape(model, {"weight": torch.zeros(2, 1)})
    >>> model
    Linear(in_features=1, out_features=2, bias=True)

    Args:
        model: any module.
        state_dict: tensors by name.
        full: the shapes that tensors had before the model was cut, by name; it may become so large again.

    Raises:
        ValueError: when a tensor is there in other dimensions, or larger than in the full-size model. Nothing
            is changed then.
    """
    new: dict[int, tuple[Tensor, Tensor]] = {}
    own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in own:
        there = state_dict.get(name)
        if not isinstance(there, Tensor) or (there.shape == tensor.shape and not _is_expanded(tensor)):
            continue
        most = (full or {}).get(name, tensor.shape)
        if there.dim() != tensor.dim() or any(a > b for a, b in zip(there.shape, most, strict=True)):
            raise ValueError(
                f"{name} is {tuple(there.shape)} in the checkpoint and {tuple(tensor.shape)} in "
                f"{type(model).__name__}; allowed is what a cut leaves of it. Use the full-size model that "
                "was pruned."
            )
        layout = surgery.memory_format(tensor)
        new[id(tensor)] = (tensor, torch.empty_like(tensor.new_empty(there.shape), memory_format=layout))
    surgery.prepare(model, new, {}).commit()
    if new:
        configuration.follow(model)


def _is_expanded(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested and 0 in tensor.stride()
