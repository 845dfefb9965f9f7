"""Masks with as many weights alive as given ones have, chosen by another criterion."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_prune.allocation import Allocation, AtLeast
from lightning_prune.criteria import Criterion
from lightning_prune.granularity import Expand, Granularity, units
from lightning_prune.layers import Layout
from lightning_prune.masks import Masks, alive
from lightning_prune.pruning import score
from lightning_prune.selection import DEAD, select


def of_equal_size(
    masks: Masks,
    weights: Mapping[str, Tensor],
    parts: Sequence[Sequence[str]],
    criterion: Criterion,
    allocate: Allocation,
    granularity: Granularity,
    layouts: Mapping[str, Layout],
    **evidence: Any,
) -> Masks:
    """Masks with as many weights alive as `masks` in each part, in whole units of the granularity.

    The units of a granularity may have several sizes: filters of layers with other numbers of inputs, blocks
    at the edge of a matrix. Of each size as many units live as in `masks`, so that the number of weights is
    the same, too, wherever `allocate` puts them among the units of that size.

    Args:
        masks: those whose size is wanted, by name.
        weights: what is scored, by name.
        parts: names of the tensors that share a budget; every name is in one.
        criterion: weights -> scores, higher = keep.
        allocate: how many units survive in each tensor of a part.
        granularity: what lives and dies together.
        layouts: of the weights, by name.
        evidence: what criteria may ask for besides.

    Raises:
        ValueError: when a score is not finite, or the alive weights of `masks` are not whole units.
    """
    dense = {name: torch.ones_like(mask) for name, mask in masks.items()}
    evidence = {"masks": dense, "layouts": layouts, "sparsity": 1 - alive(masks) / alive(dense), **evidence}
    scores = score(criterion, {name: weights[name] for name in masks}, evidence)
    for name in (name for name, values in scores.items() if not values.isfinite().all()):
        raise ValueError(
            f"the scores of {name} hold NaN or infinity; allowed are finite numbers. Look where the training "
            "of the weights diverged."
        )
    allocate = allocate if isinstance(allocate, AtLeast) else AtLeast(1, of=allocate)
    new: Masks = {}
    for names in parts:
        tensors = {name: _Units(granularity, scores[name], masks[name], layouts[name]) for name in names}
        new |= {name: tensor.outside.clone() for name, tensor in tensors.items()}
        for size in sorted({int(n) for tensor in tensors.values() for n in tensor.sizes.unique()}):
            here = {name: tensor for name, tensor in tensors.items() if (tensor.sizes == size).any()}
            keep = sum(tensor.living(size) for tensor in here.values()) // size
            candidates = {name: tensor.candidates(size) for name, tensor in here.items()}
            if keep == sum(int((tensor.sizes == size).sum()) for tensor in here.values()):
                best = {
                    name: (tensor.sizes == size).view(tensor.scores.shape) for name, tensor in here.items()
                }
            else:
                ranked = {name: tensor.scores for name, tensor in here.items()}
                budget = min(keep, alive(candidates))
                best = select(ranked, candidates, budget, allocate, params=weights, masks=dense)
            for name, tensor in here.items():
                new[name] |= tensor.expand(best[name])
        if (found := alive({n: new[n] for n in names})) != (wanted := alive({n: masks[n] for n in names})):
            raise ValueError(
                f"granularity: the masks of {', '.join(names)} have {wanted} weights alive, which are not "
                f"whole units of {granularity}; the units that fit have {found}. Allowed are masks that this "
                "granularity made. Give the granularity of the run that the masks come from."
            )
    return {name: new[name] for name in masks}


class _Units:
    """The units of one tensor: what they score, how many weights each has and how many of them are alive."""

    def __init__(self, granularity: Granularity, scores: Tensor, mask: Tensor, layout: Layout) -> None:
        layout = replace(layout, head=False)  # of the classes in it the ticket has been told
        self.scores, self.expand = units(granularity, scores, layout)
        numbers = unit_numbers(self.expand, self.scores.shape)
        self.outside = numbers < 0
        self.sizes = torch.bincount(numbers[~self.outside], minlength=self.scores.numel())
        self.alive = torch.bincount(numbers[mask & ~self.outside], minlength=self.scores.numel())

    def living(self, size: int) -> int:
        """How many weights are alive in the units of this size."""
        return int(self.alive[self.sizes == size].sum())

    def candidates(self, size: int) -> Tensor:
        """Which units have this size and may be chosen."""
        return (self.sizes == size).view(self.scores.shape) & (self.scores > DEAD)


def unit_numbers(expand: Expand, shape: torch.Size) -> Tensor:
    """For each weight of a tensor the number of its unit; -1 where it is in none and lives for ever.

    >>> from lightning_prune.granularity import NM, Filter
    >>> scores, expand = Filter(dim=0)(torch.zeros(2, 3))
    >>> unit_numbers(expand, scores.shape).tolist()
    [[0, 0, 0], [1, 1, 1]]
    >>> scores, expand = NM(1, 2)(torch.zeros(1, 3))
    >>> unit_numbers(expand, scores.shape).tolist()
    [[0, 1, -1]]

    Args:
        expand: from a mask of the units to one of the weights.
        shape: of the units.
    """
    outside = expand(torch.zeros(shape, dtype=torch.bool))
    numbers = torch.arange(shape.numel()).view(shape)
    found = torch.zeros(outside.shape, dtype=torch.int64)
    for digit in range(shape.numel().bit_length()):  # `expand` takes masks alone: one binary digit at a time
        found += expand((numbers >> digit) % 2 == 1).long() << digit
    return found.masked_fill(outside, -1)
