"""Filters: the scores of units of coupled channels, and channels cut out of a network at once.

Weight criteria are averaged over the weights that make a channel. Those here ask for `channels`, the
couplings, and give the scores of units themselves; so do allocations.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn, optim

from lightning_prune.allocation import Allocation, apportion, candidates_per_tensor, global_rank, uniform
from lightning_prune.checks import check_callable, named, number, whole
from lightning_prune.criteria import Criterion, magnitude
from lightning_prune.evidence import asked, call, check_asked, inputs, runs_model, undisturbed, without_use
from lightning_prune.masks import Masks
from lightning_prune.pruning import Sparsity, score, sparsity_in, told
from lightning_prune.schedules import Schedule
from lightning_prune.selection import Keep, Scores
from lightning_prune.shards import refuse, settle
from lightning_prune.structured.calibration import calibrate as recalibrated
from lightning_prune.structured.calibration import without_effect
from lightning_prune.structured.discovery import discover
from lightning_prune.structured.speed import Faster as Faster
from lightning_prune.structured.speed import speed
from lightning_prune.structured.surgery import Site, check_optimizers, cut
from lightning_prune.structured.targets import Removed as Removed
from lightning_prune.structured.targets import Smaller as Smaller
from lightning_prune.structured.targets import check_widths, cost, elements, memories, next_units
from lightning_prune.structured.targets import uses as uses
from lightning_prune.structured.units import Coupling, Couplings, all_units, cut_of, parameter, parameters


def unit_scores(
    couplings: Couplings, criterion: Criterion, params: Mapping[str, Tensor], **evidence: Any
) -> Scores:
    """The score of each unit: the mean of the criterion's scores over the weights that make its channels.

    With `magnitude` that ranks as the L1 norm of the filters, with `Ln(n)` as their Ln norm. A criterion that
    asks for `channels` gives the scores of units itself; see those below.

    Args:
        couplings: from `discover`.
        criterion: see `lightning_prune.criteria`.
        params: the parameters at all sites, by name.
        evidence: what criteria may ask for besides.

    Raises:
        ValueError: when the criterion asks for what is not there, or does not give a score for each unit.
    """
    weights = {name: p.detach() for name, p in params.items()}
    if "channels" not in asked(criterion):
        makers = {parameter(site) for coupling in couplings.values() for site in coupling.filters}
        scores = score(criterion, {n: w for n, w in weights.items() if n in makers}, evidence)
        return {name: _mean(coupling, coupling.filters, scores) for name, coupling in couplings.items()}
    found = call(criterion, weights, channels=couplings, **evidence)
    for name, coupling in couplings.items():
        if name not in found or found[name].shape != (coupling.units,):
            raise ValueError(
                f"criterion: {named(criterion)} must give {coupling.units} scores of {name}, one for each "
                "unit. Return {name: tensor} with a name for each of `channels`."
            )
    return {name: found[name].detach().float() for name in couplings}


def _mean(coupling: Coupling, sites: Sequence[Site], scores: Mapping[str, Tensor]) -> Tensor:
    total, weights = torch.zeros(coupling.units), torch.zeros(coupling.units)
    for site in sites:
        indices, units = coupling.sites[site]
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
    if bare := [name for name, coupling in channels.items() if not coupling.scales]:
        raise ValueError(
            f"batch_norm_scale: {', '.join(bare)} pass no batch normalization with a scale, as is "
            "needed; exclude them."
        )
    scales = {name: p.abs()[:, None] for name, p in params.items() if p.dim() == 1}
    return {name: _mean(coupling, coupling.scales, scales) for name, coupling in channels.items()}


def geometric_median(params: Mapping[str, Tensor], channels: Couplings) -> Scores:
    """FPGM: a filter's summed distance to the other filters of its layer; the nearest to all go first.

    Reference: He et al. (2019), arXiv:1811.00250, Equation 5.
    """
    found: Scores = {}
    for name, coupling in channels.items():
        total = torch.zeros(coupling.units)
        for site in coupling.filters:
            indices, units = coupling.sites[site]
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
        return {name: torch.rand(coupling.units, generator=generator) for name, coupling in channels.items()}


def isomorphic(scores: Scores, total: int, *, channels: Couplings) -> Keep:
    """Isomorphic: channels that are coupled alike are ranked together, and each kind keeps the same part.

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


def prune_channels(
    model: nn.Module,
    sparsity: float | Schedule,
    example_input: Any,
    criterion: Criterion = magnitude,
    allocate: Allocation = uniform,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    round_to: int = 1,
    at_least: int = 1,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    initial: Mapping[str, Tensor] | None = None,
    optimizer: optim.Optimizer | None = None,
    calibrate: bool = False,
) -> Masks:
    """Cut channels out of any module once, in place, without training. Returns which units are alive.

    A cut is tried on copies of the model first, on which its own forward hooks run, too.

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
        sparsity: fraction of the channels to remove, in [0, 1); or a target on parameters or multiply-adds,
            `filters.Removed(0.5)`, on the bytes of the weights, `filters.Smaller(5_000_000)`, or on the
            speed, `filters.Faster(2.0)`; or any schedule, of which this is round 1. Where nothing goes, a
            warning says why.
        example_input: an input: a tensor, its shape, a tuple of arguments or a dict of keyword arguments.
        criterion: which channels; see `StructuredChannelPruning`. One that needs data runs the model in the
            mode it is in, and leaves it and the random number generators as they were.
        allocate: how many where.
        include: fnmatch patterns over weight names; only channels that one of these weights makes.
        exclude: fnmatch patterns over weight names; no channels that one of these makes.
        round_to: the channels left in each layer are rounded up to a multiple of this, 1 or more.
        at_least: units left in each layer, 1 or more.
        data: batches, pairs (input, target) or inputs, on the model's device; all of it is held in memory.
        loss: (output, target) -> scalar.
        initial: {name: weight at initialization} for criteria that compare with it.
        optimizer: one that has stepped the model, or a part of it; what it keeps is cut along.
        calibrate: set the statistics of batch normalizations to those of `data` after the cut.

    Raises:
        ValueError: when the model has no channels that can go or is sharded over processes, or an argument
            is not one of these. The model is then as it was.
    """
    refuse(
        settle(model).values(),
        "prune_channels",
        "Allowed are whole weights, of which channels are cut out. Prune before the model is sharded.",
    )
    whole("round_to", round_to, 1, such_as=8)
    whole("at_least", at_least, 1, such_as=1)
    _check_sparsity(sparsity)
    check_callable("criterion", criterion, 1)
    check_callable("allocate", allocate, 2)
    if calibrate and data is None:
        raise ValueError("calibrate=True: data=None; batches are needed. Give some that stand for all.")
    batches = None if data is None else list(data)
    if calibrate and batches == []:
        raise ValueError(
            "calibrate=True: data holds no batch; some are needed. Give some that stand for all."
        )
    if calibrate and (idle := without_effect(model)):
        warnings.warn(f"calibrate=True: {idle}", stacklevel=2)
    if optimizer is not None:
        _check_optimizer(optimizer, model)
    couplings = discover(model, example_input, include, exclude)
    check_widths(couplings, round_to, at_least)
    evidence: dict[str, Any] = {"initial": initial, "model": model}
    if "generator" in asked(criterion):
        evidence["generator"] = torch.Generator().manual_seed(torch.initial_seed())
    if batches is not None:
        evidence["batches"] = batches
        evidence["forward"] = lambda model, batch: model(inputs(batch))
        if loss is not None:
            evidence["loss"] = lambda model, batch: loss(model(batch[0]), batch[1])
    if "sparsity" in asked(criterion) and not callable(sparsity):
        evidence["sparsity"] = sparsity
    params = parameters(couplings, model)
    if "masks" in asked(criterion):
        evidence["masks"] = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    with undisturbed(model) if runs_model(criterion) else nullcontext():
        scores = unit_scores(couplings, criterion, params, **evidence)
    given = {"data": None if calibrate else data, "loss": loss, "initial": initial}
    for said in without_use({"criterion": (criterion, 1)}, given):
        warnings.warn(said, stacklevel=2)
    wanted: Sparsity = told(sparsity, 1) if callable(sparsity) else sparsity
    if callable(wanted):
        wanted = partial(wanted, 1) if asked(wanted) else sparsity_in(wanted, 1, "sparsity")
    if not callable(wanted):
        number("sparsity", wanted, "is 0 (dense) to below 1, such as 0.5", lambda v: 0 <= v < 1)
    dense = all_units(couplings)
    sizes = cache(partial(elements, model, example_input, couplings))  # of each quantity
    written = cache(partial(memories, model))
    units = next_units(
        couplings,
        {name: values.cpu() for name, values in scores.items()},
        dense,
        [(list(couplings), wanted)],
        allocate,
        round_to,
        at_least,
        lambda units, of: cost(couplings, units, sizes(of), written() if of == "bytes" else ()),
        lambda units: speed(model, example_input, couplings, dense)(units),
        lambda _, said, do: warnings.warn(f"sparsity={named(sparsity)}: {said}. {do}.", stacklevel=4),
    )
    if optimizer is not None:
        _say_what_it_does_not_hold(optimizer, parameters(_cut_ones(couplings, units), model))
    cut(model, cut_of(couplings, units), [optimizer] if optimizer else [])
    if calibrate:
        recalibrated(model, evidence["batches"], evidence["forward"])
    return units


def _check_sparsity(sparsity: Any) -> None:
    """Refuse what says no sparsity, before anything is looked at."""
    if isinstance(sparsity, Mapping):
        raise ValueError(
            f"sparsity={named(sparsity)}: a schedule for each pattern is given; allowed is one for all "
            "channels that go. Call it once for each pattern, with include=[pattern]."
        )
    if callable(sparsity):
        check_callable("sparsity", sparsity, 1)
        schedule: Any = sparsity
        check_asked(f"sparsity={named(schedule)}", told(schedule, 1), 1)
    else:
        number("sparsity", sparsity, "is 0 (dense) to below 1, such as 0.5", lambda v: 0 <= v < 1)


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse what does not train this model."""
    if isinstance(optimizer, type) or not (
        hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")
    ):
        given = named(optimizer) if isinstance(optimizer, (type, str)) else f"a {type(optimizer).__name__}"
        raise ValueError(
            f"optimizer: {given} is given; allowed is one that has stepped the model, such as "
            "torch.optim.SGD(model.parameters(), lr=0.1). Give it, or none."
        )
    check_optimizers([optimizer])
    own, held = {id(p) for p in model.parameters()}, _held_by(optimizer)
    if not own & held:
        raise ValueError(
            f"optimizer: none of the {len(held)} parameters of this {type(optimizer).__name__} is one of "
            f"{type(model).__name__}; allowed is one that trains it. Make it of model.parameters(), or give "
            "none."
        )


def _held_by(optimizer: optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _cut_ones(couplings: Couplings, units: Masks) -> Couplings:
    return {name: coupling for name, coupling in couplings.items() if not units[name].all()}


def _say_what_it_does_not_hold(optimizer: optim.Optimizer, smaller: Mapping[str, nn.Parameter]) -> None:
    """Say which trained weights become smaller for which another optimizer may keep something."""
    held = _held_by(optimizer)
    if left := [name for name, p in smaller.items() if p.requires_grad and id(p) not in held]:
        warnings.warn(
            f"optimizer: {', '.join(left)} lose channels and are not in it. If another optimizer trains "
            "them, what it keeps for them no longer fits; make that one after the cut. Freeze them to "
            "silence this.",
            stacklevel=3,
        )
