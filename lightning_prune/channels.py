"""Channels: which of a network's channels are coupled, how they are scored, and the plan that removes some.

torch-pruning's dependency graph says how channels of one layer lie in the layers around it, and nothing else;
what may be removed is tried on a copy first. A unit is the smallest set of channels that can go alone: one
channel, or one of every group of a grouped convolution. Sparsity, allocation and ties speak of units.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten, tree_map

from lightning_prune import rng
from lightning_prune.allocation import Allocation, AtLeast, alive_per_tensor, apportion, global_rank
from lightning_prune.evidence import asked
from lightning_prune.masks import DEAD, Keep, Masks, Scores, keep_top
from lightning_prune.pruning import Criterion, Sparsity, matching, next_masks, score_weights
from lightning_prune.surgery import Plan, Site, cut

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
        example: an input: a tensor, a tuple of arguments, or a dict of keyword arguments.
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
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(_device(model), enabled=False):
            copy, example = _synthetic(model, example)
            found, reasons = _coupled(copy, _trace(copy, example))
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


def _device(model: nn.Module) -> str:
    return next(iter(model.parameters())).device.type


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
            f"module {name!r} {what}; channels can be removed from plain weights only. Remove it first, or "
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
    full = lambda t: t.detach().to(device, torch.float32 if t.is_floating_point() else t.dtype)  # noqa: E731
    return copy, tree_map(lambda t: full(t) if isinstance(t, Tensor) else t, example)


def _forward(model: nn.Module, example: Any, training: bool = False) -> Any:
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
            "StructuredChannelPruning finds coupled channels with torch-pruning, which is not installed: "
            "pip install 'lightning-prune[channels]'."
        ) from error
    failures: list[str] = []
    for training in (True, False):  # auxiliary heads run in training only; some models need targets there
        run = lambda model, example, training=training: _forward(model, example, training)  # noqa: E731
        graph = torch_pruning.DependencyGraph()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return graph.build_dependency(model, example, forward_fn=run, verbose=False)
        except Exception as error:  # torch-pruning meets an architecture that it does not know in many ways
            failures.append(f"{type(error).__name__}: {error}")
    raise ValueError(
        f"{type(model).__name__} is refused: its channels cannot be traced ({failures[-1]}). Allowed are "
        "models whose forward runs on the example input, made of layers that torch-pruning knows."
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
        i, j = sorted((find(i), find(j)))
        parent[j] = i

    # torch-pruning walks once for each group and forgets where two channels of a group meet; one walk over
    # all of them is linear, and joins what meets into one unit
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or module not in graph.module2node:
            continue
        node = graph.module2node[module]
        makes = graph.get_pruner_of_module(module).prune_out_channels
        new = [i for i in range(module.weight.shape[_out(module)]) if i not in tags[node, makes]]
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
            scaling |= {site} if _is_scale(node.module, tensor) else set()
            aligned: dict[int, int] = {}
            for i, element in seen.items():
                if not 0 <= i < tensor.shape[dim] * (1 if made else max(1, _groups(node.module, dim))):
                    reason = f"tracing lost them on the way to {parameter(site)}"
                    continue
                place = i if made else i % tensor.shape[dim]
                join(places[site].setdefault(place, element), element)
                join(aligned.setdefault(i % period, element), element)  # as many of every group
        if reason:
            why.update((element, reason) for element in seen.values())
    groups = _grouped(find, roots, names, places, making, scaling, kinds)
    refused = {
        names[id(roots[find(element)].weight)]: reason for element, reason in why.items() if reason == HEAD
    }
    others = {names[id(roots[find(element)].weight)]: reason for element, reason in why.items()}
    return groups, others | refused


def _index(idx: int, root: int) -> Any:
    from torch_pruning._helpers import _HybridIndex

    return _HybridIndex(idx=idx, root_idx=root)


def _out(module: nn.Module) -> int:
    return 1 if getattr(module, "transposed", False) else 0


def _groups(module: Any, dim: int) -> int:
    return module.groups if isinstance(module, nn.modules.conv._ConvNd) and dim == 1 else 1


def _is_scale(module: Any, tensor: Tensor) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and tensor is module.weight


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
        dim = _out(module) if makes else 1 - _out(module)
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
    find: Callable[[int], int],
    roots: list[Any],
    names: Mapping[int, str],
    places: Mapping[Site, Mapping[int, int]],
    making: set[Site],
    scaling: set[Site],
    kinds: Mapping[Site, str],
) -> Groups:
    units: dict[str, dict[int, int]] = defaultdict(dict)
    sites: dict[str, dict[Site, tuple[list[int], list[int]]]] = defaultdict(dict)
    for site, at in places.items():
        for index, element in sorted(at.items()):
            unit = find(element)
            name = names[id(roots[unit].weight)]
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
    removed = plan(groups, alive)
    dense = _outputs(model, example)
    masked = deepcopy(model)
    for site, gone in removed.items():
        tensor = getattr(masked.get_submodule(site[0]), site[1])
        if isinstance(tensor, nn.Parameter):
            tensor.index_fill_(site[2], gone.to(tensor.device), 0)
    smaller = deepcopy(model)
    try:
        cut(smaller, removed)
        got = _outputs(smaller, example)
    except Exception as error:  # whatever a model's forward raises on tensors of another size
        return (
            f"without half of them the model fails with {type(error).__name__}: {str(error).splitlines()[0]}"
        )
    if [t.shape for t in got] != [t.shape for t in dense]:
        return "without half of them the model's output has another shape"
    if not (far := _relative(_outputs(masked, example), got)) <= 1e-5:  # NaN, too
        full = tree_map(
            lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, example
        )
        with suppress(Exception):  # rounding in a deep network with drawn weights may be as large
            far = _relative(
                _outputs(deepcopy(masked).double(), full), _outputs(deepcopy(smaller).double(), full)
            )
    if not far <= 1e-5:
        return f"a network without half of them is not that in which they are zero (relatively, by {far:.2g})"
    try:
        _forward(model, example, training=True)
    except Exception:  # a model that wants targets in training, say, has nothing to be compared with
        return ""
    try:
        _forward(smaller, example, training=True)
    except Exception as error:
        return f"in training mode the model fails without half of them: {str(error).splitlines()[0]}"
    return ""


def _relative(want: list[Tensor], got: list[Tensor]) -> float:
    scale = max((float(t.abs().max()) for t in want if t.numel()), default=0.0)
    far = max((float((a - b).abs().max()) for a, b in zip(want, got, strict=True) if a.numel()), default=0.0)
    return far / scale if scale else math.inf


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    torch.manual_seed(0)  # the generators are put back by the caller
    return [t.double() for t in tree_flatten(_forward(model, example))[0] if isinstance(t, Tensor)]


# ------------------------------------------------------------------------------------------------ which units


def unit_scores(
    groups: Groups, criterion: Criterion, params: Mapping[str, Tensor], **evidence: Any
) -> Scores:
    """The score of each unit: the mean of the criterion's scores over the weights that make its channels.

    With `magnitude` that ranks as the L1 norm of the filters, with `Ln(n)` as their Ln norm. A criterion that
    asks for `channels` gives the scores of units itself; see those below.

    Args:
        groups: from `discover`.
        criterion: see `lightning_prune.criteria`.
        params: the parameters at all sites, by name.
        evidence: what criteria may ask for besides.
    """
    weights = {name: p.detach() for name, p in params.items()}
    if "channels" in asked(criterion):
        return {n: s.float() for n, s in criterion(weights, channels=groups).items()}
    filters = {parameter(site) for group in groups.values() for site in group.filters}
    scores = score_weights(criterion, {n: w for n, w in weights.items() if n in filters}, evidence)
    return {name: _mean(group, group.filters, scores) for name, group in groups.items()}


def _mean(group: Channels, sites: Sequence[Site], scores: Mapping[str, Tensor]) -> Tensor:
    total, weights = torch.zeros(group.units), torch.zeros(group.units)
    for site in sites:
        indices, units = group.sites[site]
        rows = scores[parameter(site)].float().movedim(site[2], 0).flatten(1)
        total.index_add_(0, units, rows.sum(1).cpu()[indices])
        weights.index_add_(0, units, torch.full((len(units),), float(rows.shape[1])))
    return total / weights


def batch_norm_scale(params: Mapping[str, Tensor], channels: Groups) -> Scores:
    """Network slimming: the scale |gamma| of the batch normalizations that channels pass.

    Raises:
        ValueError: when channels pass none.

    Reference: Liu et al. (2017), arXiv:1708.06519.
    """
    if bare := [name for name, group in channels.items() if not group.scales]:
        raise ValueError(
            f"batch_norm_scale: {', '.join(bare)} pass no batch normalization with a scale; exclude them."
        )
    scales = {name: p.abs()[:, None] for name, p in params.items() if p.dim() == 1}
    return {name: _mean(group, group.scales, scales) for name, group in channels.items()}


def geometric_median(params: Mapping[str, Tensor], channels: Groups) -> Scores:
    """FPGM: a filter's summed distance to the other filters of its layer; the nearest to all go first.

    Reference: He et al. (2019), arXiv:1811.00250, Equation 5.
    """
    found: Scores = {}
    for name, group in channels.items():
        total = torch.zeros(group.units)
        for site in group.filters:
            indices, units = group.sites[site]
            rows = params[parameter(site)].float().movedim(site[2], 0).flatten(1).cpu()[indices]
            total.index_add_(0, units, torch.cdist(rows, rows).mean(1))
        found[name] = total
    return found


@dataclass(frozen=True)
class RandomChannels:
    """Uniform random scores in [0, 1), one for each unit: the control.

    >>> RandomChannels(seed=0)({}, channels={})
    {}

    Args:
        seed: of the scores, the same in every round and on every rank.
    """

    seed: int = 0

    def __call__(self, params: Mapping[str, Tensor], channels: Groups) -> Scores:
        generator = torch.Generator().manual_seed(self.seed)
        return {name: torch.rand(group.units, generator=generator) for name, group in channels.items()}


def isomorphic(scores: Scores, total: int, *, channels: Groups) -> Keep:
    """Isomorphic: groups that are coupled alike are ranked together, and each kind keeps the same part.

    Reference: Fang et al. (2024), arXiv:2407.04616.
    """
    kinds: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in scores:
        kinds[channels[name].structure].append(name)
    sizes = {names[0]: sum(scores[n].numel() for n in names) for names in kinds.values()}
    alive = alive_per_tensor(scores)
    totals = apportion(total, sizes, {names[0]: sum(alive[n] for n in names) for names in kinds.values()})
    keep: dict[str, int] = {}
    for names in kinds.values():
        keep |= global_rank({n: scores[n] for n in names}, totals[names[0]])
    return Keep({name: keep[name] for name in scores})


def next_units(
    groups: Groups,
    scores: Scores,
    masks: Masks,
    sparsities: Sequence[tuple[Sequence[str], Sparsity]],
    allocate: Allocation = global_rank,
    round_to: int = 1,
    at_least: int = 1,
    cost: Callable[[Masks, bool], float] | None = None,
) -> Masks:
    """One pruning of units: which are alive after it. Masks only shrink, and no group is left empty.

    Args:
        groups: from `discover`.
        scores: of the units, from `unit_scores`.
        masks: which of them are alive now.
        sparsities: pairs of groups' names and the fraction of their units that is to be gone.
        allocate: how many where.
        round_to: the channels left in each group are rounded up to a multiple of this; then fewer go than
            `sparsities` say.
        at_least: units left in each group.
        cost: (units alive, of multiply-adds) -> parameters or multiply-adds, for `Removed`.
    """
    if "channels" in asked(allocate, 2):
        allocate = partial(allocate, channels=groups)
    dense = {name: torch.ones_like(mask) for name, mask in masks.items()}

    def removed(names: Sequence[str], sparsity: float, multiply_adds: bool) -> float:
        assert cost is not None
        units = next_units(groups, scores, masks, [(names, sparsity)], allocate, round_to, at_least)
        return 1 - cost({**masks, **units}, multiply_adds) / cost(dense, multiply_adds)

    sparsities = [
        (names, s(removed=partial(removed, names)) if callable(s) and "removed" in asked(s, 0) else s)
        for names, s in sparsities
    ]
    new = next_masks(scores, masks, sparsities, lambda params: params, AtLeast(at_least, of=allocate))
    for name, mask in new.items():
        step = math.lcm(round_to, groups[name].per_unit) // groups[name].per_unit
        before = int(masks[name].sum())
        left = max(int(mask.sum()), 1, at_least)  # a layer without channels is none
        rounded = min(before, -(-left // step) * step)
        new[name] = keep_top(scores[name].masked_fill(~masks[name], DEAD), rounded)
    return new


@dataclass(frozen=True)
class Removed:
    """A schedule of what is removed of the parameters or multiply-adds: the least sparsity that reaches it.

    >>> Removed(lambda round: 0.75)(1, removed=lambda sparsity, multiply_adds: 1 - (1 - sparsity) ** 2)
    0.5

    Args:
        fraction: round -> fraction of the model's parameters that is to be gone.
        multiply_adds: count the multiply-adds of linear layers and convolutions instead.

    Raises:
        ValueError: when the removable channels do not make up as much.
    """

    fraction: Callable[[int], float]
    multiply_adds: bool = False

    def __call__(self, round: int, removed: Callable[[float, bool], float]) -> float:
        if not (target := self.fraction(round)):
            return 0.0
        if (most := removed(1.0, self.multiply_adds)) < target:
            raise ValueError(
                f"fraction: {target} is to be removed in round {round}, and without all removable channels "
                f"but one in each layer {most:.4f} would be; allowed is less than that."
            )
        low, high = 0.0, 1.0
        for _ in range(30):  # halves of halves: exact to far less than a channel
            middle = (low + high) / 2
            low, high = (middle, high) if removed(middle, self.multiply_adds) < target else (low, middle)
        return high


def cost(groups: Groups, alive: Masks, weights: Mapping[str, tuple[Sequence[int], float]]) -> float:
    """The elements left of all weights, {name: (shape, how often each element counts)}."""
    sizes = {name: list(shape) for name, (shape, _) in weights.items()}
    for site, gone in plan(groups, alive).items():
        if parameter(site) in sizes:
            sizes[parameter(site)][site[2]] -= len(gone)
    return sum(math.prod(size) * weights[name][1] for name, size in sizes.items())


def uses(model: nn.Module, example: Any) -> dict[str, float]:
    """How many multiply-adds each element of a weight does on the example: {weight name: uses}."""
    found: dict[str, float] = {}
    names = {id(p): name for name, p in model.named_parameters()}

    def count(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        wide = args[0] if _out(module) else output  # a transposed convolution is used at its inputs
        channel = module.weight.shape[0]
        name = names[id(module.weight)]
        found[name] = found.get(name, 0.0) + wide.numel() / channel

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            _forward(model, tree_map(lambda t: t.to(_device(model)) if isinstance(t, Tensor) else t, example))
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    return found


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


def pack_groups(groups: Groups) -> list[Any]:
    """The groups in plain containers and tensors, for a checkpoint."""
    return [
        [g.name, g.units, [[list(s), i.int(), u.int()] for s, (i, u) in g.sites.items()], *map(list, rest)]
        for g in groups.values()
        for rest in [(map(list, g.filters), map(list, g.scales), g.structure)]
    ]


def unpack_groups(packed: Sequence[Any]) -> Groups:
    """The groups that `pack_groups` stored."""
    found: Groups = {}
    for name, units, sites, filters, scales, structure in packed:
        tensors = {cast(Site, tuple(site)): (i.long(), u.long()) for site, i, u in sites}
        of = lambda sites: tuple(cast(Site, tuple(site)) for site in sites)  # noqa: E731
        found[name] = Channels(name, units, tensors, of(filters), of(scales), tuple(structure))
    return found
