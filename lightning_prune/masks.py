"""Masks: which weights are alive, how a mask is put on a tensor, how it is stored.

A mask is a bool tensor of its weight's shape, True where the weight is alive. Masks are born in `selection`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.shards import is_sharded, like, local, settle, sum_of, whole

Masks = dict[str, Tensor]


def count(found: Any) -> int:
    """How many are True; of a sharded tensor on all processes, which must all call it."""
    if is_sharded(found):
        return sum_of(count(local(found)), found)
    if isinstance(found, Tensor) and found.device.type == "cpu":
        found = found.numpy()  # which counts five times as fast
    return int(found.count_nonzero() if isinstance(found, Tensor) else np.count_nonzero(found))


def alive(masks: Mapping[str, Tensor]) -> int:
    """How many weights the masks leave alive."""
    return sum(map(count, masks.values()))


def overlap(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many weights are alive in both, and how many in either.

    >>> a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    >>> overlap({"w": a}, {"w": b}), jaccard({"w": a}, {"w": b})
    ((1, 3), 0.3333333333333333)

    Raises:
        ValueError: when the two are not masks of the same weights.
    """
    if (these := _shapes(masks)) != (those := _shapes(others)):
        name = next(n for n in {**these, **those} if these.get(n) != those.get(n))
        raise ValueError(
            f"masks: {name} has the shape {these.get(name)} in one and {those.get(name)} in the other; "
            "allowed are two masks of the same weights. Compare runs of the same network."
        )
    pairs = [(mask.bool(), others[name].to(mask.device).bool()) for name, mask in masks.items()]
    return sum(int((a & b).sum()) for a, b in pairs), sum(int((a | b).sum()) for a, b in pairs)


def jaccard(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """The Jaccard index of two masks: alive in both over alive in either; 1 where nothing is alive."""
    both, either = overlap(masks, others)
    return both / either if either else 1.0


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def integer(dtype: torch.dtype) -> torch.dtype:
    """The integer type as wide as `dtype`."""
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def bits(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as integers as wide as the elements of `like`: all ones where alive, all zeros where dead.

    Of shards it is the mask of the part that this process has.
    """
    if is_sharded(mask):
        mask, like = local(mask), local(like)
    return mask.to(device=like.device, dtype=integer(like.dtype)).neg_()


def zero_dead_(tensor: Tensor, alive_bits: Tensor) -> None:
    """Set dead elements to +0.0 in place, whatever they hold; leave the others as they are, bit for bit.

    A bitwise AND: as fast as the multiplication `tensor * mask`, which leaves -0.0 and turns infinity into
    NaN.

    >>> x = torch.tensor([-1.0, float("inf"), 2.0])
    >>> zero_dead_(x, bits(torch.tensor([False, False, True]), like=x))
    >>> x
    tensor([0., 0., 2.])
    """
    local(tensor).view(alive_bits.dtype).bitwise_and_(alive_bits)


Packed = dict[str, Tensor | list[int]]


def pack(masks: Mapping[str, Tensor]) -> dict[str, Packed]:
    """Masks at one bit a weight, in plain containers and tensors; all processes must call it for shards.

    >>> packed = pack({"w": torch.tensor([[True, False, True]])})
    >>> packed
    {'w': {'shape': [1, 3], 'bits': tensor([160], dtype=torch.uint8)}}
    >>> unpack(packed)
    {'w': tensor([[ True, False,  True]])}
    """
    return {name: pack_one(whole(mask)) for name, mask in masks.items()}


def pack_one(mask: Tensor) -> Packed:
    """A whole mask at one bit a weight."""
    flat = mask.detach().cpu().reshape(-1).numpy()
    return {"shape": list(mask.shape), "bits": torch.from_numpy(np.packbits(flat))}


def pack_whole(masks: Mapping[str, Tensor]) -> dict[str, Packed | Tensor]:
    """The same, with the masks that are sharded as they are: each process has its part."""
    return {name: mask if is_sharded(mask) else pack_one(mask) for name, mask in masks.items()}


def unpack(packed: Mapping[str, Mapping[str, Tensor | list[int]] | Tensor]) -> Masks:
    """The masks that `pack` or `pack_whole` stored."""
    masks: Masks = {}
    for name, stored in packed.items():
        if isinstance(stored, Tensor):
            masks[name] = stored
            continue
        shape = torch.Size([int(n) for n in stored["shape"]])
        flat = np.unpackbits(torch.as_tensor(stored["bits"]).numpy(), count=shape.numel())
        masks[name] = torch.from_numpy(flat).view(torch.bool).view(shape)
    return masks


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the dead weights of a module to exactly +0.0: after merging an adapter, loading, or averaging.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> apply_masks(model, {"weight": torch.tensor([[True, False]])})
    >>> model.weight[0, 1].item()
    0.0

    Args:
        model: any module. Its parameters keep their identity.
        masks: {parameter name: bool tensor of the parameter's shape, True = alive}, such as `prune` returns
            them. Parameters without a mask stay as they are.

    Raises:
        ValueError: when a name is not that of a parameter, or a mask does not fit it. The model is then as it
            was.
    """
    parameters = settle(model)
    for name, mask in masks_of(parameters, masks, "model's").items():
        zero_dead_(parameters[name], bits(mask, like=parameters[name]))


def masks_of(params: Mapping[str, Tensor], masks: Mapping[str, Tensor], whose: str) -> Masks:
    """The masks, each on the device of its parameter, and sharded as it is.

    Raises:
        ValueError: when a name is not among `params`, or a mask does not fit its parameter.
    """
    if unknown := [name for name in masks if name not in params]:
        raise ValueError(
            f"masks: {', '.join(unknown)}: allowed are names of the {whose} parameters. "
            f"Use those. {_renamed(unknown, list(params))}"
        )
    for name, mask in masks.items():
        shape = tuple(params[name].shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            tensor = isinstance(mask, Tensor)
            given = f"{mask.dtype} {tuple(mask.shape)}" if tensor else f"a {type(mask).__name__}"
            raise ValueError(
                f"masks: {name} is {given}; allowed is torch.bool of shape {shape}. Use masks of this model."
            )
    return {name: like(mask.to(params[name].device), params[name]) for name, mask in masks.items()}


# What wrappers put before, or into, the names of parameters.
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "base_layer.", "_fsdp_wrapped_module.")


def _renamed(unknown: Sequence[str], names: Sequence[str]) -> str:
    """What to do about names of masks that are not those of the model: name the wrapper, or the names."""

    def bare(name: str) -> str:
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        return name

    computed = {re.sub(r"parametrizations\.(\w+)\.original\d*$", r"\1", name) for name in names} - {*names}
    if mine := [name for name in unknown if name in computed]:
        return (
            f"{', '.join(mine)} are computed by a parametrization. Call lightning_prune.adapters.merge, or "
            "torch.nn.utils.parametrize.remove_parametrizations, first."
        )
    here = {bare(name): name for name in names}
    pairs = {name: here[bare(name)] for name in unknown if bare(name) in here}
    if not pairs:
        return f"They are: {', '.join(names)}."
    there, same = next(iter(pairs.items()))
    wrappers = [w for w in _WRAPPERS if there.count(w) != same.count(w)]
    side = "names of the masks" if len(there) > len(same) else "names of the parameters"
    return (
        f"{same} looks like {there}: a wrapper put {', '.join(map(repr, wrappers))} into the {side}. Rename "
        "the masks, or give the model that they were made of."
    )
