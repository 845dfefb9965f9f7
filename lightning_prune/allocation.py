"""Allocations: how many where. An allocation splits a number of survivors over the tensors.

An allocation is any callable `(scores, total) -> {name: survivors}` whose values sum to `total`. The score of
a dead weight is minus infinity; every other score is finite.
"""

from collections.abc import Mapping
from fractions import Fraction

from lightning_prune.masks import DEAD, Keep, Scores, count_above, threshold


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
    cut, ties = threshold(scores.values(), total)
    for name, s in scores.items():
        keep[name] = count_above(s, cut)
        if ties:
            equal = min(ties, count_above(s, cut, or_equal=True) - keep[name])
            keep[name] += equal
            ties -= equal
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


def alive_per_tensor(scores: Scores) -> dict[str, int]:
    """How many weights of each tensor are candidates."""
    return {name: count_above(s, DEAD) for name, s in scores.items()}


def apportion(total: int, shares: Mapping[str, float], caps: Mapping[str, int]) -> Keep:
    """Split `total` in proportion to `shares` by the largest remainder, none above its cap.

    Equal remainders: the earlier name comes first.

    >>> apportion(7, {"a": 1, "b": 1, "c": 2}, {"a": 9, "b": 1, "c": 9})
    {'a': 2, 'b': 1, 'c': 4}
    """
    if total > sum(caps.values()):
        raise ValueError(f"total={total}: only {sum(caps.values())} weights are alive.")
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
