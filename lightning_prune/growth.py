"""Growth: connections that go and others that come, in a network that stays as sparse as it is.

Masks are born in `selection.select`, here too: the living are the candidates of what stays, the dead those of
what grows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.allocation import Allocation
from lightning_prune.checks import number as check_number
from lightning_prune.granularity import NM, Expand
from lightning_prune.layers import Layout
from lightning_prune.masks import Masks, alive, count, integer
from lightning_prune.selection import DEAD, Scores, Together, counted, keep_top, keep_top_of_rows, select


def updates_before(step: int, every: int) -> int:
    """How many updates are due before a step, the first of them after `every` steps.

    >>> updates_before(1125, 100), updates_before(100, 100)
    (11, 0)
    """
    return max(0, -(-step // every) - 1)


def exchanged(
    masks: Masks,
    number: Mapping[str, int],
    drop: Scores,
    grow: Scores,
    before: Masks | None = None,
    together: Together | None = None,
) -> Masks:
    """Exchange connections in each tensor: so many of the living go, and as many of the dead come.

    Those of the lowest `drop` scores go, those of the highest `grow` scores come. What just went does not
    come back in the same exchange, as it may in RigL's Algorithm 1. Of equal scores the one of the lower
    index (row-major) lives.

    >>> import torch
    >>> masks = {"w": torch.tensor([True, True, False, False])}
    >>> weights, gradients = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([9.0, 9.0, 1.0, 2.0])
    >>> exchanged(masks, {"w": 1}, drop={"w": weights}, grow={"w": gradients})
    {'w': tensor([ True, False, False,  True])}

    Args:
        masks: who is alive.
        number: of each tensor; at most as `in_exchange` says.
        drop: scores, higher = keep; those of the dead do not matter.
        grow: scores, higher = grow; those of the living do not matter.
        before: who was alive before the same update made the masks sparser or denser; None: it did not. What
            it has just taken does not come back, and what has just come does not go.
        together: over processes that hold parts of the tensors. Numbers are then those of the whole tensors.

    Returns:
        New masks with as many alive in each tensor as before.

    Reference: Mocanu et al. (2018), arXiv:1707.04780 (SET); Evci et al. (2020), arXiv:1911.11134, Algorithm 1
        (RigL).
    """
    living, dead = _candidates(masks, before)
    left = {name: there - number[name] for name, there in _counts(living, together).items()}
    stay = select(drop, living, sum(left.values()), _as_many(left), together)
    come = select(grow, dead, sum(number.values()), _as_many(number), together)
    return {name: stay[name] | come[name] | (masks[name] & ~living[name]) for name in masks}


def _candidates(masks: Masks, before: Masks | None) -> tuple[Masks, Masks]:
    """Who may go, and who may come: of those only who has been alive, or dead, since before the update."""
    before = masks if before is None else before
    may_go = {name: mask & before[name] for name, mask in masks.items()}
    return may_go, {name: ~(mask | before[name]) for name, mask in masks.items()}


@dataclass(frozen=True)
class FanIn:
    """Constant fan-in: in a layer every output that is alive has equally many living weights, within one.

    Outputs are neurons, or channels of a convolution. One that few weights speak for is ablated: all of its
    weights die, and the others of its layer share as many; it comes back when enough of them are wanted.
    Biases, and the layers after it, stay as they are. The outputs of the network's last layer are kept.

    >>> FanIn(ablate=0.3).rows(torch.tensor([[1, 2], [3, 4]]))[0]
    tensor([[1, 2],
            [3, 4]])

    Args:
        ablate: an output is ablated that has fewer salient weights than this fraction of the fan-in, in
            [0, 1]. Salient are the weights that stay at an update, and the dead ones that would grow without
            this granularity. 0: none is ablated. The paper has 0.3 for convolutional networks, 0.95 for
            vision transformers.

    Reference: Lasby et al. (2024), arXiv:2305.02299, Section 3.1 (SRigL).
    """

    ablate: float = 0.3

    def __post_init__(self) -> None:
        allowed = "are fractions from 0 to 1, such as 0.3"
        check_number("ablate", self.ablate, allowed, lambda v: 0 <= v <= 1)

    def rows(self, weight: Tensor, layout: Layout = Layout()) -> tuple[Tensor, Expand]:
        """A matrix of one row for each output, and how a mask of it becomes one of the weight."""
        return layout.rows(weight), lambda mask: layout.from_rows(mask, weight.shape)


def exchanged_in_rows(mask: Tensor, number: int, drop: Tensor, grow: Tensor, ablate: float = 0.0) -> Tensor:
    """Exchange connections of one layer so that every row that is alive keeps equally many, within one.

    The `number` living of the lowest `drop` scores of the layer go. Each row then grows those of its dead
    with the highest `grow` scores until it is full. Where a row has too few dead for that, those of the
    highest `drop` scores do not go after all. Of equal scores the one of the lower index lives.

    >>> mask = torch.tensor([[True, True, False, False], [True, True, False, False]])
    >>> drop = torch.tensor([[5.0, 1.0, 0.0, 0.0], [4.0, 3.0, 0.0, 0.0]])
    >>> grow = torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 9.0, 9.0]])
    >>> exchanged_in_rows(mask, 1, drop, grow)
    tensor([[ True, False, False,  True],
            [ True,  True, False, False]])

    Args:
        mask: who is alive, a matrix: of N:M a row for each group, of constant fan-in one for each output.
        number: how many go, but for those that their row cannot do without; at most as many as are alive,
            and as are dead.
        drop: scores, higher = keep; those of the dead do not matter.
        grow: scores, higher = grow; those of the living do not matter.
        ablate: of the fan-in, the living weights of a row that is alive: a row with fewer salient weights
            than this fraction of it dies. Salient is what stays, and the `number` dead with the highest
            `grow` scores. As many rows as the living need are kept, those with the most salient weights.

    Returns:
        A new mask with as many alive as before.

    Reference: Lasby et al. (2024), arXiv:2305.02299, Section 3.1.
    """
    total, width = count(mask), mask.shape[1]
    if not total:
        return mask.clone()
    stays = keep_top(drop.masked_fill(~mask, DEAD), total - number)
    lives = mask.any(1)
    if ablate:
        salient = (stays | keep_top(grow.masked_fill(mask, DEAD), number)).sum(1)
        lives, least = salient >= max(1, ablate * (total // count(lives))), -(-total // width)
        if count(lives) < least:
            lives = keep_top(salient.double(), least)
    fan_in, more = divmod(total, count(lives))
    held = (stays & lives[:, None]).sum(1)
    wanted = fan_in * lives + keep_top(held.double().masked_fill(~lives, DEAD), more)
    stays = keep_top_of_rows(drop.masked_fill(~stays, DEAD), held.minimum(wanted))
    missing = wanted - stays.sum(1)
    fresh = missing.minimum((~mask).sum(1))
    come = keep_top_of_rows(grow.masked_fill(mask, DEAD), fresh)
    needed = keep_top_of_rows(drop.masked_fill(~mask | stays, DEAD), missing - fresh)
    return stays | come | needed


def exchanged_within(
    granularity: NM | FanIn,
    masks: Masks,
    number: Mapping[str, int],
    drop: Scores,
    grow: Scores,
    layouts: Mapping[str, Layout],
) -> Masks:
    """Exchange connections in each tensor as `exchanged_in_rows` does, in the rows of a granularity.

    >>> masks = {"w": torch.tensor([[True, False, False, True]])}
    >>> scores = {"w": torch.tensor([[2.0, 7.0, 8.0, 1.0]])}
    >>> exchanged_within(NM(1, 2), masks, {"w": 1}, scores, scores, {})
    {'w': tensor([[ True, False,  True, False]])}
    """
    new: Masks = {}
    for name, mask in masks.items():
        layout = layouts.get(name, Layout())
        ablate = granularity.ablate if isinstance(granularity, FanIn) and not layout.head else 0.0
        rows, expand = granularity.rows(mask, layout)
        scores = (granularity.rows(of[name], layout)[0] for of in (drop, grow))
        new[name] = expand(exchanged_in_rows(rows, number[name], *scores, ablate)).contiguous()
    return new


def fits(granularity: NM | FanIn, mask: Tensor, layout: Layout) -> bool:
    """Whether a mask is one of a granularity: n of every m alive, or one fan-in within one.

    >>> [fits(NM(1, 2), torch.tensor([mask]), Layout()) for mask in ([True, False], [True, True])]
    [True, False]
    """
    rows, expand = granularity.rows(mask, layout)
    living = rows.sum(1)
    if isinstance(granularity, NM):
        return bool((living == granularity.n).all()) and torch.equal(expand(rows), mask)
    living = living[living > 0]
    return not len(living) or int(living.max() - living.min()) <= 1


def regrown(
    living: Masks,
    total: int,
    grow: Scores,
    allocate: Allocation,
    together: Together | None = None,
    **evidence: Any,
) -> Masks:
    """Let the dead of the highest `grow` scores come until `total` weights are alive, where `allocate` says.

    With `together`, masks and scores are those of the parts that this process has, and `total` is of all.

    >>> import torch
    >>> from lightning_prune.allocation import global_rank
    >>> scores = {"w": torch.tensor([0.0, 1.0, 2.0])}
    >>> regrown({"w": torch.tensor([True, False, False])}, 2, scores, global_rank)
    {'w': tensor([ True, False,  True])}
    """
    dead = {name: ~mask for name, mask in living.items()}
    there = sum(_counts(living, together).values())
    come = select(grow, dead, total - there, allocate, together, **evidence)
    return {name: mask | come[name] for name, mask in living.items()}


def in_exchange(
    masks: Masks, fraction: float, before: Masks | None = None, together: Together | None = None
) -> dict[str, int]:
    """How many connections of each tensor are exchanged: this fraction of the living, at most all dead.

    Where the update has made the masks sparser or denser, at most as many as were dead, or alive, `before`
    and still are. With `together`, masks are the parts that this process has, and the numbers those of all.

    >>> import torch
    >>> in_exchange({"a": torch.arange(10) < 4, "b": torch.arange(10) < 9}, 0.5)
    {'a': 2, 'b': 1}
    """
    living, (may_go, may_come) = _counts(masks, together), _candidates(masks, before)
    go, come = _counts(may_go, together), _counts(may_come, together)
    return {name: min(round(fraction * n), go[name], come[name]) for name, n in living.items()}


def tells_dead_apart(scores: Scores, masks: Masks, together: Together | None = None) -> bool:
    """Whether the scores of the dead differ in a tensor; so they do where none has two of them.

    >>> masks = {"w": torch.tensor([True, False, False])}
    >>> [tells_dead_apart({"w": torch.tensor(w)}, masks) for w in ([5.0, 0.0, 0.0], [0.0, 1.0, 2.0])]
    [False, True]
    """
    there = _counts({name: ~mask for name, mask in masks.items()}, together)
    several = [name for name, n in there.items() if n > 1]
    return not several or any(_differ(scores[name][~masks[name]], together) for name in several)


def _differ(values: Tensor, together: Together | None) -> bool:
    """Whether several values differ; with `together`, of which this process may have none."""
    # as integers, which processes can compare; no -0.0
    keys = values.to(torch.promote_types(values.dtype, torch.float32)) + 0.0
    keys = keys.view(integer(keys.dtype))
    wide = torch.iinfo(torch.int64)
    low, high = (int(keys.min()), int(keys.max())) if len(keys) else (wide.max, wide.min)
    low, high = (low, high) if together is None else together.span(low, high)
    return low < high


def exchange_of(before: Masks, after: Masks, ever: Masks) -> dict[str, float]:
    """How many connections an update dropped and grew, and how many of the grown had been alive before.

    >>> import torch
    >>> mask = lambda *alive: {"w": torch.tensor(alive).bool()}
    >>> exchange_of(mask(1, 1, 0, 0), mask(1, 0, 1, 0), ever=mask(1, 1, 1, 0))
    {'dropped': 1, 'grown': 1, 'returned': 1}

    Args:
        before: who was alive before the update.
        after: who is alive after it.
        ever: who had been alive at some time before it.
    """
    grown = {name: mask & ~before[name] for name, mask in after.items()}
    return {
        "dropped": alive({name: mask & ~after[name] for name, mask in before.items()}),
        "grown": alive(grown),
        "returned": alive({name: mask & ever[name] for name, mask in grown.items()}),
    }


def _counts(masks: Masks, together: Together | None) -> dict[str, int]:
    """How many are alive in each whole tensor."""
    return counted({name: count(mask) for name, mask in masks.items()}, together)


def _as_many(numbers: Mapping[str, int]) -> Allocation:
    def counts(scores: Scores, total: int, *, together: Together | None = None) -> dict[str, int]:
        return dict(numbers)

    return counts
