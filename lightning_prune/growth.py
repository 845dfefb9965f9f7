"""Growth: connections that go and others that come, in a network that stays as sparse as it is.

Masks are born in `selection.select`, here too: the living are the candidates of what stays, the dead those of
what grows.
"""

from collections.abc import Mapping
from typing import Any

from lightning_prune.allocation import Allocation
from lightning_prune.masks import Masks, alive, count
from lightning_prune.selection import Scores, select


def updates_before(step: int, every: int) -> int:
    """How many updates are due before a step, the first of them after `every` steps.

    >>> updates_before(1125, 100), updates_before(100, 100)
    (11, 0)
    """
    return max(0, -(-step // every) - 1)


def exchanged(masks: Masks, number: Mapping[str, int], drop: Scores, grow: Scores) -> Masks:
    """Exchange connections in each tensor: so many of the living go, and as many of the dead come.

    Those of the lowest `drop` scores go, those of the highest `grow` scores come. What just went does not
    come back in the same exchange. Of equal scores the one of the lower index (row-major) lives.

    >>> import torch
    >>> masks = {"w": torch.tensor([True, True, False, False])}
    >>> weights, gradients = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([9.0, 9.0, 1.0, 2.0])
    >>> exchanged(masks, {"w": 1}, drop={"w": weights}, grow={"w": gradients})
    {'w': tensor([ True, False, False,  True])}

    Args:
        masks: who is alive.
        number: of each tensor; at most as many as are alive, and as are dead.
        drop: scores, higher = keep; those of the dead do not matter.
        grow: scores, higher = grow; those of the living do not matter.

    Returns:
        New masks with as many alive in each tensor as before.

    Reference: Mocanu et al. (2018), arXiv:1707.04780 (SET); Evci et al. (2020), arXiv:1911.11134, Algorithm 1
        (RigL).
    """
    dead = {name: ~mask for name, mask in masks.items()}
    stay = select(
        drop,
        masks,
        alive(masks) - sum(number.values()),
        _as_many({n: count(m) - number[n] for n, m in masks.items()}),
    )
    come = select(grow, dead, sum(number.values()), _as_many(number))
    return {name: stay[name] | come[name] for name in masks}


def regrown(living: Masks, total: int, grow: Scores, allocate: Allocation, **evidence: Any) -> Masks:
    """Let the dead of the highest `grow` scores come until `total` weights are alive, where `allocate` says.

    >>> import torch
    >>> from lightning_prune.allocation import global_rank
    >>> scores = {"w": torch.tensor([0.0, 1.0, 2.0])}
    >>> regrown({"w": torch.tensor([True, False, False])}, 2, scores, global_rank)
    {'w': tensor([ True, False,  True])}
    """
    dead = {name: ~mask for name, mask in living.items()}
    come = select(grow, dead, total - alive(living), allocate, **evidence)
    return {name: mask | come[name] for name, mask in living.items()}


def in_exchange(masks: Masks, fraction: float) -> dict[str, int]:
    """How many connections of each tensor are exchanged: this fraction of the living, at most all dead.

    >>> import torch
    >>> in_exchange({"a": torch.arange(10) < 4, "b": torch.arange(10) < 9}, 0.5)
    {'a': 2, 'b': 1}
    """
    numbers: dict[str, int] = {}
    for name, mask in masks.items():
        living = count(mask)
        numbers[name] = min(round(fraction * living), mask.numel() - living)
    return numbers


def _as_many(numbers: Mapping[str, int]) -> Allocation:
    return lambda scores, total: dict(numbers)
