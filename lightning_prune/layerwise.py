"""Layer by layer: each is pruned on what the pruned ones before it give, and survivors make up for it."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_prune.allocation import Allocation, AtLeast, apportion
from lightning_prune.checks import named
from lightning_prune.criteria import Criterion, SparseGPT
from lightning_prune.evidence import asked, call
from lightning_prune.granularity import NM, Granularity, single
from lightning_prune.granularity import units as units_of
from lightning_prune.layers import Layout, layouts
from lightning_prune.masks import Masks, bits, count, zero_dead_
from lightning_prune.reaching import in_order
from lightning_prune.selection import (
    DEAD,
    Counts,
    Scores,
    candidates_per_tensor,
    keep_top,
    keep_top_of_rows,
    survivors,
)
from lightning_prune.updates import Moments, Update, from_matrices, matrices, moments, no_worse


def prune_in_order(
    model: nn.Module,
    params: Mapping[str, Tensor],
    masks: Masks,
    sparsity: float,
    criterion: Criterion,
    allocate: Allocation,
    granularity: Granularity,
    update: Update | None,
    next_masks: Callable[..., Masks],
    evidence: dict[str, Any],
) -> Masks:
    """Prune the weights of a model in place, in the order in which data reach them.

    Args:
        model: the module.
        params: weights of it, by name.
        masks: which of them are alive.
        sparsity: over all of them.
        criterion: which.
        allocate: how many where; its counts must not depend on the scores.
        granularity: what lives and dies together.
        update: what the survivors become.
        next_masks: as in `lightning_prune.pruning`, for one layer.
        evidence: with `batches` and `forward`.

    Returns:
        The new masks.

    Raises:
        ValueError: what is asked for cannot be done layer by layer, or with these data. The model is then as
            it was.
    """
    _check(criterion, allocate, granularity, update, evidence)
    laid_out = layouts(model, params)
    counts, sizes = budgets(params, masks, sparsity, allocate, granularity, laid_out, evidence)
    evidence = {**evidence, "layouts": laid_out, "sparsity": sparsity}
    planned = AtLeast(0, of=partial(_as_planned, counts))
    before: dict[str, Tensor] = {}
    new: Masks = {}
    few: list[str] = []  # layers that see fewer tokens than they have inputs
    try:
        with tqdm(total=len(params), desc="layers", disable=None) as bar:
            for reached in in_order(model, list(params), evidence["batches"], evidence["forward"]):
                here = {name: params[name].detach() for name in reached.names}
                there = {name: masks[name] for name in reached.names}
                of_data: dict[str, Moments] = {}
                if update is not None or isinstance(criterion, SparseGPT):
                    of_data = moments(reached.names, laid_out, model, reached.batches, reached.forward)
                    few += [n for n, stats in of_data.items() if stats.samples < stats.mean.shape[-1]]
                fitted = dict(here)
                if isinstance(criterion, SparseGPT):
                    for name, w in here.items():
                        keep, layout, h = counts[name], laid_out[name], of_data[name].mean
                        fitted[name], new[name] = _surgery(
                            criterion, w, there[name], keep, granularity, layout, h
                        )
                else:
                    left = [([n], 1 - survivors(counts[n]) / max(1, sizes[n])) for n in here]
                    seen = {**evidence, "batches": reached.batches, "forward": reached.forward}
                    new |= next_masks(here, there, left, criterion, planned, granularity, **seen)
                if update is not None:
                    for name, w in here.items():
                        layout, h = laid_out[name], of_data[name].mean
                        fitted[name] = _refitted(update, w, fitted[name], new[name], layout, h)
                del of_data
                for name, w in here.items():
                    before[name] = w.to("cpu", copy=True)
                    _write(name, w, fitted[name], new[name])
                bar.update(len(here))
        if few:
            warnings.warn(
                f"data: {len(few)} of {len(params)} layers see fewer tokens, or positions, than they have "
                f"inputs, {few[0]} for one, so that their Hessians are singular. Survivors are updated as "
                "far as the data say, with what dampening makes up for the rest. Give more data.",
                stacklevel=3,
            )
    except BaseException:
        for name, w in before.items():
            params[name].detach().copy_(w)
        raise
    return {name: new[name] for name in params}


def _write(name: str, weight: Tensor, fitted: Tensor, mask: Tensor) -> None:
    """Put new values and a mask on a weight, in place."""
    weight.copy_(fitted)
    zero_dead_(weight, bits(mask, like=weight))
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"{name}: the update gave NaN or infinity, and finite numbers are needed. Nothing was pruned. "
            "Give more data, or a larger dampening."
        )


def _check(
    criterion: Criterion,
    allocate: Allocation,
    granularity: Granularity,
    update: Update | None,
    evidence: Mapping[str, Any],
) -> None:
    if not evidence.get("batches"):
        raise ValueError(
            "layer_by_layer=True: there are no data, and the order in which they reach the layers is needed. "
            "Give data=, a list of batches that is not empty."
        )
    if needed := {"loss", "grads"} & {name for name, must in asked(criterion).items() if must}:
        raise ValueError(
            f"layer_by_layer=True: {named(criterion)} asks for {', '.join(sorted(needed))}, of the "
            "whole network, "
            "and here only the layer in hand is run. Allowed are criteria of the weights and of what reaches "
            "them, such as wanda. Use one, or layer_by_layer=False."
        )
    solver = isinstance(criterion, SparseGPT)
    if solver and not (granularity is single or isinstance(granularity, NM)):
        raise ValueError(
            f"granularity: {named(granularity)} with {named(criterion)}; allowed are single weights "
            "and NM. Use one of these."
        )
    if not solver and update is None and not {"batches", "forward", "model"} & asked(criterion).keys():
        warnings.warn(
            f"layer_by_layer=True has no effect: {named(criterion)} does not look at what reaches a "
            "layer, and "
            f"nothing is updated. Leave it out, with allocate={named(allocate)}, or give update=.",
            stacklevel=5,
        )


def _as_planned(counts: Counts, scores: Scores, total: int) -> Counts:
    return {name: counts[name] for name in scores}


# -------------------------------------------------------------------------------------------------- how many


def budgets(
    params: Mapping[str, Tensor],
    masks: Masks,
    sparsity: float,
    allocate: Allocation,
    granularity: Granularity,
    laid_out: Mapping[str, Layout],
    evidence: Mapping[str, Any],
) -> tuple[Counts, dict[str, int]]:
    """How many units each layer, or each of its outputs, keeps, and how many it has, before there are scores.

    Raises:
        ValueError: when the counts of `allocate` depend on the scores, found by giving it two kinds of them.
    """
    allocate = allocate if isinstance(allocate, AtLeast) else AtLeast(1, of=allocate)
    found: list[Counts] = []
    sizes: dict[str, int] = {}
    for probe in (0, 1):
        units: Scores = {}
        for i, (name, mask) in enumerate(masks.items()):
            scores = _probe(mask, large=i % 2 == probe)
            if granularity is not single:
                scores, _ = units_of(granularity, scores, laid_out[name])
            units[name] = scores
        sizes = {name: s.numel() for name, s in units.items()}
        total = min(round((1 - sparsity) * sum(sizes.values())), sum(candidates_per_tensor(units).values()))
        rows = laid_out if granularity is single else None
        found.append(
            call(allocate, units, total, **{**evidence, "params": params, "masks": masks, "layouts": rows})
        )
        if (given := sum(map(survivors, found[-1].values()))) != total:
            raise ValueError(
                f"allocate: {named(allocate)} gave {given} survivors; allowed are the {total} that "
                "were asked for. Make its counts add up."
            )
    if any(
        not torch.equal(torch.as_tensor(a), torch.as_tensor(found[1][name])) for name, a in found[0].items()
    ):
        raise ValueError(
            f"layer_by_layer=True: {allocate.of} compares scores of all layers, which do not exist together "
            "here: each layer is scored when the ones before it are pruned. Allowed are allocations that do "
            "not read scores, such as uniform, per_output, erk and OWL. Use one, or layer_by_layer=False."
        )
    return found[0], sizes


def _probe(mask: Tensor, large: bool) -> Tensor:
    """Scores that take no memory: all of them large, or small ones that differ."""
    device = mask.device
    if large:
        scores = torch.full((), 1e3, device=device).expand(mask.shape)
    else:
        ramp = torch.linspace(1e-3, 1, mask.shape[-1] if mask.dim() else 1, device=device)
        scores = ramp.expand(mask.shape)
    return scores if count(mask) == mask.numel() else torch.where(mask, scores, DEAD)


# ------------------------------------------------------------------------------------------------- survivors


def _refitted(
    update: Update, weight: Tensor, start: Tensor, mask: Tensor, layout: Layout, hessians: Tensor
) -> Tensor:
    """The survivors by `update`, of each output where they are better than those of `start`."""
    dense, first = (matrices(w.to(hessians.dtype), layout) for w in (weight, start))
    stays = matrices(mask, layout)
    fit = torch.stack([update(*each) for each in zip(dense, stays, hessians, strict=True)])
    rounded = fit.to(weight.dtype).to(hessians.dtype) * stays
    best = torch.stack(
        [no_worse(*each) for each in zip(rounded, first * stays, dense, hessians, strict=True)]
    )
    return from_matrices(best, layout, weight.shape).to(weight.dtype)


def _surgery(
    criterion: SparseGPT,
    weight: Tensor,
    mask: Tensor,
    keep: int | Tensor,
    granularity: Granularity,
    layout: Layout,
    hessians: Tensor,
) -> tuple[Tensor, Tensor]:
    """A weight by SparseGPT: the updated one, and the mask."""
    if isinstance(keep, Tensor):
        raise ValueError(
            f"allocate: it counts the survivors of each output, and {named(criterion)} compares all "
            "outputs in a block of inputs. Allowed are counts per layer, such as those of uniform. Use that."
        )
    dense, there = matrices(weight.to(hessians.dtype), layout), matrices(mask, layout)
    parts, choose = (
        _patterns(granularity, there, layout.split(mask).shape[2], keep)
        if isinstance(granularity, NM)
        else _shares(criterion.block, there, keep)
    )
    solved = [
        criterion.solve(w, h, partial(choose, i), parts)
        for i, (w, h) in enumerate(zip(dense, hessians, strict=True))
    ]
    updated, stays = (torch.stack(values) for values in zip(*solved, strict=True))
    return (
        from_matrices(updated, layout, weight.shape).to(weight.dtype),
        from_matrices(stays, layout, weight.shape).contiguous(),
    )


Choose = Callable[[int, int, int, Tensor], Tensor]  # (matrix, first input, last + 1, scores) -> who stays


def _shares(block: int, there: Tensor, keep: int) -> tuple[list[tuple[int, int]], Choose]:
    """Blocks of inputs that keep the same fraction: how many weights of each stay."""
    count_, outputs, width = there.shape
    parts = [(start, min(start + block, width)) for start in range(0, width, block)]
    keys = [(i, start, stop) for i in range(count_) for start, stop in parts]
    names = {str(key): key for key in keys}
    sizes = {name: outputs * (stop - start) for name, (_, start, stop) in names.items()}
    caps = {name: count(there[i, :, start:stop]) for name, (i, start, stop) in names.items()}
    counts = apportion(keep, sizes, caps)

    def choose(i: int, start: int, stop: int, scores: Tensor) -> Tensor:
        living = torch.where(there[i, :, start:stop], scores, DEAD)
        return keep_top(living, counts[str((i, start, stop))])

    return parts, choose


def _patterns(nm: NM, there: Tensor, inputs: int, keep: int) -> tuple[list[tuple[int, int]], Choose]:
    """Groups of m inputs of which n stay; the remainder of a row stays as it is."""
    parts = [
        (position + start, position + min(start + nm.m, inputs))
        for position in range(0, there.shape[2], inputs)
        for start in range(0, inputs, nm.m)
    ]
    full = [part for part in parts if part[1] - part[0] == nm.m]
    left = sum(int(there[:, :, start:stop].sum(2).clamp(max=nm.n).sum()) for start, stop in full)
    if keep < left:
        raise ValueError(
            f"sparsity: {keep} survivors of a layer where {nm} leaves {left}; SparseGPT keeps to the "
            f"pattern. Allowed are sparsities up to {1 - nm.n / nm.m:g} here. Ask for less, or for another "
            "pattern."
        )

    def choose(i: int, start: int, stop: int, scores: Tensor) -> Tensor:
        living = there[i, :, start:stop]
        if stop - start < nm.m:
            return living
        return keep_top_of_rows(torch.where(living, scores, DEAD), living.sum(1).clamp(max=nm.n))

    return parts, choose
