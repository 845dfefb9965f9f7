"""Allocations: how many where. An allocation splits a number of survivors over the tensors.

An allocation is any callable `(scores, total) -> {name: survivors}` whose values sum to `total`: a number for
a tensor, or whole numbers in a tensor of one dimension, one for each output. The score of a dead weight is
minus infinity; every other score is finite. With a granularity, scores and survivors are those of its units.
By keyword it receives what its signature names of `params`, the weights, `masks`, `layouts`, which say what
the outputs of a tensor are, and `together`: ranks that hold parts of the tensors, whose counts are then those
of the whole tensors. In `prune` with `data` there are also `model`, `batches` and `forward`, as criteria get.

No tensor is left without survivors unless that is asked for: every allocation works as
`AtLeast(1, of=allocation)`; write `AtLeast(0, of=...)` to let layers go.
"""

import warnings
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import adaptive
from lightning_prune.checks import number, whole
from lightning_prune.criteria import wanda
from lightning_prune.evidence import Forward
from lightning_prune.layers import Layout
from lightning_prune.masks import Masks, count
from lightning_prune.selection import (
    Allocation,
    Counts,
    Keep,
    Scores,
    Together,
    candidates_per_output,
    candidates_per_tensor,
    check_together,
    count_above,
    counted,
    counts_by,
    survivors,
    threshold,
)
from lightning_prune.shards import local


def global_rank(scores: Scores, total: int, *, together: Together | None = None) -> Keep:
    """Class-blind: the `total` highest scores of all tensors together survive. Ties go to the earlier tensor.

    >>> import torch
    >>> global_rank({"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([3.0, 2.0])}, total=3)
    {'a': 1, 'b': 2}

    Reference: See et al. (2016), arXiv:1606.09274, "class-blind".
    """
    keep = Keep(dict.fromkeys(scores, 0))
    if total == 0:
        return keep
    own = [s for name, s in scores.items() if together is None or together.counts(name)]
    cut, _ = threshold(own, total, together)
    keep.update(counted({n: count_above(s, cut, or_equal=True) for n, s in scores.items()}, together))
    spare = sum(keep.values()) - total  # more are equal to the cut than there is room for
    if spare and together:
        above = counted({n: count_above(s, cut) for n, s in scores.items()}, together)
    else:
        above = None
    for name in reversed(list(scores)):
        if not spare:
            break
        dropped = min(spare, keep[name] - (above[name] if above else count_above(scores[name], cut)))
        keep[name] -= dropped
        spare -= dropped
    keep.near = cut
    return keep


def uniform(scores: Scores, total: int, *, together: Together | None = None) -> Keep:
    """Class-uniform: every tensor keeps the same fraction of its weights, within one weight.

    A tensor that has fewer alive keeps all of those, and the others share the rest.

    >>> import torch
    >>> uniform({"a": torch.rand(10), "b": torch.rand(5)}, total=8)
    {'a': 5, 'b': 3}

    Reference: See et al. (2016), arXiv:1606.09274, "class-uniform".
    """
    sizes = counted({name: s.numel() for name, s in scores.items()}, together)
    return apportion(total, sizes, candidates_per_tensor(scores, together))


def per_output(
    scores: Scores,
    total: int,
    *,
    layouts: Mapping[str, Layout] | None = None,
    together: Together | None = None,
) -> dict[str, Tensor]:
    """Every output of every layer keeps the same fraction of its weights: the comparison group of Wanda.

    A layer has the total that it has with `uniform`, and its outputs differ by at most one: the earlier ones
    have one more. An output that has fewer alive keeps all of those, and the others of its layer share the
    rest. Outputs are neurons, or channels of a convolution, with all the weights that lead to them.

    >>> import torch
    >>> per_output({"a": torch.rand(3, 4), "b": torch.rand(2, 4)}, total=11)
    {'a': tensor([3, 2, 2]), 'b': tensor([2, 2])}

    Raises:
        ValueError: when the units of a granularity are whole outputs, or belong to several of them.

    Reference: Sun et al. (2024), arXiv:2306.11695, Section 3, "comparison group".
    """
    return EvenOutputs(of=uniform)(scores, total, layouts=layouts, together=together)


@dataclass(frozen=True)
class EvenOutputs:
    """As many in each tensor as another allocation says, and within it equally many in every output.

    Outputs of a tensor differ by at most one, the earlier ones have one more: constant fan-in.

    >>> import torch
    >>> scores = {"a": torch.rand(3, 4), "b": torch.rand(2, 4)}
    >>> EvenOutputs(of=uniform)(scores, total=11)
    {'a': tensor([3, 2, 2]), 'b': tensor([2, 2])}

    Args:
        of: the allocation that says how many of each tensor.

    Raises:
        ValueError: as it is called, when the units of a granularity are whole outputs, or belong to several
            of them.

    Reference: Lasby et al. (2024), arXiv:2305.02299, Section 3.1.
    """

    of: Allocation

    def __call__(
        self,
        scores: Scores,
        total: int,
        *,
        params: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
        layouts: Mapping[str, Layout] | None = None,
        together: Together | None = None,
    ) -> dict[str, Tensor]:
        check_together(self.of, together)
        keep: dict[str, Tensor] = {}
        given = {"params": params, "masks": masks, "layouts": layouts, "together": together}
        counts = counts_by(self.of, scores, total, **given)
        for name, planned in counts.items():
            if scores[name].dim() < 2:
                raise ValueError(
                    "allocate: per_output and EvenOutputs share out what lies within an output, and the "
                    f"units of {name} are whole outputs or whole inputs. Allowed are single weights, "
                    "kernels, blocks and N:M. Use `uniform`, or one of these as granularity."
                )
            layout = (layouts or {}).get(name, Layout())
            caps = candidates_per_output(name, scores[name], layout, together)
            keep[name] = evenly(survivors(planned), caps)
        return keep


def evenly(total: int, caps: Tensor) -> Tensor:
    """Split `total` into equal parts, within one, the earlier ones larger, none above its cap.

    >>> import torch
    >>> evenly(9, torch.tensor([9, 1, 9, 9]))
    tensor([3, 1, 3, 2])
    """
    # parts are the caps, cut off at a level; the highest at which they do not exceed the total
    below = lambda level: int(caps.clamp(max=level).sum()) <= total  # noqa: E731
    level = bisect_left(range(int(caps.max()) + 1), True, key=lambda level: not below(level)) - 1
    parts = caps.clamp(max=level)
    parts[(caps > level).nonzero().flatten()[: total - int(parts.sum())]] += 1
    return parts


def class_distributed(
    scores: Scores,
    total: int,
    *,
    params: Mapping[str, Tensor],
    masks: Masks,
    together: Together | None = None,
) -> Keep:
    """Class-distribution: the threshold of each tensor is lambda * sigma, its weights' standard deviation.

    One lambda serves all, such that the total is exact: the highest scores / sigma of all tensors survive.
    Sigma is that of the living weights, computed in double precision and rounded to single.

    >>> import torch
    >>> w = {"a": torch.tensor([1.0, -1.0]), "b": torch.tensor([5.0, -9.0])}
    >>> scores, masks = {n: x.abs() for n, x in w.items()}, {n: x < 9 for n, x in w.items()}
    >>> class_distributed(scores, 3, params=w, masks=masks)
    {'a': 2, 'b': 1}

    Reference: See et al. (2016), arXiv:1606.09274, "class-distribution"; Han et al. (2015), arXiv:1506.02626.
    """
    scaled: Scores = {}
    for name, s in scores.items():
        living = local(params[name])[masks[name]].double()
        n, mean = _mean(name, living, together)
        _, variance = _mean(name, (living - mean).square(), together)
        sigma = torch.tensor(variance**0.5 if n else 1.0, dtype=torch.float32, device=s.device).to(s.dtype)
        scaled[name] = s / sigma.clamp_min(torch.finfo(s.dtype).tiny)
    return Keep(global_rank(scaled, total, together=together))


def _mean(name: str, values: Tensor, together: Together | None) -> tuple[int, float]:
    """How many values a whole tensor has, and their mean, in float64; these are those of a part of it."""
    found = torch.tensor([values.numel(), float(values.sum(dtype=torch.float64))], dtype=torch.float64)
    if together is not None:
        found = together.add(found if together.counts(name) else torch.zeros_like(found))
    n, total = found.tolist()
    return int(n), total / max(1.0, n)


def erk(
    scores: Scores, total: int, *, params: Mapping[str, Tensor], together: Together | None = None
) -> Keep:
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
    sizes = counted({name: s.numel() for name, s in scores.items()}, together)
    shares = {n: Fraction(size * sum(params[n].shape), params[n].numel()) for n, size in sizes.items()}
    return apportion(total, shares, candidates_per_tensor(scores, together))


def lamp(scores: Scores, total: int, *, together: Together | None = None) -> Keep:
    """Layer-adaptive magnitude: the global rank of s^2 / (sum of t^2 over the tensor's scores t >= s).

    The highest score of every tensor has 1, so each keeps one. Scores below 0 count as 0. Sums are in double
    precision, and ratios are rounded to single.

    >>> import torch
    >>> lamp({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.1, 0.1, 0.1])}, total=3)
    {'a': 1, 'b': 2}

    Reference: Lee et al. (2021), arXiv:2010.07611, Equation 4.
    """
    return adaptive.kept(scores, total, together)


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

    def __call__(
        self,
        scores: Scores,
        total: int,
        *,
        params: Mapping[str, Tensor],
        together: Together | None = None,
    ) -> Keep:
        for pattern in self.densities:
            if not any(fnmatchcase(name, pattern) for name in params):
                raise ValueError(
                    f"densities: the pattern {pattern!r} matches no weight. They are: "
                    f"{', '.join(params)}. Name one of them."
                )
        sizes = counted({name: s.numel() for name, s in scores.items()}, together)
        shares = {name: size * Fraction(self._density(name)) for name, size in sizes.items()}
        return apportion(total, shares, candidates_per_tensor(scores, together))

    def _density(self, name: str) -> float:
        for pattern, density in self.densities.items():
            if fnmatchcase(name, pattern):
                return density
        raise ValueError(
            f"densities: no pattern matches {name}; every weight needs one. Add the pattern '*' as "
            "the last one."
        )


@dataclass(frozen=True)
class OWL:
    """Outlier weighed layerwise sparsity: tensors with more outliers keep more of their weights.

    Outliers are the weights with |w| * ||x||_2 above m times the mean of their tensor, x being the inputs
    that the weight is multiplied with, in the network as it is before this pruning. The ratios of outliers
    are scaled to lie 2 lam apart at most, and shifted by what makes the total exact, so that the sparsities
    lie that close to the one asked for. (The paper computes one ratio for all tensors of a transformer's
    block.)

    Args:
        m: above 0. The defaults are the authors' for LLaMA.
        lam: 0 (as `of` alone) up to, and not including, 1/2.
        of: what shares out a tensor's survivors within it: `uniform`, or `per_output`.

    Reference: Yin et al. (2024), arXiv:2310.05175, Section 3.2.
    """

    m: float = 5.0
    lam: float = 0.08
    of: Allocation = uniform

    def __post_init__(self) -> None:
        number("m", self.m, "are finite numbers above 0, such as 5", lambda v: 0 < v < float("inf"))
        number("lam", self.lam, "are numbers from 0 to below 0.5, such as 0.08", lambda v: 0 <= v < 0.5)

    def __call__(
        self,
        scores: Scores,
        total: int,
        *,
        batches: list[Any],
        model: nn.Module,
        forward: Forward,
        params: Mapping[str, Tensor],
        masks: Masks | None = None,
        layouts: Mapping[str, Layout] | None = None,
        together: Together | None = None,
    ) -> dict[str, int | Tensor]:
        check_together(self.of, together)
        inputs = wanda({name: params[name] for name in scores}, model, batches, forward)
        ratios = {name: _outliers(name, local(inputs.pop(name)), self.m, together) for name in scores}
        sizes = counted({name: s.numel() for name, s in scores.items()}, together)
        there = candidates_per_tensor(scores, together)
        counts = apportion(total, self.shares(ratios, sizes, total), there)
        keep: dict[str, int | Tensor] = {}
        given = {"params": params, "masks": masks, "layouts": layouts, "together": together}
        for name, s in scores.items():
            keep |= counts_by(self.of, {name: s}, counts[name], **given)
        return keep

    def shares(self, ratios: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, float]:
        """How many weights each tensor is to keep, from its ratio of outliers and its size.

        >>> OWL(lam=0.1).shares({"a": 0.02, "b": 0.01}, {"a": 100, "b": 300}, total=200)
        {'a': 65.0, 'b': 135.0}
        """
        apart = max(ratios.values()) - min(ratios.values())
        scaled = {name: 2 * self.lam * ratio / (apart or 1.0) for name, ratio in ratios.items()}
        shift = (total - sum(scaled[name] * n for name, n in sizes.items())) / (sum(sizes.values()) or 1)
        return {name: n * max(0.0, scaled[name] + shift) for name, n in sizes.items()}


def outliers(scores: Tensor, m: float) -> float:
    """The fraction of scores that are above m times their mean.

    >>> import torch
    >>> outliers(torch.tensor([1.0, 1.0, 1.0, 9.0]), m=2)
    0.25
    """
    return _outliers("", scores, m, None)


def _outliers(name: str, scores: Tensor, m: float, together: Together | None) -> float:
    """The same of a whole tensor, of a part of which these are the scores."""
    n, mean = _mean(name, scores, together)
    limit = m * torch.tensor(mean, dtype=torch.float32, device=scores.device)
    return counted({name: count(scores > limit)}, together)[name] / max(1, n)


@dataclass(frozen=True)
class AtLeast:
    """A minimum of survivors in every tensor; the tensors that it does not touch share the rest.

    A tensor that has fewer alive keeps all of those. Where a total is too small for all minima, the largest
    minimum that fits holds, with a warning.

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
        layouts: Mapping[str, Layout] | None = None,
        together: Together | None = None,
        model: nn.Module | None = None,
        batches: list[Any] | None = None,
        forward: Forward | None = None,
    ) -> Counts:
        check_together(self.of, together)
        given = {"params": params, "masks": masks, "layouts": layouts, "together": together}
        run = {"model": model, "batches": batches, "forward": forward}
        split = partial(counts_by, self.of, **given, **run)
        keep = split(scores, total)
        if not scores or min(map(survivors, keep.values())) >= self.n:
            return keep
        there = candidates_per_tensor(scores, together)
        n = largest_minimum(self.n, total, there)
        if n < self.n > 1:
            warnings.warn(
                f"allocate: {total} survivors are fewer than {self.n} in each of {len(there)} tensors; the "
                f"minimum is {n} here. Ask for a lower sparsity, or exclude some tensors.",
                stacklevel=2,
            )
        floors = {name: min(n, count) for name, count in there.items()}
        fixed: dict[str, int] = {}
        while short := {name: floors[name] for name in keep if survivors(keep[name]) < floors[name]}:
            fixed |= short
            free = {name: s for name, s in scores.items() if name not in fixed}
            keep = split(free, total - sum(fixed.values()))
        return {name: fixed[name] if name in fixed else keep[name] for name in scores}


def may_empty(allocate: Allocation) -> bool:
    """Whether an allocation may leave a tensor without a survivor: only one that says so may.

    >>> may_empty(AtLeast(0, of=global_rank)), may_empty(global_rank)
    (True, False)
    """
    return isinstance(allocate, AtLeast) and allocate.n == 0


def largest_minimum(n: int, total: int, there: Mapping[str, int]) -> int:
    """The largest minimum up to `n` that a total has room for, where some tensors have fewer candidates.

    >>> largest_minimum(10, 12, {"a": 4, "b": 9, "c": 9})
    4
    """
    fits = lambda n: sum(min(n, count) for count in there.values()) <= total  # noqa: E731
    return n if fits(n) else bisect_left(range(n), True, key=lambda n: not fits(n)) - 1


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
