"""Coupling: which of a network's channels are coupled, found by torch-pruning. Nothing else here knows it.

torch-pruning's dependency graph says how channels of one layer lie in the layers around it, and no more.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as Norm
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm

from lightning_prune.structured.surgery import Site, inputs_first
from lightning_prune.structured.trial import (
    Unsuitable,
    as_one_operation,
    differentiable_outputs,
    first_line,
    refused,
)
from lightning_prune.structured.units import Coupling, Couplings, is_maker, out_dimension, parameter

HEAD = "its channels are an output of the model"
COMPUTED = "a layer computes its weight from others (a weight norm, a mask, another parametrization)"
LOST = "torch-pruning loses them at a split, a reshape or a product"
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def _rank(reason: str) -> int:
    """Of several reasons why channels stay the one of the highest rank is said."""
    return {"": 0, COMPUTED: 2, HEAD: 3}.get(reason, 1)


def coupled(model: nn.Module, example: Any) -> tuple[Couplings, dict[str, str]]:
    """All coupled channels by the name of their first weight, and why some of them cannot be removed.

    Args:
        model: a copy that may be run, with every parameter trained.
        example: an input.

    Returns:
        Couplings, and {name: reason} for channels that stay; some of these have no coupling.

    Raises:
        ValueError: when the model cannot be traced.
        ImportError: without torch-pruning.
    """
    modules = {name: m for name, m in model.named_modules() if is_maker(m)}
    inside = {id(m) for a in model.modules() if isinstance(a, nn.MultiheadAttention) for m in a.modules()}
    graph, ran, misread = _trace(model, example)
    reasons = {
        f"{name}.weight".lstrip("."): "no gradient reaches them from an output (no_grad, detach, argmax)"
        if id(m) in ran
        else "their layer does not run on the example input"
        for name, m in modules.items()
        if m not in graph.module2node and id(m) not in inside
    }
    makers = [m for m in modules.values() if m in graph.module2node]
    walk = _walk(graph, makers, misread, max(size for p in model.parameters() for size in p.shape))
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    layers = {id(m): f"{name}.weight".lstrip(".") for name, m in modules.items()}
    places = _places(graph, walk, names)
    unit_of = _joined(walk.elements, walk.met)
    made = [(names.get(id(m.weight), layers[id(m)]), count) for m, count in walk.made]
    owners = list(dict.fromkeys(name for name, _ in made))  # two layers may share a weight
    owner = np.repeat([owners.index(name) for name, _ in made], [count for _, count in made])
    for elements, why in sorted(walk.why, key=lambda item: _rank(item[1])):
        reasons.update((owners[number], why) for number in np.unique(owner[unit_of[elements]]))
    return _grouped(unit_of, owner, owners, places), reasons


# ---------------------------------------------------------------------------------------------------- tracing


class _Layer:
    """What torch-pruning asks of a layer that it does not know: none of its inputs lies in its outputs."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return layer

    def get_out_channels(self, layer: Any) -> int:
        if inputs_first(layer):
            return layer.nf
        return layer.hidden_size * (1 + bool(getattr(layer, "bidirectional", False)))

    def get_in_channels(self, layer: Any) -> int:
        return layer.weight.shape[0] if inputs_first(layer) else layer.input_size


def _trace(model: nn.Module, example: Any) -> tuple[Any, set[int], set[int]]:
    """torch-pruning's graph, and by identity the layers that ran and the nodes that it cannot read."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "StructuredChannelPruning needs torch-pruning to find coupled channels, and it is not installed: "
            "pip install torch-pruning==1.6.1."
        ) from error
    unknown = [m for m in model.modules() if isinstance(m, RECURRENT) or inputs_first(m)]
    ran: set[int] = set()
    makers = [m for m in model.modules() if is_maker(m)]
    handles = [m.register_forward_hook(lambda m, *_: ran.add(id(m))) for m in makers]
    viewed = [m for m in model.modules() if isinstance(m, InstanceNorm)]  # what comes out is a view
    handles += [m.register_forward_hook(as_one_operation) for m in (*unknown, *viewed)]
    failure = ""
    try:
        for training in (True, False):  # auxiliary heads run in training only; some models want targets there
            graph: Any = torch_pruning.DependencyGraph()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    graph.build_dependency(
                        model,
                        example,
                        forward_fn=partial(differentiable_outputs, training=training),
                        customized_pruners={type(m): _Layer() for m in unknown},
                        verbose=False,
                    )
                return graph, ran, set()
            except Exception as error:  # it meets an architecture that it does not know in many ways
                nodes = _nodes(graph)
                if nodes and all(len(n.dependencies) == len(n.inputs) + len(n.outputs) for n in nodes):
                    return graph, ran, _misread(graph)
                failure = str(error) if isinstance(error, Unsuitable) else first_line(error)
    finally:
        for handle in handles:
            handle.remove()
    raise refused(model, failure)


def _nodes(graph: Any) -> list[Any]:
    return list(getattr(graph, "module2node", {}).values())


def _misread(graph: Any) -> set[int]:
    """The nodes whose indices torch-pruning cannot map to those around them; the others are mapped."""
    from torch_pruning.dependency import index_mapping

    misread: set[int] = set()
    for node in _nodes(graph):
        alone = copy(graph)
        alone.module2node = {node.module: node}
        try:
            index_mapping.update_index_mapping(alone)
        except Exception:  # a division by zero, say, where it takes a reshape for another
            misread.add(id(node))
    return misread


# ----------------------------------------------------------------------------------------------- the one walk


Numbers = npt.NDArray[np.int64]
NONE = np.empty(0, np.int64)


@dataclass
class _Walk:
    """Elements, one for each channel that a layer makes, and where they lie; those that meet go together.

    Arrays say which element lies at each index of a place, -1 where none does.
    """

    elements: int = 0
    made: list[tuple[Any, int]] = field(default_factory=list[tuple[Any, int]])  # layers; how many each makes
    met: list[tuple[Numbers, Numbers]] = field(default_factory=list[tuple[Numbers, Numbers]])
    why: list[tuple[Numbers, str]] = field(default_factory=list[tuple[Numbers, str]])  # those that stay
    # (node, what is done to it) -> the elements there
    found: dict[tuple[Any, Any], Numbers] = field(default_factory=dict[tuple[Any, Any], Numbers])

    def make(self, layer: Any, count: int) -> Numbers:
        """New elements."""
        self.made.append((layer, count))
        self.elements += count
        return np.arange(self.elements - count, self.elements)

    def join(self, some: Numbers, others: Numbers) -> None:
        """These go together, each with the one at its place."""
        differ = some != others
        if differ.any():
            self.met.append((some[differ], others[differ]))

    def put(self, at: Numbers, indices: Numbers, elements: Numbers) -> tuple[Numbers, Numbers]:
        """Put elements where none is and join them with those that are; returns the indices that were free.

        Args:
            at: a place, which is filled; its indices are those that are given, and perhaps more.
            indices: where they go.
            elements: as many.

        Returns:
            The indices that were free, each once, and what is there now.
        """
        is_free = at[indices] < 0
        free = indices[is_free]
        at[free] = elements[is_free]
        if len(free) > 1 and not (free[1:] > free[:-1]).all():
            free = np.unique(free)
        self.join(at[indices], elements)
        return free, at[free]


def _wide(at: Numbers, size: int) -> Numbers:
    """A place with room for so many indices at least."""
    return at if len(at) >= size else np.concatenate([at, np.full(size - len(at), -1)])


def _joined(count: int, met: Sequence[tuple[Numbers, Numbers]]) -> Numbers:
    """Of each element the first of those that it is joined with.

    >>> _joined(5, [(np.array([4, 1]), np.array([1, 2]))]).tolist()
    [0, 1, 1, 3, 1]
    """
    first = np.arange(count)
    if not met:
        return first
    some, others = (np.concatenate(side) for side in zip(*met, strict=True))
    while True:
        a, b = first[some], first[others]
        if (a == b).all():
            return first
        np.minimum.at(first, np.maximum(a, b), np.minimum(a, b))
        while (first != first[first]).any():
            first = first[first]


def _walk(graph: Any, makers: Sequence[Any], misread: set[int], widest: int) -> _Walk:
    """Follow the channels of all layers through the graph.

    torch-pruning walks once for each group and forgets where two channels of a group meet; one walk over all
    of them is linear, and joins what meets into one unit.

    Args:
        graph: torch-pruning's.
        makers: layers in it that make channels.
        misread: nodes, by identity, at which channels are lost.
        widest: no layer has more channels than this.
    """
    walk = _Walk()
    for module in makers:
        node, makes = graph.module2node[module], graph.get_pruner_of_module(module).prune_out_channels
        size = module.weight.shape[out_dimension(module)]
        new = (_wide(walk.found.get((node, makes), NONE), size)[:size] < 0).nonzero()[0]
        stack = [(node, makes, new, walk.make(module, len(new)))]
        while stack:
            target, fn, indices, elements = stack.pop()
            at = _wide(walk.found.get((target, fn), NONE), int(indices.max(initial=-1)) + 1)
            walk.found[target, fn] = at
            new, those = walk.put(at, indices, elements)
            if id(target) in misread:
                walk.why.append((elements, LOST))
                continue
            for dependency in target.dependencies if len(new) else ():
                if dependency.is_triggered_by(fn):
                    mapped = _mapped(dependency, new, those, widest, walk)
                    stack.append((dependency.target, dependency.handler, *mapped))
    return walk


def _mapped(
    dependency: Any, indices: Numbers, elements: Numbers, widest: int, walk: _Walk
) -> tuple[Numbers, Numbers]:
    """Channels in the coordinates of the next node, without those that are lost on the way."""
    mappings = [mapping for mapping in dependency.index_mapping if mapping is not None]
    if mappings:
        from torch_pruning._helpers import _HybridIndex  # an index, and the element that it came from

        try:
            pairs = zip(indices.tolist(), elements.tolist(), strict=True)
            mapped: Any = [_HybridIndex(*pair) for pair in pairs]
            for mapping in mappings:
                mapped = mapping(mapped)
            both = np.array(mapped, np.int64).reshape(-1, 2)  # a TypeError where it forgets the element
        except (ArithmeticError, LookupError, TypeError):  # torch-pruning misread a reshape or a split
            walk.why.append((elements, LOST))
            return NONE, NONE
        indices, elements = both[:, 0], both[:, 1]
    there = (indices >= 0) & (indices < widest)
    if not there.all():
        walk.why.append((elements[~there], LOST))
        indices, elements = indices[there], elements[there]
    return indices, elements


# ------------------------------------------------------------------------------------------------- the places


@dataclass(frozen=True)
class _Place:
    """A site that channels lie at."""

    kind: str
    makes: bool  # an output of a weight that makes channels, or of the bias
    scales: bool  # a scale of a batch normalization
    at: Numbers  # the element at each index, or -1


def _places(graph: Any, walk: _Walk, names: Mapping[int, str]) -> dict[Site, _Place]:
    """Where the elements of a walk lie in the model's tensors; joins those that lie at the same index.

    Args:
        graph: torch-pruning's.
        walk: reasons are added to it.
        names: of the model's parameters and buffers, by identity.
    """
    places: dict[Site, _Place] = {}
    for (node, fn), at in walk.found.items():
        indices = (at >= 0).nonzero()[0]
        elements = at[indices]
        tensors, reason = _tensors(graph, node, fn)
        makes = graph.get_pruner_of_module(node.module).prune_out_channels
        if (many := _multiplier(node.module)) and fn != makes:  # so many outputs of each channel go with it
            theirs = (indices[:, None] * many + np.arange(many)).ravel()
            outputs = _wide(walk.found.get((node, makes), NONE), int(theirs.max(initial=-1)) + 1)[theirs]
            walk.join(outputs[outputs >= 0], elements.repeat(many)[outputs >= 0])
            reason = LOST if (outputs < 0).any() else reason
        for tensor, dim, period, makes in tensors:
            if id(tensor) not in names:
                reason = COMPUTED
                continue
            module_name, _, tensor_name = names[id(tensor)].rpartition(".")
            site, size = (module_name, tensor_name, dim), tensor.shape[dim]
            scales = isinstance(node.module, Norm) and tensor is node.module.weight
            kind = f"{node.type}.{tensor_name}.{dim}"
            old = places.get(site) or _Place(kind, makes, scales, np.full(size, -1))
            place = places[site] = _Place(kind, makes or old.makes, scales or old.scales, old.at)
            inside = indices < size * (1 if makes or dim != 1 else getattr(node.module, "groups", 1))
            reason = reason if inside.all() else LOST
            mine, those = indices[inside], elements[inside]
            walk.put(place.at, mine if makes else mine % size, those)
            if period < len(at):
                walk.put(np.full(period, -1), mine % period, those)  # as many of every group
            if isinstance(node.module, nn.GroupNorm):  # a group goes as a whole, so its mean is nobody else's
                groups, wide = node.module.num_groups, len(node.module.weight)
                walk.put(np.full(groups, -1), mine // (wide // groups), those)
                if len(indices) < wide:
                    reason = f"{type(node.module).__name__} takes its mean over them and over others"
        if reason:
            walk.why.append((elements, reason))
    return places


def _tensors(graph: Any, node: Any, fn: Any) -> tuple[list[tuple[Tensor, int, int, bool]], str]:
    """Where the channels of a node lie, (tensor, dimension, size of a group, made here), or why they stay."""
    module = node.module
    makes = fn == graph.get_pruner_of_module(module).prune_out_channels
    if not node.outputs and (makes or not is_maker(module)):
        return [], HEAD
    if isinstance(module, nn.Parameter):
        return [(module, node.pruning_dim, module.shape[node.pruning_dim], False)], ""
    if is_maker(module) and getattr(module, "groups", 1) == 1:
        dim = out_dimension(module) if makes else 1 - out_dimension(module)
        bias = [] if module.bias is None or not makes else [(module.bias, 0, len(module.bias), True)]
        return [(module.weight, dim, module.weight.shape[dim], makes), *bias], ""
    if isinstance(module, Convolution):
        if module.transposed:
            return [], "grouped transposed convolutions are not supported"
        if _multiplier(module):
            own = (module.weight, module.bias) if makes else ()
            return [(t, 0, len(t), True) for t in own if t is not None], ""
        if module.groups == module.in_channels or makes:
            period = module.out_channels // (1 if module.groups == module.in_channels else module.groups)
            own = (module.weight, module.bias)
            # a depthwise convolution passes channels on, and its filters are scored with them
            return [(t, 0, period, True) for t in own if t is not None], ""
        return [(module.weight, 1, module.weight.shape[1], False)], ""
    if isinstance(module, Norm):
        own = (module.weight, module.bias, module.running_mean, module.running_var)
        return [(t, 0, len(t), False) for t in own if t is not None], ""
    if isinstance(module, nn.GroupNorm) and module.num_groups > 1 and module.affine:
        both = module.named_parameters(recurse=False)
        return [(t, 0, len(t), False) for _, t in both], ""
    if isinstance(module, nn.PReLU):
        return [(module.weight, 0, len(module.weight), False)] * (len(module.weight) > 1), ""
    if isinstance(module, nn.Embedding):
        return [(module.weight, 1, module.weight.shape[1], False)], ""
    return [], _why_not(node)


def _multiplier(module: nn.Module) -> int:
    """How many outputs a depthwise convolution makes of each channel, if it is more than one; else 0."""
    if not isinstance(module, Convolution) or module.transposed or module.groups == 1:
        return 0
    alone = module.groups == module.in_channels != module.out_channels
    return module.out_channels // module.in_channels if alone else 0


def _why_not(node: Any) -> str:
    """Why channels stay that come to a node without tensors of theirs, or nothing."""
    kind = type(node.module).__name__
    if isinstance(node.module, (nn.LayerNorm, nn.GroupNorm)):
        return f"{kind} takes its mean over them"
    if isinstance(node.module, nn.RNNBase):
        return f"{kind} is recurrent, and its layers are not cut"
    if not kind.startswith("_"):
        return f"{kind} is not supported"
    operation = str(getattr(node.grad_fn, "name", str)()).lower()
    if any(word in operation for word in ("scaleddot", "bmm")):
        return "attention multiplies them with each other"
    return ""


def _grouped(
    unit_of: Numbers, owner: Numbers, owners: Sequence[str], places: Mapping[Site, _Place]
) -> Couplings:
    """Couplings by owner, in the order of their first elements; units in the order in which they are met."""
    number, count = np.full(len(unit_of), -1), np.zeros(len(owners), np.int64)
    begins = dict[int, int]()
    sites: dict[int, dict[Site, tuple[Tensor, Tensor]]] = defaultdict(dict)
    for site, place in places.items():
        every = (place.at >= 0).nonzero()[0]
        units = unit_of[place.at[every]]
        for name in np.unique(owner[units]).tolist():
            own = owner[units] == name
            indices, mine = every[own], units[own]
            met, first = np.unique(mine[number[mine] < 0], return_index=True)
            if len(met):
                number[met[first.argsort()]] = count[name] + np.arange(len(met))
                count[name] += len(met)
                begins[name] = min(begins.get(name, len(unit_of)), int(met[0]))
            sites[name][site] = torch.from_numpy(indices), torch.from_numpy(number[mine])
    found: Couplings = {}
    for key, tensors in sorted(sites.items(), key=lambda item: begins[item[0]]):
        name = owners[key]
        filters = [site for site in tensors if places[site].makes and site[1] == "weight"]
        filters.sort(key=lambda site: parameter(site) != name)
        scales = tuple(site for site in tensors if places[site].scales)
        structure = tuple(sorted(places[site].kind for site in tensors))
        found[name] = Coupling(name, int(count[key]), tensors, tuple(filters), scales, structure)
    return found
