"""Allocations: how many where. An allocation splits a number of survivors over the tensors.

An allocation is any callable `(scores, total) -> {name: survivors}` whose values sum to `total`. The score of
a dead weight is minus infinity; every other score is finite. With a granularity, scores and survivors are
those of its units. By keyword it receives what its signature names of `params`, the weights, and `masks`.

No tensor is left without survivors unless that is asked for: every allocation works as
`AtLeast(1, of=allocation)`; write `AtLeast(0, of=...)` to let layers go.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction

import torch
from torch import Tensor

from lightning_prune import evidence
from lightning_prune.checks import number, whole
from lightning_prune.masks import Masks
from lightning_prune.selection import DEAD, Keep, Scores, count_above, threshold

Allocation = Callable[..., dict[str, int]]


def global_rank(scores: Scores, total: int) -> Keep:
    """Class-blind: the `total` highest scores of all tensors together survive. Ties go to the earlier tensor.

    >>> import torch
    >>> global_rank({"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([3.0, 2.0])}, total=3)
    {'a': 1, 'b': 2}

    Reference: See et al. (2016), arXiv:1606.09274, "class-blind".
    """
    keep = Keep(dict.fromkeys(scores, 0))
    if total == 0:
        return keep
    cut, _ = threshold(scores.values(), total)
    keep.update({name: count_above(s, cut, or_equal=True) for name, s in scores.items()})
    spare = sum(keep.values()) - total  # more are equal to the cut than there is room for
    for name in reversed(list(scores)):
        if not spare:
            break
        dropped = min(spare, keep[name] - count_above(scores[name], cut))
        keep[name] -= dropped
        spare -= dropped
    keep.near = cut
    return keep


def uniform(scores: Scores, total: int) -> Keep:
    """Class-uniform: every tensor keeps the same fraction of its weights, within one weight.

    A tensor that has fewer alive keeps all of those, and the others share the rest.

    >>> import torch
    >>> uniform({"a": torch.rand(10), "b": torch.rand(5)}, total=8)
    {'a': 5, 'b': 3}

    Reference: See et al. (2016), arXiv:1606.09274, "class-uniform".
    """
    return apportion(total, {name: s.numel() for name, s in scores.items()}, alive_per_tensor(scores))


def class_distributed(scores: Scores, total: int, *, params: Mapping[str, Tensor], masks: Masks) -> Keep:
    """Class-distribution: the threshold of each tensor is lambda * sigma, its weights' standard deviation.

    One lambda serves all, such that the total is exact: the highest scores / sigma of all tensors survive.
    Sigma is that of the living weights.

    >>> import torch
    >>> w = {"a": torch.tensor([1.0, -1.0]), "b": torch.tensor([5.0, -9.0])}
    >>> scores, masks = {n: x.abs() for n, x in w.items()}, {n: x < 9 for n, x in w.items()}
    >>> class_distributed(scores, 3, params=w, masks=masks)
    {'a': 2, 'b': 1}

    Reference: See et al. (2016), arXiv:1606.09274, "class-distribution"; Han et al. (2015), arXiv:1506.02626.
    """
    scaled: Scores = {}
    for name, s in scores.items():
        living = params[name][masks[name]].to(s.dtype)
        sigma = living.std(correction=0) if living.numel() else torch.ones((), dtype=s.dtype, device=s.device)
        scaled[name] = s / sigma.clamp_min(torch.finfo(s.dtype).tiny)
    return Keep(global_rank(scaled, total))


def erk(scores: Scores, total: int, *, params: Mapping[str, Tensor]) -> Keep:
    """Erdos-Renyi-Kernel: the density of a tensor is eps * (sum of its sizes) / (product of its sizes).

    One eps serves all, such that the total is exact. A tensor whose density would exceed 1 keeps all it has,
    and the others share the rest.

    >>> import torch
    >>> w = {"a": torch.ones(20, 80), "b": torch.ones(10, 10)}
    >>> erk(w, total=240, params=w)
    {'a': 200, 'b': 40}
    >>> erk(w, total=900, params=w)
    {'a': 800, 'b': 100}

    Reference: Evci et al. (2020), arXiv:1911.11134, Section 3; Mocanu et al. (2018), arXiv:1707.04780.
    """
    shares = {n: Fraction(s.numel() * sum(params[n].shape), params[n].numel()) for n, s in scores.items()}
    return apportion(total, shares, alive_per_tensor(scores))


def lamp(scores: Scores, total: int) -> Keep:
    """Layer-adaptive magnitude: the global rank of s^2 / (sum of t^2 over the tensor's scores t >= s).

    The highest score of every tensor has 1, so each keeps one. Scores below 0 count as 0.

    >>> import torch
    >>> lamp({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.1, 0.1, 0.1])}, total=3)
    {'a': 1, 'b': 2}

    Reference: Lee et al. (2021), arXiv:2010.07611, Equation 4.
    """
    ranked: Scores = {}
    for name, s in scores.items():
        order = s.reshape(-1).sort(descending=True, stable=True).values.double()
        squares = order.clamp_min(0).square()
        sums = squares.cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
        ranked[name] = (squares / sums).masked_fill(order == DEAD, DEAD)
    return Keep(global_rank(ranked, total))


@dataclass(frozen=True)
class PerLayer:
    """Densities by name pattern, scaled in common so that the total is exact.

    They are met as given where the schedule asks for the sparsity that they imply. (For exact budgets of
    their own give each pattern a schedule instead: `schedule={pattern: schedule}`.)

    >>> import torch
    >>> w = {"fc1.weight": torch.rand(80), "out.weight": torch.rand(20)}
    >>> PerLayer({"out.*": 0.5, "*": 0.25})(w, total=30, params=w)
    {'fc1.weight': 20, 'out.weight': 10}

    Args:
        densities: {fnmatch pattern over parameter names: density in (0, 1]}; the first that matches wins.

    Raises:
        ValueError: at the first pruning, when a pattern matches no weight, or a weight no pattern.
    """

    densities: Mapping[str, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "densities", dict(self.densities))
        for pattern, density in self.densities.items():
            name = f"densities[{pattern!r}]"
            number(name, density, "are numbers above 0 up to 1, such as 0.5", lambda v: 0 < v <= 1)

    def __call__(self, scores: Scores, total: int, *, params: Mapping[str, Tensor]) -> Keep:
        for pattern in self.densities:
            if not any(fnmatchcase(name, pattern) for name in params):
                raise ValueError(
                    f"densities: the pattern {pattern!r} matches no weight. They are: "
                    f"{', '.join(params)}. Name one of them."
                )
        shares = {name: s.numel() * Fraction(self._density(name)) for name, s in scores.items()}
        return apportion(total, shares, alive_per_tensor(scores))

    def _density(self, name: str) -> float:
        for pattern, density in self.densities.items():
            if fnmatchcase(name, pattern):
                return density
        raise ValueError(
            f"densities: no pattern matches {name}; every weight needs one. Add the pattern '*' as "
            "the last one."
        )


@dataclass(frozen=True)
class AtLeast:
    """A minimum of survivors in every tensor; the tensors that it does not touch share the rest.

    A tensor that has fewer alive keeps all of those. A total too small for all minima is split without them.

    >>> import torch
    >>> s = {"a": torch.tensor([4.0, 3.0, 2.0]), "b": torch.tensor([1.0, 0.5])}
    >>> global_rank(s, total=3), AtLeast(1, of=global_rank)(s, total=3)
    ({'a': 3, 'b': 0}, {'a': 2, 'b': 1})

    Args:
        n: the minimum, 0 or more.
        of: the allocation that splits the rest.
    """

    n: int = 1
    of: Allocation = global_rank

    def __post_init__(self) -> None:
        whole("n", self.n, 0)

    def __call__(
        self,
        scores: Scores,
        total: int,
        *,
        params: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
    ) -> dict[str, int]:
        keep = evidence.call(self.of, scores, total, params=params, masks=masks)
        if not scores or min(keep.values()) >= self.n:
            return keep
        floors = {name: min(self.n, count) for name, count in alive_per_tensor(scores).items()}
        fixed: dict[str, int] = {}
        while sum(floors.values()) <= total:
            short = {name: floors[name] for name in keep if keep[name] < floors[name]}
            if not short:
                return {name: fixed[name] if name in fixed else keep[name] for name in scores}
            fixed |= short
            free = {name: s for name, s in scores.items() if name not in fixed}
            keep = evidence.call(self.of, free, total - sum(fixed.values()), params=params, masks=masks)
        return keep


def alive_per_tensor(scores: Scores) -> dict[str, int]:
    """How many weights of each tensor are candidates."""
    return {
        name: s.numel() if s.numel() and bool(s.amin() > DEAD) else count_above(s, DEAD)
        for name, s in scores.items()
    }


def apportion(total: int, shares: Mapping[str, float | Fraction], caps: Mapping[str, int]) -> Keep:
    """Split `total` in proportion to `shares` by the largest remainder, none above its cap.

    Equal remainders: the earlier name comes first.

    >>> apportion(7, {"a": 1, "b": 1, "c": 2}, {"a": 9, "b": 1, "c": 9})
    {'a': 2, 'b': 1, 'c': 4}
    """
    if total > sum(caps.values()):
        raise ValueError(
            f"total={total}: allowed is 0 to {sum(caps.values())}, what is alive. Ask for fewer."
        )
    # In exact arithmetic: the rounding errors of floats would break ties.
    exact: dict[str, Fraction] = {}
    free = {name: Fraction(share) for name, share in shares.items()}
    while free:  # whoever would get more than its cap gets the cap, and the others share the rest
        rest = total - sum(caps[name] for name in exact)
        mass = sum(free.values()) or Fraction(1)
        full = [name for name, share in free.items() if rest * share / mass >= caps[name]]
        if not full:
            exact.update({name: rest * share / mass for name, share in free.items()})
            break
        exact.update({name: Fraction(caps[name]) for name in full})
        free = {name: share for name, share in free.items() if name not in full}
    keep = Keep({name: int(exact[name]) for name in shares})
    by_remainder = sorted(shares, key=lambda name: keep[name] - exact[name])
    while (missing := total - sum(keep.values())) > 0:
        for name in [n for n in by_remainder if keep[n] < caps[n]][:missing]:
            keep[name] += 1
    return keep
