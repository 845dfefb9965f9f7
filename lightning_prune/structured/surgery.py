"""Surgery: carry a plan of removed channels out on a model, its optimizers and all that copies them.

A plan says for each (module, tensor, dimension) which indices go. It is plain data: nothing here knows how
it was found. Every operation is all or nothing: what will be is computed first, and put in place at the end.
Parameters and buffers keep their identity, so optimizers, schedulers and hooks go on with the same objects.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

from lightning_prune.rewind import Snapshot

Site = tuple[str, str, int]  # name of a module, name of its parameter or buffer, dimension
Plan = dict[Site, Tensor]  # the indices that go, of the tensor as it is before the cut
Kept = dict[int, Tensor]  # dimension -> the indices that stay, in order

# What these remember is not of the shape of their parameters, from their first step on.
NOT_SLICED = (optim.LBFGS, optim.Adafactor)


@dataclass(frozen=True)
class _Prepared:
    """What a model will be: nothing is in place yet."""

    tensors: list[tuple[Tensor, Tensor, Tensor | None]]  # the tensor, its new data, its new gradient
    attributes: list[tuple[nn.Module, dict[str, Any]]]

    def commit(self) -> None:
        for tensor, data, grad in self.tensors:
            tensor.grad = None  # one of the old shape would refuse the new data
            tensor.data = data
            tensor.grad = grad
        for module, values in self.attributes:
            vars(module).update(values)


@torch.no_grad()
def cut(
    model: nn.Module,
    plan: Plan,
    optimizers: Iterable[optim.Optimizer] = (),
    copies: Iterable[nn.Module] = (),
) -> None:
    """Take the channels of a plan out of a model, its gradients, its optimizers' states and copies of it.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> gone = torch.tensor([1])
    >>> cut(model, {("0", "weight", 0): gone, ("0", "bias", 0): gone, ("1", "weight", 1): gone})
    >>> model
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
      (1): Linear(in_features=2, out_features=1, bias=True)
    )

    Args:
        model: any module; `requires_grad`, memory format, ties and the mode are kept.
        plan: from `lightning_prune.channels`.
        optimizers: those that step the model. What they keep for a parameter is cut as the parameter is.
        copies: modules with the tensors of `model` under the same names, such as averaged weights.

    Raises:
        ValueError: when the plan is not one of this model, or an optimizer keeps what cannot be cut with its
            parameter. Nothing is changed then.
    """
    optimizers = list(optimizers)
    check_optimizers(optimizers)
    prepared: list[_Prepared] = []
    for its in (model, *copies):
        kept = _kept(its, plan)
        new = {id(t): (t, _sliced(t, dims)) for t, dims in kept.values()}
        grads = {id(t): _sliced(t.grad, dims) for t, dims in kept.values() if t.grad is not None}
        prepared.append(_prepare(its, new, grads))
    states = _cut_states(optimizers, _kept(model, plan))
    for its in prepared:
        its.commit()
    for state, values in states:
        state.update(values)


def check_optimizers(optimizers: Iterable[optim.Optimizer]) -> None:
    """Refuse optimizers whose state cannot be cut.

    Raises:
        ValueError: when there is one.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, NOT_SLICED):
            raise ValueError(
                f"{type(optimizer).__name__} keeps state that is not of its weights' shapes, so channels "
                "cannot be cut from it. Allowed are SGD, RMSprop, the Adam family, Muon and others that keep "
                "one value for each weight. Use one of these, or cut before the optimizer is made."
            )


def _kept(model: nn.Module, plan: Plan) -> dict[int, tuple[Tensor, Kept]]:
    """Which indices of which tensors stay, by identity of the tensor."""
    found: dict[int, tuple[Tensor, Kept]] = {}
    for (module, name, dim), gone in plan.items():
        try:
            tensor = getattr(model.get_submodule(module), name)
            size = tensor.shape[dim]
        except (AttributeError, IndexError):
            raise ValueError(
                f"plan: {type(model).__name__} has no tensor {name} with dimension {dim} in its module "
                f"{module!r}; allowed are those it has. Make the plan for this model."
            ) from None
        stays = torch.ones(size, dtype=torch.bool)
        if len(gone) and not 0 <= int(gone.min()) <= int(gone.max()) < size:
            raise ValueError(
                f"plan: indices {gone.tolist()} of {module}.{name}, dimension {dim}, of size {size}; allowed "
                f"are 0 to {size - 1}. Make another plan if this was carried out."
            )
        stays[gone] = False
        if not stays.any():
            raise ValueError(
                f"plan: nothing would be left of {module}.{name}; one channel at least is needed. Keep one."
            )
        found.setdefault(id(tensor), (tensor, {}))[1][dim] = stays.nonzero().flatten()
    return found


def _sliced(tensor: Tensor, kept: Kept) -> Tensor:
    """The tensor at the kept indices, in its own memory format."""
    new = tensor.detach()
    for dim, index in kept.items():
        new = new.index_select(dim, index.to(tensor.device))
    return new.contiguous(memory_format=_memory_format(tensor))


def _memory_format(tensor: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def _cut_states(
    optimizers: Sequence[optim.Optimizer], kept: Mapping[int, tuple[Tensor, Kept]]
) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """The optimizers' states of the tensors, and what is to be put into each."""
    found: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"] if id(p) in kept):
            state = optimizer.state.get(p, {})
            its = _cut_state(state, kept[id(p)][0].shape, kept[id(p)][1], type(optimizer).__name__)
            found.append((state, its))
    return found


def _cut_state(state: Mapping[str, Any], shape: torch.Size, kept: Kept, optimizer: str) -> dict[str, Tensor]:
    new: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            new[name] = _sliced(value, kept)
        elif isinstance(value, (list, tuple, dict)) or (isinstance(value, Tensor) and value.numel() > 1):
            raise ValueError(
                f"{optimizer} keeps {name!r} of another shape than its weight's {tuple(shape)}, which "
                "cannot be cut with it. Allowed are optimizers that keep one value for each weight; use one."
            )
    return new


def _prepare(
    model: nn.Module, new: Mapping[int, tuple[Tensor, Tensor]], grads: Mapping[int, Tensor]
) -> _Prepared:
    attributes: list[tuple[nn.Module, dict[str, Any]]] = []
    for module in model.modules():  # all owners of a tied tensor
        own = {**module._parameters, **module._buffers}
        if any(id(t) in new for t in own.values()):
            shapes = {
                n: (new[id(t)][1] if id(t) in new else t).shape for n, t in own.items() if t is not None
            }
            attributes.append((module, _attributes(module, shapes)))
        if (its := attention(module)) is not None and id(its.proj.weight) in new:
            width = new[id(its.proj.weight)][1].shape[1]
            attributes.append((module, {"num_heads": width // its.head_dim, "attn_dim": width}))
    tensors = [(t, data, grads.get(key)) for key, (t, data) in new.items()]
    return _Prepared(tensors, attributes)


def attention(module: Any) -> Any:
    """The module, if it is an attention that makes queries, keys and values at once, as timm's; else None."""
    layers = [getattr(module, name, None) for name in ("qkv", "proj")]
    sizes = [getattr(module, name, None) for name in ("num_heads", "head_dim")]
    if not all(isinstance(it, nn.Linear) for it in layers) or not all(isinstance(it, int) for it in sizes):
        return None
    width = module.num_heads * module.head_dim
    fits = (module.qkv.out_features, module.proj.in_features) == (3 * width, width)
    return module if fits else None


def _attributes(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """What a layer says of its sizes, for tensors of these shapes."""
    weight = shapes.get("weight", torch.Size())
    if isinstance(module, nn.Linear):
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, nn.modules.conv._ConvNd):
        if 1 < module.groups == module.in_channels == module.out_channels:  # depthwise
            return dict.fromkeys(("out_channels", "in_channels", "groups"), weight[0])
        first, second = weight[:2]
        if module.transposed:
            return {"in_channels": first, "out_channels": second * module.groups}
        return {"out_channels": first, "in_channels": second * module.groups}
    if isinstance(module, (nn.modules.batchnorm._NormBase,)):
        return {"num_features": next(iter(shapes.values()))[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight[1]}
    return {}


def cut_snapshot(
    snapshot: Snapshot, plan: Plan, model: nn.Module, optimizers: Sequence[optim.Optimizer]
) -> Snapshot:
    """The snapshot of an earlier step, cut with the same plan: a structured lottery ticket.

    Args:
        snapshot: taken of `model` and `optimizers` before the plan was carried out; it is not changed.
        plan: the plan.
        model: the model, before or after the cut.
        optimizers: the optimizers of the snapshot, in its order.
    """
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    kept: dict[str, Kept] = {}
    for (module, tensor, dim), gone in plan.items():
        name = names[id(getattr(model.get_submodule(module), tensor))]
        stays = torch.ones(snapshot.tensors[name].shape[dim], dtype=torch.bool)
        stays[gone] = False
        kept.setdefault(name, {})[dim] = stays.nonzero().flatten()
    states: list[dict[str, Any]] = []
    for optimizer, state in zip(optimizers, snapshot.optimizers, strict=True):
        params = [names.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
        keys = [key for group in state["param_groups"] for key in group["params"]]
        new = dict(state["state"])
        for key, name in zip(keys, params, strict=True):
            if name in kept and key in new:
                its = _cut_state(new[key], snapshot.tensors[name].shape, kept[name], type(optimizer).__name__)
                new[key] = {**new[key], **its}
        states.append({**state, "state": new})

    def cut_tensors(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        its = ((name, kept.get(name.removeprefix(prefix)), t) for name, t in tensors.items())
        return {name: t if dims is None else _sliced(t, dims) for name, dims, t in its}

    averages = [cut_tensors(average, "module.") for average in snapshot.averages]
    return replace(snapshot, tensors=cut_tensors(snapshot.tensors), optimizers=states, averages=averages)


@torch.no_grad()
def reshape(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Give a full-size model the shapes of a cut one's `state_dict`; what the new tensors hold is undefined.

    Raises:
        ValueError: when a tensor is there in other dimensions, or larger than in the model. Nothing is
            changed then.
    """
    new: dict[int, tuple[Tensor, Tensor]] = {}
    own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in own:
        there = state_dict.get(name)
        if not isinstance(there, Tensor) or there.shape == tensor.shape:
            continue
        if there.dim() != tensor.dim() or any(a > b for a, b in zip(there.shape, tensor.shape, strict=True)):
            raise ValueError(
                f"{name} is {tuple(there.shape)} in the checkpoint and {tuple(tensor.shape)} in "
                f"{type(model).__name__}; allowed is what a cut leaves of it. Use the full-size model that "
                "was pruned."
            )
        fresh = torch.empty_like(tensor.new_empty(there.shape), memory_format=_memory_format(tensor))
        new[id(tensor)] = (tensor, fresh)
    _prepare(model, new, {}).commit()


def load_pruned(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a checkpoint of a cut network into a freshly built, full-size model, which becomes as small.

    Needs neither Lightning nor torch-pruning: the shapes in the file say what was cut.

    Args:
        model: the model as it was built before pruning; changed in place.
        path: a Lightning checkpoint, or a file with a `state_dict`.

    Returns:
        The model.

    Raises:
        ValueError: when the names or dimensions in the file are not the model's. It is unchanged then.
    """
    stored = torch.load(path, map_location="cpu", weights_only=True)
    state = stored.get("state_dict", stored)
    if different := sorted(set(state) ^ set(model.state_dict())):
        where = "file" if different[0] in state else "model"
        raise ValueError(
            f"path={str(path)!r}: {different[0]} is only in the {where}, as are {len(different) - 1} other "
            f"names in one of the two; allowed is a checkpoint of {type(model).__name__}. Load one."
        )
    reshape(model, state)
    model.load_state_dict(state)
    return model
