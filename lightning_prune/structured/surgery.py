"""Surgery: carry a cut out on a model, its optimizers and all that copies them.

A cut says for each (module, tensor, dimension) which indices go. It is plain data: nothing here knows how it
was found. Every operation is all or nothing: what will be is computed first, and put in place at the end.
Parameters and buffers keep their identity, so optimizers, schedulers and hooks go on with the same objects.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn.modules.batchnorm import _NormBase as Norm
from torch.nn.modules.conv import _ConvNd as Convolution

from lightning_prune.rewind import Snapshot
from lightning_prune.structured import configuration
from lightning_prune.structured.multihead import FewerHeads

Site = tuple[str, str, int]  # name of a module, name of its parameter or buffer, dimension
Cut = dict[Site, Tensor]  # the indices that go, of the tensor as it is before
Kept = dict[int, Tensor]  # dimension -> the indices that stay, in order

# What these remember is not of the shape of their parameters, from their first step on.
NOT_SLICED = (optim.LBFGS, optim.Adafactor)

# What attentions call the number of their heads, and the channels that all of these have together.
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_key_value_heads")
WIDTHS = ("attn_dim", "all_head_size", "all_head_dim", "split_size", "inner_dim", "inner_kv_dim")
HEADS = (*COUNTS, *WIDTHS, "key_attn_dim", "val_attn_dim", "out_dim")


@dataclass(frozen=True)
class Prepared:
    """What a model will be: nothing is in place yet."""

    tensors: list[tuple[Tensor, Tensor, Tensor | None]]  # the tensor, its new data, its new gradient
    attributes: list[tuple[nn.Module, dict[str, Any]]]

    def commit(self) -> None:
        for tensor, data, grad in self.tensors:
            tensor.grad = None  # one of the old shape would refuse the new data
            tensor.data = _of_kind(data, tensor)
            tensor.grad = grad
        for module, values in self.attributes:
            for name, value in values.items():
                setattr(module, name, value)
            forget(module)


def _of_kind(data: Tensor, tensor: Tensor) -> Tensor:
    """The data as an inference tensor where it is for one, else not as one: a mixture cannot be read."""
    if data.is_inference() == tensor.is_inference():
        return data
    with torch.inference_mode(tensor.is_inference()):
        return data.clone()


def forget(module: nn.Module) -> None:
    """Let a module drop what it keeps for evaluation, as it does in `train()`: biases of attention, say."""
    if type(module).train is not nn.Module.train:
        modes = [(part, part.training) for part in module.modules()]
        module.train()
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def cut(
    model: nn.Module,
    what: Cut,
    optimizers: Iterable[optim.Optimizer] = (),
    copies: Iterable[nn.Module] = (),
) -> None:
    """Take channels out of a model, its gradients, its optimizers' states and copies of it.

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
        what: what goes from each tensor, see `lightning_prune.structured.cut_of`.
        optimizers: those that step the model. What they keep for a parameter is cut as the parameter is.
        copies: modules with the tensors of `model` under the same names, such as averaged weights.

    Raises:
        ValueError: when the cut is not one of this model, or an optimizer keeps what cannot be cut with its
            parameter. Nothing is changed then.
    """
    optimizers = list(optimizers)
    check_optimizers(optimizers)
    prepared: list[Prepared] = []
    with torch.inference_mode(False):  # or nobody could train what was cut in it
        for module in (model, *copies):
            kept = _kept(module, what)
            new = {id(t): (t, _sliced(t, dims)) for t, dims in kept.values()}
            grads = {id(t): _sliced(t.grad, dims) for t, dims in kept.values() if t.grad is not None}
            prepared.append(prepare(module, new, grads))
        states = _cut_states(optimizers, _kept(model, what))
    for ready in prepared:
        ready.commit()
    for state, values in states:
        state.update(values)
    for module in (model, *copies):
        configuration.follow(module)


def smaller(model: nn.Module, what: Cut) -> Prepared:
    """What a model will be after a cut; gradients and optimizers are left alone."""
    kept = _kept(model, what)
    return prepare(model, {id(t): (t, _sliced(t, dims)) for t, dims in kept.values()}, {})


@contextmanager
def within(ready: Prepared) -> Generator[None, None, None]:
    """Inside, what was prepared is in place; afterwards what there was before."""
    before = [(m, {name: getattr(m, name) for name in values}) for m, values in ready.attributes]
    undo = Prepared([(t, t.data, t.grad) for t, _, _ in ready.tensors], before[::-1])
    ready.commit()
    try:
        yield
    finally:
        undo.commit()


@contextmanager
def zeroed(model: nn.Module, what: Cut) -> Generator[None, None, None]:
    """Inside, what would go from parameters is zero; afterwards the model is as it was."""
    before: dict[int, tuple[Tensor, Tensor]] = {}
    for (module, name, dim), gone in what.items():
        tensor = getattr(model.get_submodule(module), name)
        if isinstance(tensor, nn.Parameter):
            if id(tensor) not in before:
                before[id(tensor)] = tensor, tensor.data
                tensor.data = tensor.data.clone()
            tensor.data.index_fill_(dim, gone.to(tensor.device), 0)
    try:
        yield
    finally:
        for tensor, data in before.values():
            tensor.data = data


def in_a_graph(p: nn.Parameter) -> bool:
    """Whether a graph of an earlier forward pass is kept, in which a parameter has the shape that it had."""
    if not p.requires_grad:
        return False

    def remembered() -> dict[str, Any]:
        with torch.enable_grad():
            node: Any = p.view_as(p).grad_fn  # of one node of the parameter, which lives as long as a graph
        return node.next_functions[0][0].metadata

    remembered()["lightning_prune"] = True
    return "lightning_prune" in remembered()


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


def _kept(model: nn.Module, what: Cut) -> dict[int, tuple[Tensor, Kept]]:
    """Which indices of which tensors stay, by identity of the tensor."""
    found: dict[int, tuple[Tensor, Kept]] = {}
    for (module, name, dim), gone in what.items():
        try:
            tensor = getattr(model.get_submodule(module), name)
            size = tensor.shape[dim]
        except (AttributeError, IndexError):
            raise ValueError(
                f"cut: {type(model).__name__} has no tensor {name} with dimension {dim} in its module "
                f"{module!r}; allowed are those it has. Make the cut for this model."
            ) from None
        found.setdefault(id(tensor), (tensor, {}))[1][dim] = _staying(gone, size, f"{module}.{name}", dim)
    return found


def _staying(gone: Tensor, size: int, name: str, dim: int) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    if len(gone) and not 0 <= int(gone.min()) <= int(gone.max()) < size:
        raise ValueError(
            f"cut: indices {gone.tolist()} of {name}, dimension {dim}, of size {size}; allowed "
            f"are 0 to {size - 1}. Make another cut if this was carried out."
        )
    stays[gone] = False
    if not stays.any():
        raise ValueError(f"cut: nothing would be left of {name}; one channel at least is needed. Keep one.")
    return stays.nonzero().flatten()


def cut_tensors(tensors: Mapping[str, Tensor], what: Mapping[tuple[str, int], Tensor]) -> dict[str, Tensor]:
    """Tensors by name without the indices {(name, dimension): indices}; nothing that was given is changed.

    >>> cut_tensors({"w": torch.arange(4), "b": torch.arange(2)}, {("w", 0): torch.tensor([1, 2])})
    {'w': tensor([0, 3]), 'b': tensor([0, 1])}

    Raises:
        ValueError: when a tensor has no such indices.
    """
    kept: dict[str, Kept] = {}
    for (name, dim), gone in what.items():
        if name in tensors:
            size = tensors[name].shape[dim] if dim < tensors[name].dim() else 0
            kept.setdefault(name, {})[dim] = _staying(gone, size, name, dim)
    return {name: _sliced(t, kept[name]) if name in kept else t for name, t in tensors.items()}


def _sliced(tensor: Tensor, kept: Kept) -> Tensor:
    """The tensor at the kept indices, in its own memory format."""
    new = tensor.detach()
    for dim, index in kept.items():
        new = new.index_select(dim, index.to(tensor.device))
    return new.contiguous(memory_format=memory_format(tensor))


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Channels last, where the tensor is stored so, else contiguous."""
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
            new = _cut_state(state, kept[id(p)][0].shape, kept[id(p)][1], type(optimizer).__name__)
            found.append((state, new))
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


def prepare(
    model: nn.Module, new: Mapping[int, tuple[Tensor, Tensor]], grads: Mapping[int, Tensor]
) -> Prepared:
    """What a model will be with other data in some of its tensors.

    Args:
        model: any module.
        new: identity of a tensor -> the tensor and its new data.
        grads: identity of a tensor -> its new gradient; without one it has none.
    """
    attributes: list[tuple[nn.Module, dict[str, Any]]] = []
    for module in model.modules():  # all owners of a tied tensor
        own = {
            **dict(module.named_parameters(recurse=False, remove_duplicate=False)),
            **dict(module.named_buffers(recurse=False, remove_duplicate=False)),
        }
        if any(id(t) in new for t in own.values()):
            shapes = {n: (new[id(t)][1] if id(t) in new else t).shape for n, t in own.items()}
            attributes.append((module, _attributes(module, shapes)))
        if values := _of_layers(module, new):
            attributes.append((module, values))
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, nn.MultiheadAttention) and id(m.in_proj_weight) in new for m in module.modules()
        ):
            attributes.append((module, {"use_nested_tensor": False}))  # for torch's fused path only
    tensors = [(t, data, grads.get(key)) for key, (t, data) in new.items()]
    return Prepared(tensors, attributes)


def inputs_first(module: nn.Module) -> bool:
    """Whether a layer is transformers' `Conv1D`, a linear layer with a weight (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and {"nf", "nx"} <= vars(module).keys()


def _of_layers(module: nn.Module, new: Mapping[int, tuple[Tensor, Tensor]]) -> dict[str, int]:
    """What a module says of its first layer's width: an attention of its heads, others of their channels."""
    own = {name: value for name, value in vars(module).items() if name in HEADS and type(value) is int}
    channels = vars(module).get("channels")
    says = bool(own.keys() & set(COUNTS)) or type(channels) is int
    if not says or isinstance(module, nn.MultiheadAttention):
        return {}
    weights = (getattr(layer, "weight", None) for layer in _layers_of(module))
    layers = (w for w in weights if isinstance(w, Tensor) and w.dim() > 1)
    before, after = new.get(id(next(layers, None)), (None, None))
    if before is None or after is None:
        return {}
    if type(channels) is int:
        return {"channels": after.shape[1]} if before.shape[1] == channels else {}
    dim = int(any(map(inputs_first, module.children())))
    fewer = {name: Fraction(value * after.shape[dim], before.shape[dim]) for name, value in own.items()}
    whole = all(value.denominator == 1 for value in fewer.values())
    return {name: int(value) for name, value in fewer.items()} if whole else {}


def _layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """A module's own layers, and those of its parts that say nothing of heads themselves."""
    for child in module.children():
        yield child
        if not vars(child).keys() & set(COUNTS):
            yield from child.children()


def _attributes(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """What a layer says of its sizes, for tensors of these shapes."""
    weight = shapes.get("weight", torch.Size())
    if isinstance(module, nn.Linear) and len(weight) == 2:
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, Convolution):
        if 1 < module.groups == module.in_channels and not module.transposed:  # depthwise
            groups = weight[0] * module.in_channels // module.out_channels
            return {"out_channels": weight[0], "in_channels": groups, "groups": groups}
        first, second = weight[:2]
        if module.transposed:
            return {"in_channels": first, "out_channels": second * module.groups}
        return {"out_channels": first, "in_channels": second * module.groups}
    if FewerHeads.fits(module) and "in_proj_weight" in shapes:
        heads = shapes["in_proj_weight"][0] // (3 * module.head_dim)  # torch's fused path wants all heads
        return {"__class__": FewerHeads, "num_heads": heads, "_qkv_same_embed_dim": False}
    if inputs_first(module):
        return {"nx": weight[0], "nf": weight[1]}
    if isinstance(module, Norm):
        return {"num_features": next(iter(shapes.values()))[0]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight[0], "num_groups": weight[0] * module.num_groups // module.num_channels}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight[1]}
    return {}


def cut_snapshot(
    snapshot: Snapshot, what: Cut, model: nn.Module, optimizers: Sequence[optim.Optimizer]
) -> Snapshot:
    """The snapshot of an earlier step, cut alike: a structured lottery ticket.

    Args:
        snapshot: taken of `model` and `optimizers` before the cut was carried out; it is not changed.
        what: what goes from each tensor.
        model: the model, before or after the cut.
        optimizers: the optimizers of the snapshot, in its order.
    """
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    by_name = {
        (names[id(getattr(model.get_submodule(module), tensor))], dim): gone
        for (module, tensor, dim), gone in what.items()
    }
    kept: dict[str, Kept] = {}
    for (name, dim), gone in by_name.items():
        kept.setdefault(name, {})[dim] = _staying(gone, snapshot.tensors[name].shape[dim], name, dim)
    states: list[dict[str, Any]] = []
    for optimizer, state in zip(optimizers, snapshot.optimizers, strict=True):
        # groups that came after the snapshot have no part in it
        groups = zip(optimizer.param_groups, state["param_groups"], strict=False)
        params = [names.get(id(p)) for group, _ in groups for p in group["params"]]
        keys = [key for group in state["param_groups"] for key in group["params"]]
        new = dict(state["state"])
        for key, name in zip(keys, params, strict=True):
            if name in kept and key in new:
                shape = snapshot.tensors[name].shape
                smaller = _cut_state(new[key], shape, kept[name], type(optimizer).__name__)
                new[key] = {**new[key], **smaller}
        states.append({**state, "state": new})
    averaged = {(f"module.{name}", dim): gone for (name, dim), gone in by_name.items()}
    return replace(
        snapshot,
        tensors=cut_tensors(snapshot.tensors, by_name),
        optimizers=states,
        averages=[cut_tensors(average, {**by_name, **averaged}) for average in snapshot.averages],
    )
