"""Channels: which of a network's channels are coupled, and the plan that removes some of them.

torch-pruning's dependency graph says how channels of one layer lie in the layers around it, and nothing else;
what may be removed is tried on a copy first. A unit is the smallest set of channels that can go alone: one
channel, or one of every group of a grouped convolution. Sparsity, allocation and ties speak of units.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten, tree_map

from lightning_prune import rng
from lightning_prune.layers import matching
from lightning_prune.masks import Masks
from lightning_prune.structured import surgery
from lightning_prune.structured.surgery import Plan, Site, cut

HEAD = "its channels are an output of the model"


@dataclass(frozen=True)
class Channels:
    """Coupled channels: what has to go from each tensor with each unit."""

    name: str  # of the weight of the first layer that makes them
    units: int
    sites: dict[Site, tuple[Tensor, Tensor]]  # indices along the dimension, and the unit of each
    filters: tuple[Site, ...]  # those of the sites that are outputs of the weights that make the channels
    scales: tuple[Site, ...]  # those that are scales of batch normalizations
    structure: tuple[str, ...]  # equal in groups that are coupled alike

    @property
    def per_unit(self) -> int:
        """Channels of the first layer in a unit."""
        return len(self.sites[self.filters[0]][0]) // self.units


Groups = dict[str, Channels]


def parameter(site: Site) -> str:
    """The name of a site's tensor in the model."""
    return f"{site[0]}.{site[1]}" if site[0] else site[1]


# ------------------------------------------------------------------------------------------------- discovery


def discover(
    model: nn.Module,
    example: Any,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Groups:
    """The coupled channels of a model that may be removed, by name; each tried on a copy.

    Channels that are outputs of the model stay. A trial removes half of the units: the copy must run, in
    training and in evaluation, give outputs of the same shapes, and those of the network in which the same
    channels are zero. Its weights are drawn anew, so that no zero or saturated one hides an error. Groups
    that fail are left out, with a warning that names them.

    Args:
        model: any module; it is not changed, nor are the random number generators.
        example: an input: a tensor, its shape as a list, a tuple of arguments or a dict of keyword arguments.
        include: fnmatch patterns over weight names; only channels that one of these makes.
        exclude: fnmatch patterns over weight names; no channels that one of these makes.

    Raises:
        ValueError: when a pattern matches nothing, the model cannot be traced, or no channels are left.
        ImportError: without torch-pruning.

    Reference: Fang et al. (2023), "DepGraph", arXiv:2301.12900.
    """
    _check_traceable(model)
    generators = rng.capture()
    try:
        device = next(model.parameters()).device.type
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            copy, example = _synthetic(model, as_input(example))
            found, reasons = _coupled(copy, _trace(copy, example))
            heads = _heads(copy)
            found |= heads
            reasons = {name: reason for name, reason in reasons.items() if name not in heads}
            found = _chosen(found, include, exclude)
            copy.requires_grad_(False)
            good = {name: group for name, group in found.items() if name not in reasons}
            reasons |= _trial(copy, example, good)
    finally:
        rng.restore(generators)
    skipped = {name: reason for name, reason in reasons.items() if name in found and reason != HEAD}
    shown = "; ".join(
        f"{reason}: {', '.join(name for name in skipped if skipped[name] == reason)}"
        for reason in dict.fromkeys(skipped.values())
    )
    good = {name: group for name, group in good.items() if name not in reasons and group.units > 1}
    if not good:
        raise ValueError(
            f"{type(model).__name__} has no channels to remove. {shown or 'All are its outputs.'} "
            "Use IterativeMagnitudePruning, which needs no structure."
        )
    if skipped:
        warnings.warn(f"channels left as they are: {shown}. Exclude them to silence this.", stacklevel=2)
    return good


def _check_traceable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_parametrized(module) or hasattr(module, "weight_g"):
            what = "is parametrized (weight_norm, spectral_norm, ...)"
        elif hasattr(module, "weight_mask"):
            what = "carries a mask of torch.nn.utils.prune"
        elif any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(False)):
            what = "is not initialized yet"
        else:
            continue
        raise ValueError(
            f"module {name!r} {what}; allowed are plain weights. Remove it first, or "
            "run the model once where it is lazy."
        )


def _synthetic(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """A copy in full precision, all of it trained, with random weights; and the example to go with it."""
    copy = deepcopy(model).float().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    draw = lambda t, a, b: t.data.copy_(torch.empty(t.shape).uniform_(a, b, generator=generator))  # noqa: E731
    for name, p in copy.named_parameters():
        if p.dim() > 1:  # variance 2 / inputs
            bound = math.sqrt(6 * p.shape[0] / max(1, p.numel()))
            draw(p, -bound, bound)
        else:
            draw(p, *((0.5, 1.5) if name.endswith("weight") else (-0.2, 0.2)))
    for name, buffer in copy.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            draw(buffer, *((-0.2, 0.2) if name.endswith("mean") else (0.5, 1.5)))
    device = next(copy.parameters()).device
    here = tree_map(lambda t: t.detach().to(device) if isinstance(t, Tensor) else t, example)
    return copy, _floating(here, torch.float32)


def as_input(example: Any) -> Any:
    """An example input; numbers in [0, 1) of a shape, where that is given as a list."""
    if not isinstance(example, list) or not all(isinstance(size, int) for size in example):
        return example
    return torch.rand(example, generator=torch.Generator().manual_seed(0))


def run(model: nn.Module, example: Any, training: bool = False) -> Any:
    """Run the model; in training its branches are those of training, its layers still those of evaluation."""
    for module in model.modules():
        module.training = training and bool(module._modules)
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def _trace(model: nn.Module, example: Any) -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "StructuredChannelPruning needs torch-pruning to find coupled channels, and it is not installed: "
            "pip install torch-pruning==1.6.1."
        ) from error
    failures: list[str] = []
    for training in (True, False):  # auxiliary heads run in training only; some models need targets there
        forward: Any = lambda model, example, training=training: [  # noqa: E731
            t
            for t in tree_flatten(run(model, example, training))[0]
            if isinstance(t, Tensor) and t.requires_grad
        ]
        graph = torch_pruning.DependencyGraph()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return graph.build_dependency(model, example, forward_fn=forward, verbose=False)
        except Exception as error:  # torch-pruning meets an architecture that it does not know in many ways
            failures.append(f"{type(error).__name__}: {error}")
    raise ValueError(
        f"{type(model).__name__} is refused: its channels cannot be traced ({failures[-1]}). Allowed are "
        "models whose forward runs on the example input, made of layers that torch-pruning knows. Use "
        "IterativeMagnitudePruning instead."
    )


def _coupled(model: nn.Module, graph: Any) -> tuple[Groups, dict[str, str]]:
    """All coupled channels by the name of their first weight, and why some of them cannot be removed."""
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    parent: list[int] = []
    roots: list[nn.Module] = []
    lost: set[int] = set()
    widest = max(size for p in model.parameters() for size in p.shape)  # no layer has more channels
    tags: dict[tuple[Any, Any], dict[int, int]] = defaultdict(dict)

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(i: int, j: int) -> None:
        if i != j:
            i, j = sorted((find(i), find(j)))
            parent[j] = i

    # torch-pruning walks once for each group and forgets where two channels of a group meet; one walk over
    # all of them is linear, and joins what meets into one unit
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or module not in graph.module2node:
            continue
        node = graph.module2node[module]
        makes = graph.get_pruner_of_module(module).prune_out_channels
        new = [i for i in range(module.weight.shape[out_dimension(module)]) if i not in tags[node, makes]]
        start = len(parent)
        parent.extend(range(start, start + len(new)))
        roots.extend([module] * len(new))
        stack = [(node, makes, [_index(i, start + k) for k, i in enumerate(new)])]
        while stack:
            target, fn, channels = stack.pop()
            seen, unseen = tags[target, fn], []
            for channel in channels:
                if channel.idx in seen:
                    join(seen[channel.idx], channel.root_idx)
                else:
                    seen[channel.idx] = channel.root_idx
                    unseen.append(channel)
            for dep in target.dependencies if unseen else ():
                if dep.is_triggered_by(fn):
                    mapped = unseen
                    for mapping in dep.index_mapping:
                        mapped = mapping(mapped) if mapping is not None else mapped
                    lost |= {channel.root_idx for channel in mapped if not 0 <= channel.idx < widest}
                    mapped = [channel for channel in mapped if 0 <= channel.idx < widest]
                    stack.append((dep.target, dep.handler, mapped))

    places: dict[Site, dict[int, int]] = defaultdict(dict)
    making: set[Site] = set()
    scaling: set[Site] = set()
    kinds: dict[Site, str] = {}
    why = dict.fromkeys(lost, "tracing lost them at a reshape")
    for (node, fn), seen in tags.items():
        tensors, reason = _tensors(graph, node, fn)
        for tensor, dim, period, made in tensors:
            module_name, _, tensor_name = names[id(tensor)].rpartition(".")
            site = (module_name, tensor_name, dim)
            kinds[site] = f"{node.type}.{tensor_name}.{dim}"
            making |= {site} if made else set()
            if isinstance(node.module, nn.modules.batchnorm._NormBase) and tensor is node.module.weight:
                scaling.add(site)
            its, aligned = places[site], dict[int, int]()
            end = tensor.shape[dim] * (1 if made or dim != 1 else getattr(node.module, "groups", 1))
            for i, element in seen.items():
                if not 0 <= i < end:
                    reason = f"tracing lost them on the way to {parameter(site)}"
                    continue
                place = i if made else i % tensor.shape[dim]
                join(its.setdefault(place, element), element)
                join(aligned.setdefault(i % period, element), element)  # as many of every group
        if reason:
            why.update((element, reason) for element in seen.values())
    unit = [find(element) for element in range(len(parent))]
    owner = [names[id(root.weight)] for root in roots]
    groups = _grouped(unit, owner, places, making, scaling, kinds)
    reasons = {owner[unit[element]]: reason for element, reason in why.items()}
    return groups, reasons | {owner[unit[element]]: HEAD for element, reason in why.items() if reason == HEAD}


def _index(idx: int, root: int) -> Any:
    from torch_pruning._helpers import _HybridIndex

    return _HybridIndex(idx=idx, root_idx=root)


def out_dimension(module: nn.Module) -> int:
    """The dimension of a layer's weight along which its outputs lie."""
    return 1 if getattr(module, "transposed", False) else 0


def _tensors(graph: Any, node: Any, fn: Any) -> tuple[list[tuple[Tensor, int, int, bool]], str]:
    """Where the channels of a node lie, (tensor, dimension, size of a group, made here), or why they stay."""
    module = node.module
    pruner = graph.get_pruner_of_module(module)
    makes = fn == pruner.prune_out_channels
    if not node.outputs and (makes or not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))):
        return [], HEAD
    if isinstance(module, nn.Parameter):
        return [(module, node.pruning_dim, module.shape[node.pruning_dim], False)], ""
    if isinstance(module, nn.Linear) or (isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1):
        dim = out_dimension(module) if makes else 1 - out_dimension(module)
        bias = [] if module.bias is None or not makes else [(module.bias, 0, len(module.bias), True)]
        return [(module.weight, dim, module.weight.shape[dim], makes), *bias], ""
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.transposed or (module.groups == module.in_channels != module.out_channels):
            return [], "grouped transposed convolutions and depthwise multipliers are not supported"
        if module.groups == module.in_channels or makes:
            period = module.out_channels // (1 if module.groups == module.in_channels else module.groups)
            own = (module.weight, module.bias)
            # a depthwise convolution passes channels on, and its filters are scored with them
            return [(t, 0, period, True) for t in own if t is not None], ""
        return [(module.weight, 1, module.weight.shape[1], False)], ""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        own = (module.weight, module.bias, module.running_mean, module.running_var)
        return [(t, 0, len(t), False) for t in own if t is not None], ""
    if isinstance(module, nn.PReLU):
        return [(module.weight, 0, len(module.weight), False)] * (len(module.weight) > 1), ""
    if isinstance(module, nn.Embedding):
        return [(module.weight, 1, module.weight.shape[1], False)], ""
    kind = type(module).__name__
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return [], f"{kind} takes its mean over them"
    if not kind.startswith("_"):
        return [], f"{kind} is not supported"
    operation = str(getattr(node.grad_fn, "name", str)()).lower()
    if any(word in operation for word in ("scaleddot", "bmm")):
        return [], "attention multiplies them with each other"
    return [], ""


def _grouped(
    unit_of: Sequence[int],
    owner: Sequence[str],
    places: Mapping[Site, Mapping[int, int]],
    making: set[Site],
    scaling: set[Site],
    kinds: Mapping[Site, str],
) -> Groups:
    units: dict[str, dict[int, int]] = defaultdict(dict)
    sites: dict[str, dict[Site, tuple[list[int], list[int]]]] = defaultdict(dict)
    for site, at in places.items():
        for index, element in sorted(at.items()):
            unit = unit_of[element]
            name = owner[unit]
            indices, its = sites[name].setdefault(site, ([], []))
            indices.append(index)
            its.append(units[name].setdefault(unit, len(units[name])))
    found: Groups = {}
    for name, its in sorted(sites.items(), key=lambda item: min(units[item[0]])):
        filters = [site for site in its if site in making and site[1] == "weight"]
        filters.sort(key=lambda site: parameter(site) != name)
        tensors = {site: (torch.tensor(i), torch.tensor(u)) for site, (i, u) in its.items()}
        scales = tuple(site for site in its if site in scaling)
        structure = tuple(sorted(kinds[site] for site in its))
        found[name] = Channels(name, len(units[name]), tensors, tuple(filters), scales, structure)
    return found


def _heads(model: nn.Module) -> Groups:
    """Attention heads, which go as a whole, where the module says how many it has."""
    found: Groups = {}
    for name, module in model.named_modules():
        if (its := surgery.attention(module)) is not None:
            qkv, proj = (f"{name}.{layer}".lstrip(".") for layer in ("qkv", "proj"))
            wide = torch.arange(its.proj.in_features)
            head = wide // its.head_dim
            of_all = torch.arange(3 * len(wide)), head.repeat(3)  # queries, keys, values
            made: list[Site] = [(qkv, n, 0) for n, _ in its.qkv.named_parameters()]
            sites = {**dict.fromkeys(made, of_all), (proj, "weight", 1): (wide, head)}
            weight = f"{qkv}.weight"
            found[weight] = Channels(weight, its.num_heads, sites, (made[0],), (), ("heads",))
    return found


def _chosen(groups: Groups, include: Sequence[str] | None, exclude: Sequence[str] | None) -> Groups:
    weights = list(dict.fromkeys(parameter(site) for group in groups.values() for site in group.filters))
    kept = set(weights if include is None else matching(weights, "include", include))
    gone = set(matching(weights, "exclude", exclude or []))
    made = {name: {parameter(site) for site in group.filters} for name, group in groups.items()}
    return {name: groups[name] for name, its in made.items() if its & kept and not its & gone}


@torch.no_grad()
def _trial(model: nn.Module, example: Any, groups: Groups) -> dict[str, str]:
    """Why each group that fails does: all are tried at once, and halves of them where that fails."""
    if not groups or not (reason := _fails(model, example, groups)):
        return {}
    if len(groups) == 1:
        return dict.fromkeys(groups, reason)
    items = list(groups.items())
    halves = dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])
    failed = _trial(model, example, halves[0]) | _trial(model, example, halves[1])
    good = {name: group for name, group in items if name not in failed}
    if good and len(good) < len(groups):
        reason = _fails(model, example, good)
    return dict.fromkeys(groups, reason) if good and reason else failed  # each alone works, and not together


def _fails(model: nn.Module, example: Any, groups: Groups) -> str:
    generator = torch.Generator().manual_seed(0)
    alive = {n: torch.rand(g.units, generator=generator).argsort() >= g.units // 2 for n, g in groups.items()}
    removed, copy = plan(groups, alive), deepcopy(model)
    for site, gone in removed.items():
        tensor = getattr(copy.get_submodule(site[0]), site[1])
        if isinstance(tensor, nn.Parameter):
            tensor.index_fill_(site[2], gone.to(tensor.device), 0)
    want = _outputs(copy, example)
    try:
        cut(copy, removed)
        got = _outputs(copy, example)
    except Exception as error:  # whatever a model's forward raises on tensors of another size
        return (
            f"without half of them the model fails with {type(error).__name__}: {str(error).splitlines()[0]}"
        )
    if [t.shape for t in got] != [t.shape for t in want]:
        return "without half of them the model's output has another shape"
    if not (far := _relative(want, got)) <= 1e-5:  # NaN, too
        if next(model.parameters()).dtype != torch.float64:
            with suppress(Exception):  # rounding in a deep network with drawn weights may be as large
                return _fails(deepcopy(model).double(), _floating(example, torch.float64), groups)
        return f"a network without half of them is not that in which they are zero (relatively, by {far:.2g})"
    try:
        run(model, example, training=True)
    except Exception:  # a model that wants targets in training, say, has nothing to be compared with
        return ""
    try:
        run(copy, example, training=True)
    except Exception as error:
        return f"in training mode the model fails without half of them: {str(error).splitlines()[0]}"
    return ""


def _floating(example: Any, dtype: torch.dtype) -> Any:
    of = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    return tree_map(of, example)


def _relative(want: list[Tensor], got: list[Tensor]) -> float:
    scale = max((float(t.abs().max()) for t in want if t.numel()), default=0.0)
    far = max((float((a - b).abs().max()) for a, b in zip(want, got, strict=True) if a.numel()), default=0.0)
    return far / scale if scale else math.inf


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    torch.manual_seed(0)  # the generators are put back by the caller
    return [t.double() for t in tree_flatten(run(model, example))[0] if isinstance(t, Tensor)]


# --------------------------------------------------------------------------------------------------- the plan


def plan(groups: Groups, alive: Masks) -> Plan:
    """What goes from each tensor: the indices of all units that are not alive."""
    gone: dict[Site, list[Tensor]] = defaultdict(list)
    for name, group in groups.items():
        dead = ~alive[name].cpu()
        for site, (indices, units) in group.sites.items():
            gone[site].append(indices[dead[units]])
    every = {site: torch.cat(parts).sort().values for site, parts in gone.items()}
    return {site: indices for site, indices in every.items() if len(indices)}


def after(groups: Groups, alive: Masks) -> Groups:
    """The groups in the coordinates of the network that the plan leaves."""
    removed, found = plan(groups, alive), Groups()
    for name, group in groups.items():
        number = alive[name].cpu().cumsum(0) - 1
        sites: dict[Site, tuple[Tensor, Tensor]] = {}
        for site, (indices, units) in group.sites.items():
            stay = alive[name].cpu()[units]
            shift = torch.searchsorted(removed[site], indices[stay]) if site in removed else 0
            sites[site] = (indices[stay] - shift, number[units[stay]])
        left = int(alive[name].sum())
        found[name] = Channels(name, left, sites, group.filters, group.scales, group.structure)
    return found


def weight_masks(groups: Groups, alive: Masks, params: Mapping[str, Tensor]) -> Masks:
    """The plan as masks of the parameters: True where a weight stays."""
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    for site, gone in plan(groups, alive).items():
        if (mask := masks.get(parameter(site))) is not None:
            mask.index_fill_(site[2], gone.to(mask.device), False)
    return masks


def parameters(groups: Groups, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a removal of channels touches, by name, in the model's order."""
    touched = {parameter(site) for group in groups.values() for site in group.sites}
    return {name: p for name, p in model.named_parameters() if name in touched}
