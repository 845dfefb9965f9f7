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
    unit_of = [walk.find(element) for element in range(len(walk.parent))]
    owner = [names.get(id(m.weight), layers[id(m)]) for m in walk.maker]
    for element, why in sorted(walk.why.items(), key=lambda item: _rank(item[1])):
        reasons[owner[unit_of[element]]] = why
    return _grouped(unit_of, owner, places), reasons


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


@dataclass(frozen=True)
class _Walk:
    """Elements, one for each channel that a layer makes, and where they lie; those that meet are joined."""

    parent: list[int] = field(default_factory=list[int])  # of an element; a root is its own: a union-find
    maker: list[Any] = field(default_factory=list[Any])  # the layer that makes an element
    why: dict[int, str] = field(default_factory=dict[int, str])  # elements that stay, and the reason
    # (node, what is done to it) -> {index of a channel there: element}
    found: dict[tuple[Any, Any], dict[int, int]] = field(default_factory=lambda: defaultdict(dict))

    def find(self, i: int) -> int:
        """The first of the elements that are joined with this one."""
        parent = self.parent
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(self, i: int, j: int) -> None:
        """These go together."""
        if i != j:
            i, j = sorted((self.find(i), self.find(j)))
            self.parent[j] = i


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
    from torch_pruning._helpers import _HybridIndex  # an index, and the element that it came from

    walk = _Walk()
    for module in makers:
        node, makes = graph.module2node[module], graph.get_pruner_of_module(module).prune_out_channels
        size = module.weight.shape[out_dimension(module)]
        new = [i for i in range(size) if i not in walk.found[node, makes]]
        start = len(walk.parent)
        walk.parent.extend(range(start, start + len(new)))
        walk.maker.extend([module] * len(new))
        stack = [(node, makes, [_HybridIndex(idx=i, root_idx=start + k) for k, i in enumerate(new)])]
        while stack:
            target, fn, channels = stack.pop()
            seen, unseen = walk.found[target, fn], []
            for channel in channels:
                if channel.idx in seen:
                    walk.join(seen[channel.idx], channel.root_idx)
                else:
                    seen[channel.idx] = channel.root_idx
                    unseen.append(channel)
            if id(target) in misread:
                walk.why.update((channel.root_idx, LOST) for channel in channels)
                continue
            for dependency in target.dependencies if unseen else ():
                if dependency.is_triggered_by(fn):
                    mapped = _mapped(dependency, unseen, widest, walk.why)
                    stack.append((dependency.target, dependency.handler, mapped))
    return walk


def _mapped(dependency: Any, channels: list[Any], widest: int, why: dict[int, str]) -> list[Any]:
    """Channels in the coordinates of the next node, without those that are lost on the way."""
    mapped = channels
    try:
        for mapping in dependency.index_mapping:
            mapped = mapping(mapped) if mapping is not None else mapped
        if any(channel.root_idx is None for channel in mapped):  # it forgets them at an expansion
            raise LookupError
        lost = [channel for channel in mapped if not 0 <= channel.idx < widest]
    except (ArithmeticError, LookupError, TypeError):  # torch-pruning misread a reshape or a split
        mapped, lost = [], channels
    if lost:
        why.update((channel.root_idx, LOST) for channel in lost)
        mapped = [channel for channel in mapped if 0 <= channel.idx < widest]
    return mapped


# ------------------------------------------------------------------------------------------------- the places


@dataclass(frozen=True)
class _Place:
    """A site that channels lie at."""

    kind: str
    makes: bool  # an output of a weight that makes channels, or of the bias
    scales: bool  # a scale of a batch normalization
    element: dict[int, int] = field(default_factory=dict[int, int])  # of each index


def _places(graph: Any, walk: _Walk, names: Mapping[int, str]) -> dict[Site, _Place]:
    """Where the elements of a walk lie in the model's tensors; joins those that lie at the same index.

    Args:
        graph: torch-pruning's.
        walk: reasons are added to it.
        names: of the model's parameters and buffers, by identity.
    """
    places: dict[Site, _Place] = {}
    for (node, fn), seen in walk.found.items():
        tensors, reason = _tensors(graph, node, fn)
        makes = graph.get_pruner_of_module(node.module).prune_out_channels
        if (many := _multiplier(node.module)) and fn != makes:  # so many outputs of each channel go with it
            outputs = walk.found.get((node, makes), {})
            for i, element in seen.items():
                for j in range(i * many, (i + 1) * many):
                    walk.join(outputs.get(j, element), element)
                    reason = reason if j in outputs else LOST
        for tensor, dim, period, makes in tensors:
            if id(tensor) not in names:
                reason = COMPUTED
                continue
            module_name, _, tensor_name = names[id(tensor)].rpartition(".")
            site = (module_name, tensor_name, dim)
            scales = isinstance(node.module, Norm) and tensor is node.module.weight
            kind = f"{node.type}.{tensor_name}.{dim}"
            old = places.get(site, _Place(kind, makes, scales))
            place = places[site] = _Place(kind, makes or old.makes, scales or old.scales, old.element)
            aligned: dict[int, int] = {}
            end = tensor.shape[dim] * (1 if makes or dim != 1 else getattr(node.module, "groups", 1))
            for i, element in seen.items():
                if not 0 <= i < end:
                    reason = LOST
                    continue
                index = i if makes else i % tensor.shape[dim]
                walk.join(place.element.setdefault(index, element), element)
                walk.join(aligned.setdefault(i % period, element), element)  # as many of every group
            if isinstance(node.module, nn.GroupNorm):  # a group goes as a whole, so its mean is nobody else's
                wide = len(node.module.weight) // node.module.num_groups
                for i, element in seen.items():
                    walk.join(seen.get(i - i % wide, element), element)
                if len(seen) < len(node.module.weight):
                    reason = f"{type(node.module).__name__} takes its mean over them and over others"
        for element in seen.values() if reason else ():
            walk.why[element] = max(reason, walk.why.get(element, ""), key=_rank)
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
    if not kind.startswith("_"):
        return f"{kind} is not supported"
    operation = str(getattr(node.grad_fn, "name", str)()).lower()
    if any(word in operation for word in ("scaleddot", "bmm")):
        return "attention multiplies them with each other"
    return ""


def _grouped(unit_of: Sequence[int], owner: Sequence[str], places: Mapping[Site, _Place]) -> Couplings:
    units: dict[str, dict[int, int]] = defaultdict(dict)
    sites: dict[str, dict[Site, tuple[list[int], list[int]]]] = defaultdict(dict)
    for site, place in places.items():
        of_owner: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for index, element in sorted(place.element.items()):
            of_owner[owner[unit_of[element]]].append((index, unit_of[element]))
        for name, those in of_owner.items():
            known = units[name]
            numbers = [known.setdefault(unit, len(known)) for _, unit in those]
            sites[name][site] = [index for index, _ in those], numbers
    found: Couplings = {}
    for name, lists in sorted(sites.items(), key=lambda item: min(units[item[0]])):
        filters = [site for site in lists if places[site].makes and site[1] == "weight"]
        filters.sort(key=lambda site: parameter(site) != name)
        tensors = {site: (torch.tensor(i), torch.tensor(u)) for site, (i, u) in lists.items()}
        scales = tuple(site for site in lists if places[site].scales)
        structure = tuple(sorted(places[site].kind for site in lists))
        found[name] = Coupling(name, len(units[name]), tensors, tuple(filters), scales, structure)
    return found
