"""Filters: which units of coupled channels stay; their scores, how many where, and targets on the size.

Weight criteria are averaged over the weights that make a channel. Those here ask for `channels`, the groups,
and give the scores of units themselves. Budgets, ties and masks are those of weight pruning.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.allocation import (
    Allocation,
    AtLeast,
    apportion,
    candidates_per_tensor,
    global_rank,
    uniform,
)
from lightning_prune.criteria import magnitude
from lightning_prune.evidence import asked, undisturbed
from lightning_prune.masks import Masks
from lightning_prune.pruning import Criterion, Sparsity, next_masks, score
from lightning_prune.selection import DEAD, Keep, Scores, keep_top
from lightning_prune.structured.coupling import out_dimension
from lightning_prune.structured.discovery import discover
from lightning_prune.structured.surgery import Site, cut
from lightning_prune.structured.trial import as_input, run
from lightning_prune.structured.units import Coupling, Couplings, cut_of, parameter, parameters


def unit_scores(
    groups: Couplings, criterion: Criterion, params: Mapping[str, Tensor], **evidence: Any
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
    scores = score(criterion, {n: w for n, w in weights.items() if n in filters}, evidence)
    return {name: _mean(group, group.filters, scores) for name, group in groups.items()}


def _mean(group: Coupling, sites: Sequence[Site], scores: Mapping[str, Tensor]) -> Tensor:
    total, weights = torch.zeros(group.units), torch.zeros(group.units)
    for site in sites:
        indices, units = group.sites[site]
        rows = scores[parameter(site)].float().movedim(site[2], 0).flatten(1)
        total.index_add_(0, units, rows.sum(1).cpu()[indices])
        weights.index_add_(0, units, torch.full((len(units),), float(rows.shape[1])))
    return total / weights


def batch_norm_scale(params: Mapping[str, Tensor], channels: Couplings) -> Scores:
    """Network slimming: the scale |gamma| of the batch normalizations that channels pass.

    Raises:
        ValueError: when channels pass none.

    Reference: Liu et al. (2017), arXiv:1708.06519.
    """
    if bare := [name for name, group in channels.items() if not group.scales]:
        raise ValueError(
            f"batch_norm_scale: {', '.join(bare)} pass no batch normalization with a scale, as is "
            "needed; exclude them."
        )
    scales = {name: p.abs()[:, None] for name, p in params.items() if p.dim() == 1}
    return {name: _mean(group, group.scales, scales) for name, group in channels.items()}


def geometric_median(params: Mapping[str, Tensor], channels: Couplings) -> Scores:
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

    def __call__(self, params: Mapping[str, Tensor], channels: Couplings) -> Scores:
        generator = torch.Generator().manual_seed(self.seed)
        return {name: torch.rand(group.units, generator=generator) for name, group in channels.items()}


def isomorphic(scores: Scores, total: int, *, channels: Couplings) -> Keep:
    """Isomorphic: groups that are coupled alike are ranked together, and each kind keeps the same part.

    Reference: Fang et al. (2024), arXiv:2407.04616.
    """
    kinds: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in scores:
        kinds[channels[name].structure].append(name)
    sizes = {names[0]: sum(scores[n].numel() for n in names) for names in kinds.values()}
    alive = candidates_per_tensor(scores)
    totals = apportion(total, sizes, {names[0]: sum(alive[n] for n in names) for names in kinds.values()})
    keep: dict[str, int] = {}
    for names in kinds.values():
        keep |= global_rank({n: scores[n] for n in names}, totals[names[0]])
    return Keep({name: keep[name] for name in scores})


def next_units(
    groups: Couplings,
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer than `at_least` in each is asked for, and rounded up below
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
                f"but one in each layer {most:.4f} would be; allowed is less than that. Lower the schedule."
            )
        low, high = 0.0, 1.0
        for _ in range(30):  # halves of halves: exact to far less than a channel
            middle = (low + high) / 2
            low, high = (middle, high) if removed(middle, self.multiply_adds) < target else (low, middle)
        return high


def cost(groups: Couplings, alive: Masks, weights: Mapping[str, tuple[Sequence[int], float]]) -> float:
    """The elements left of all weights, {name: (shape, how often each element counts)}."""
    sizes = {name: list(shape) for name, (shape, _) in weights.items()}
    for site, gone in cut_of(groups, alive).items():
        if parameter(site) in sizes:
            sizes[parameter(site)][site[2]] -= len(gone)
    return sum(math.prod(size) * weights[name][1] for name, size in sizes.items())


def uses(model: nn.Module, example: Any) -> dict[str, float]:
    """How many multiply-adds each element of a weight does on the example: {weight name: uses}."""
    found: dict[str, float] = {}
    names = {id(p): name for name, p in model.named_parameters()}

    def count(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        wide = args[0] if out_dimension(module) else output  # a transposed convolution is used at its inputs
        channel = module.weight.shape[0]
        name = names[id(module.weight)]
        found[name] = found.get(name, 0.0) + wide.numel() / channel

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    device = next(model.parameters()).device
    here = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, as_input(example))
    try:
        with torch.no_grad(), undisturbed(model):
            run(model, here)
    finally:
        for handle in handles:
            handle.remove()
    return found


def prune_channels(
    model: nn.Module,
    sparsity: float,
    example_input: Any,
    criterion: Criterion = magnitude,
    allocate: Allocation = uniform,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    round_to: int = 1,
    at_least: int = 1,
) -> Masks:
    """Cut channels out of any module once, in place, without training. Returns which units are alive.

    >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> _ = prune_channels(model, 0.5, example_input=[1, 2])
    >>> model
    Sequential(
      (0): Linear(in_features=2, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=1, bias=True)
    )

    Args:
        model: any module; parameters keep their identity and their names.
        sparsity: fraction of the channels to remove, in [0, 1).
        example_input: see `lightning_prune.channels.discover`; so are `include` and `exclude`.
        criterion: which channels, of the weights alone; see `StructuredChannelPruning`.
        allocate: how many where.
        include: fnmatch patterns over weight names.
        exclude: fnmatch patterns over weight names.
        round_to: the channels left in each layer are rounded up to a multiple of this.
        at_least: units left in each layer.

    Raises:
        ValueError: when the model has no channels that can go, or an argument is not one of these. The model
            is then as it was.
    """
    groups = discover(model, example_input, include, exclude)
    scores = unit_scores(groups, criterion, parameters(groups, model))
    dense = {name: torch.ones(group.units, dtype=torch.bool) for name, group in groups.items()}
    units = next_units(groups, scores, dense, [(list(groups), sparsity)], allocate, round_to, at_least)
    cut(model, cut_of(groups, units))
    return units
