"""Selection: the one place where masks are born.

`select` chooses, of some candidates, those of the highest scores: of the living weights when one prunes, of
the dead ones when connections grow, of the units of a granularity or of a network's channels. It is a radix
select on the bits of the scores: exact, linear, and without a copy of its input. Its histograms add up, so
ranks that hold parts of the tensors choose together what one process would.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, Concatenate, Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import final

from lightning_prune.checks import named
from lightning_prune.evidence import asked, call
from lightning_prune.layers import Layout
from lightning_prune.masks import Masks, count, integer
from lightning_prune.shards import Part

Scores = dict[str, Tensor]
Counts = Mapping[str, int | Tensor]  # survivors of each tensor, or of each of its outputs
# (scores, total, and by keyword what it asks for) -> how many each tensor keeps
if TYPE_CHECKING:
    Allocation = Callable[Concatenate[Scores, int, ...], Counts]
else:  # LightningCLI reads type hints at run time, and knows no Concatenate
    Allocation = Callable[..., Mapping[str, int | Tensor]]
Keys = Any  # integers of the order of scores: on the CPU a numpy array, which compares faster than torch

# the score of a dead weight: below every score a weight can have, so it is never a candidate
DEAD = -math.inf

_PIECE = 1 << 18  # elements that selection looks at together: few enough for the processor's cache
_DIGIT = 12  # bits that a pass of selection decides
_SAMPLE = 129  # it guesses from every so many-th score where to look; odd: layers have even sizes


@final
class Keep(dict[str, int]):
    """Survivors per tensor. A plain dict does as well.

    `near` is a score that separates survivors from losers in most of the tensors. An allocation that ranks
    all tensors by one threshold knows it, and saves `keep_top` the search for each tensor's own.
    """

    near: float | None = None


class Together(Protocol):
    """What ranks that hold parts of the same tensors tell each other, to select as one process does."""

    def add(self, counts: Tensor) -> Tensor:
        """The sum over all ranks of numbers, int64 or float64, equal on every rank."""
        ...

    def span(self, low: int, high: int) -> tuple[int, int]:
        """The lowest `low` and the highest `high` of all ranks."""
        ...

    def counts(self, name: str) -> bool:
        """Whether this rank's part of a tensor counts; of replicas only one does."""
        ...

    def part(self, name: str) -> Part:
        """Which part of a tensor this rank has."""
        ...

    def of(self, parts: Mapping[str, Part]) -> "Together":
        """The same ranks, with parts of other tensors."""
        ...


def select(
    scores: Scores,
    candidates: Mapping[str, Tensor],
    budget: int,
    allocate: Allocation,
    together: Together | None = None,
    layouts: Mapping[str, Layout] | None = None,
    **evidence: Any,
) -> Masks:
    """Choose `budget` candidates: as many of each tensor as `allocate` says, and of these the highest scores.

    Where it gives a tensor one count for each output, each output has its highest scores chosen. Of equal
    scores the one of the lower index (row-major, in the whole tensor) is chosen.

    >>> scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([5.0, 4.0])}
    >>> dead = {"a": torch.tensor([True, True, False]), "b": torch.tensor([False, True])}
    >>> select(scores, dead, 2, lambda scores, total: {"a": 1, "b": 1})
    {'a': tensor([ True, False, False]), 'b': tensor([False,  True])}

    Args:
        scores: floating point tensors by name; finite where there is a candidate, anything elsewhere.
        candidates: bool tensors of the same shapes, True where an element can be chosen.
        budget: how many are chosen in all, 0 ... number of candidates.
        allocate: the scores, minus infinity where there is no candidate, and the budget -> {name: how many},
            a number for the tensor, or whole numbers in a tensor of one dimension: one for each output, in
            the order of `Layout.rows`.
        together: over ranks that hold parts of the tensors. Counts are then those of the whole tensors.
        layouts: of the tensors, which say what their outputs are. Without: dimension 0.
        evidence: what `allocate` may ask for besides, such as `params` and `masks`.

    Returns:
        {name: bool tensor}, in the order of `scores`; True where an element is chosen.

    Raises:
        ValueError: when the counts of `allocate` do not add up to the budget, a tensor has fewer candidates,
            or ranks hold parts of the tensors and `allocate` does not ask for `together`.
    """
    check_together(allocate, together)
    ranked = only(scores, candidates)
    keep = counts_by(allocate, ranked, budget, together=together, layouts=layouts, **evidence)
    if (given := sum(map(survivors, keep.values()))) != budget:
        raise ValueError(
            f"allocate: {named(allocate)} gave {given} survivors; allowed are the {budget} that "
            "were asked for. Make its counts add up."
        )
    there = counted({name: count(candidates[name]) for name in ranked}, together)
    near, chosen = getattr(keep, "near", None), Masks()
    if together is not None:
        return _chosen_together(allocate, ranked, keep, there, near, together, layouts or {})
    for name in list(ranked):
        scores_here, share = ranked.pop(name), keep[name]
        layout = (layouts or {}).get(name, Layout())
        if isinstance(share, Tensor):
            _check_per_output(allocate, name, share, candidates_per_row(layout.rows(scores_here)))
            rows = keep_top_of_rows(layout.rows(scores_here), share)
            chosen[name] = layout.from_rows(rows, scores_here.shape).contiguous()
            continue
        _check_count(allocate, name, share, there[name])
        chosen[name] = keep_top(scores_here, share, near=near)
    return chosen


def counts_by(allocate: Allocation, scores: Scores, budget: int, **evidence: Any) -> Counts:
    """What an allocation says: how many each tensor keeps.

    Raises:
        ValueError: when it does not say it of each tensor.
    """
    keep = call(allocate, scores, budget, **evidence)
    if not isinstance(keep, Mapping) or keep.keys() != scores.keys():
        raise ValueError(
            f"allocate: {named(allocate)} gave {keep!r}; allowed are dicts of how many each of "
            f"{', '.join(scores)} keeps. Return one."
        )
    return keep


def _check_count(allocate: Allocation, name: str, keep: int, there: int) -> None:
    if keep > there:
        raise ValueError(
            f"allocate: {named(allocate)} gave {name} {keep} survivors; allowed are {there}, what it has "
            "alive. Cap its counts."
        )


def survivors(counts: int | Tensor) -> int:
    """How many a tensor keeps in all: a number, or the sum over its outputs."""
    return int(counts.sum()) if isinstance(counts, Tensor) else counts


def _check_per_output(allocate: Allocation, name: str, keep: Tensor, there: Tensor) -> None:
    if keep.shape != there.shape or keep.is_floating_point() or keep.is_complex():
        raise ValueError(
            f"allocate: {named(allocate)} gave {name} counts of the shape {tuple(keep.shape)} and "
            f"of {keep.dtype}; "
            f"allowed are whole numbers, one for each of its {len(there)} outputs. Give these, or one number."
        )
    if bool(((keep < 0) | (keep > there.to(keep.device))).any()):
        row = int(((keep < 0) | (keep > there.to(keep.device))).nonzero()[0])
        raise ValueError(
            f"allocate: {named(allocate)} gave output {row} of {name} {int(keep[row])} survivors; "
            f"allowed are 0 to {int(there[row])}, what it has alive. Cap its counts."
        )


def candidates_per_row(rows: Tensor) -> Tensor:
    """How many elements of each row are candidates: above minus infinity."""
    if not rows.numel() or bool(rows.amin() > DEAD):
        return torch.full((len(rows),), rows.shape[1], device=rows.device)
    return (rows > DEAD).sum(1)


def candidates_per_output(name: str, scores: Tensor, layout: Layout, together: Together | None) -> Tensor:
    """How many candidates each output of a whole tensor has; of a part of it these are the scores."""
    if together is None:
        return candidates_per_row(layout.rows(scores))
    here = candidates_per_row(layout.of_part().rows(scores))
    return _of_outputs(here, together.part(name), layout, together.counts(name), together)


def _of_outputs(here: Tensor, part: Part, layout: Layout, counts: bool, together: Together) -> Tensor:
    """The sum over ranks of whole numbers, one for each output, of those of this rank's outputs."""
    outputs, _ = layout.axes(len(part.shape))
    found = torch.zeros(part.size(outputs), dtype=torch.int64)
    return together.add(found.index_add_(0, part.along(outputs), here.cpu()) if counts else found)


def only(scores: Scores, candidates: Mapping[str, Tensor]) -> Scores:
    """The scores, minus infinity where there is no candidate; the same tensors where all are candidates."""
    return {
        name: score if count(mask := candidates[name]) == mask.numel() else torch.where(mask, score, DEAD)
        for name, score in scores.items()
    }


def check_together(allocate: Allocation, together: Together | None) -> None:
    """Refuse an allocation that counts one rank's parts of the tensors where several ranks hold parts.

    Raises:
        ValueError: then.
    """
    if together is not None and "together" not in asked(allocate, 2):
        raise ValueError(
            f"allocate: {named(allocate)} does not ask for `together`, so it cannot count over "
            "ranks that hold "
            "parts of the tensors. Allowed are allocations with that keyword, such as `global_rank`. Use one."
        )


def candidates_per_tensor(scores: Scores, together: Together | None = None) -> dict[str, int]:
    """How many elements of each tensor are candidates: above minus infinity."""
    here = {
        name: s.numel() if s.numel() and bool(s.amin() > DEAD) else count_above(s, DEAD)
        for name, s in scores.items()
    }
    return counted(here, together)


def counted(here: Mapping[str, int], together: Together | None) -> dict[str, int]:
    """Counts of whole tensors, from those of the parts that each rank has here."""
    if together is None:
        return dict(here)
    own = [number if together.counts(name) else 0 for name, number in here.items()]
    return dict(zip(here, together.add(torch.tensor(own, dtype=torch.int64)).tolist(), strict=True))


def _chosen_together(
    allocate: Allocation,
    ranked: Scores,
    keep: Counts,
    there: Mapping[str, int],
    near: float | None,
    together: Together,
    layouts: Mapping[str, Layout],
) -> Masks:
    """This rank's parts of what `select` gives for the whole tensors. `ranked` is emptied."""
    order, chosen, above = list(ranked), Masks(), dict[str, int]()
    counts: dict[str, int] = {}
    for name, share in keep.items():
        if isinstance(share, Tensor):
            layout, scores = layouts.get(name, Layout()), ranked.pop(name)
            _check_per_output(allocate, name, share, candidates_per_output(name, scores, layout, together))
            chosen[name] = _chosen_per_output(name, scores, share, layout, together)
        else:
            _check_count(allocate, name, share, there[name])
            counts[name] = share
    if near is not None:
        reaching = {name: _mask(s, near, operator.ge) for name, s in ranked.items()}
        reached = counted({name: count(mask) for name, mask in reaching.items()}, together)
        chosen |= {name: mask for name, mask in reaching.items() if reached[name] == counts[name]}
        if crossed := [name for name, n in reached.items() if n > counts[name]]:  # on all ranks the same
            above = counted({name: count_above(ranked[name], near) for name in crossed}, together)
    for name in list(ranked):
        scores, share = ranked.pop(name), counts[name]
        own = [scores] if together.counts(name) else []
        if name in chosen:
            continue
        if share in (0, there[name]):
            chosen[name] = scores > DEAD if share else torch.zeros_like(scores, dtype=torch.bool)
        elif near is not None and above.get(name, share + 1) <= share:
            chosen[name] = _with_ties(name, scores, near, share - above[name], together)
        else:
            cut, ties = threshold(own, share, together)
            chosen[name] = _with_ties(name, scores, cut, ties, together)
    return {name: chosen[name] for name in order}


def _chosen_per_output(name: str, scores: Tensor, keep: Tensor, layout: Layout, together: Together) -> Tensor:
    """This rank's part of the mask of the highest scores of each output."""
    part, own = together.part(name), layout.of_part()
    outputs, within = layout.axes(scores.dim())
    rows, here = own.rows(scores), part.along(outputs)
    if part.cut <= {*outputs}:
        mask = keep_top_of_rows(rows, keep[here])
    else:
        mask = _rows_together(name, rows, keep, here, part.along(within), layout, together)
    return own.from_rows(mask, scores.shape).contiguous()


def _rows_together(
    name: str, rows: Tensor, keep: Tensor, here: Tensor, columns: Tensor, layout: Layout, together: Together
) -> Tensor:
    """This rank's part of what `keep_top_of_rows` gives, of rows that several ranks have parts of.

    Args:
        name: of the tensor.
        rows: of this rank.
        keep: of all rows.
        here: which of all the rows are those of this rank.
        columns: likewise.
        layout: of the tensor.
        together: the ranks.
    """
    floats = rows.to(torch.promote_types(rows.dtype, torch.float32)) + 0.0  # no -0.0
    keys = _flip(floats.view(integer(floats.dtype)))
    part, counts, own = together.part(name), together.counts(name), here.to(rows.device)

    def of_all(found: Tensor) -> Tensor:
        return _of_outputs(found.sum(1), part, layout, counts, together)

    def of_mine(cut: Tensor) -> Tensor:
        return cut.to(rows.device)[own].unsqueeze(1)

    limits = torch.iinfo(keys.dtype)
    cut = _highest(limits.min, limits.max, keep, lambda at: of_all(keys >= of_mine(at)))
    above, tied = keys > of_mine(cut), keys == of_mine(cut)
    spare, places = keep - of_all(above), -columns.to(rows.device)
    _, within = layout.axes(len(part.shape))
    first = _highest(-part.size(within), 0, spare, lambda at: of_all(tied & (places >= of_mine(at))))
    return (above | tied & (places >= of_mine(first)) & of_mine(spare > 0)) & of_mine(keep > 0)


def _highest(low: int, high: int, reach: Tensor, count_from: Callable[[Tensor], Tensor]) -> Tensor:
    """For each element the highest bound from which on there are as many as it has to reach."""
    least, most = torch.full_like(reach, low), torch.full_like(reach, high)
    while bool((least < most).any()):
        middle = (least | most) - ((least ^ most) >> 1)  # their mean, rounded up, without an overflow
        enough = count_from(middle) >= reach
        least, most = torch.where(enough, middle, least), torch.where(enough, most, middle - 1)
    return least


def _with_ties(name: str, scores: Tensor, cut: float, ties: int, together: Together) -> Tensor:
    """This rank's part of the mask of what is above `cut`, and of the first `ties` that are equal to it."""
    mask = _mask(scores, cut, operator.gt)
    if not ties:
        return mask
    tied = _mask(scores, cut, operator.eq).flatten().nonzero().flatten()
    places = together.part(name).places(tied).to("cpu", torch.float64)  # exact: below 2**53
    own = [-places] if together.counts(name) else []
    last, _ = threshold(own, ties, together)  # the place of the last one that is kept
    mask.view(-1)[tied[(-places >= last).to(tied.device)]] = True
    return mask


def _mask(scores: Tensor, score: float, compare: Callable[[Keys, int], Keys]) -> Tensor:
    """Which scores compare so with `score`, which may be of another dtype."""
    mask, start = torch.empty(scores.shape, dtype=torch.bool, device=scores.device), 0
    for found in _compared(scores, score, compare):
        mask.view(-1)[start : start + len(found)] = torch.as_tensor(found)
        start += len(found)
    return mask


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """All elements in order, in flat tensors: large tensors cut, small ones joined (in the wider dtype)."""
    tensors = list(tensors)
    # smaller where there are few, so that what is held besides the scores is little beside them
    piece = max(_PIECE >> 2, min(_PIECE, sum(t.numel() for t in tensors) >> 4))
    joined: list[Tensor] = []
    length = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        most = piece if flat.device.type == "cpu" else _PIECE << 8
        for part in flat.split(most) if flat.numel() > most else [flat][: flat.numel()]:
            if joined and (length + part.numel() > most or part.device != joined[0].device):
                yield joined[0] if len(joined) == 1 else torch.cat(joined)
                joined, length = [], 0
            joined.append(part)
            length += part.numel()
    if joined:
        yield joined[0] if len(joined) == 1 else torch.cat(joined)


def _keys(tensors: Iterable[Tensor], dtype: torch.dtype, low: int) -> Iterator[Keys]:
    """The same as integers, in the order of the scores in `dtype`, which is exact for all of them.

    From the key `low` on, that is: below it they only stay below it.
    """
    for piece in _pieces(tensors):
        floats = piece.to(dtype)
        key = _array(floats.view(integer(dtype)))
        if low <= 0 and key.min() < 0:  # the bits of negative floats are negative, in the reverse order
            key = _flip(_array((floats + 0.0).view(integer(dtype))))  # -0.0 + 0.0 is +0.0: equal as scores
        yield key


def _array(keys: Tensor) -> Keys:
    return keys.numpy() if keys.device.type == "cpu" else keys


@lru_cache(maxsize=16)
def _key(score: float, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """A score as an integer, in float64 where `dtype` would round it."""
    if torch.tensor(score, dtype=dtype).item() != score:
        dtype = torch.float64
    return int(_flip(torch.tensor(score + 0.0, dtype=dtype).view(integer(dtype)))), dtype


def _flip(bits: Keys) -> Keys:
    """Turn the bits of floats into integers of the same order, or back (it is its own inverse)."""
    sign = 8 * bits.dtype.itemsize - 1
    return bits ^ ((bits >> sign) & ((1 << sign) - 1))


def threshold(scores: Iterable[Tensor], keep: int, together: Together | None = None) -> tuple[float, int]:
    """The `keep`-th highest of all scores, and how many of those equal to it are among the `keep` highest.

    A radix select on the bits of the floats, mapped to integers of the same order: exact, linear, and without
    a copy of its input. It begins where a sample says that the score is, and elsewhere if it is not. The
    counts and histograms of several tensors simply add up.

    >>> threshold([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], keep=2)
    (2.0, 1)

    Args:
        scores: floating point tensors of any shapes, without NaN.
        keep: 1 ... number of scores.
        together: what ranks tell each other that each have some of the scores. Every rank gets the same.
    """
    tensors = list(scores)
    dtype, total = _kind(tensors, together)
    if not 1 <= keep <= total:
        raise ValueError(f"keep={keep}: allowed is 1 to {total}, the number of scores.")
    limits = torch.iinfo(integer(dtype))
    here = sum(t.numel() for t in tensors)
    # a rank without scores leaves it to the others
    low, high = _guess(tensors, dtype, keep / total) if here else (limits.max, limits.min)
    if together is not None:  # the score that all reach lies between those that each would find
        low, high = together.span(low, high)
    held: list[Keys] | None = None  # the keys between the bounds, once they are few
    passed = 0  # how many are above these
    while True:  # the bounds enclose the key, or a pass shows on which side of them it is
        shift = max(0, (high - low).bit_length() - _DIGIT)
        first, last = low >> shift, high >> shift
        above, between, counts = passed, list[Keys](), torch.zeros(last - first + 1, dtype=torch.int64)
        for key in _keys(tensors, dtype, low) if held is None else held:
            is_above = key > high
            above += count(is_above)
            inside = key[is_above ^ (key >= low)]
            counts += torch.bincount(torch.as_tensor((inside >> shift) - first), minlength=len(counts)).cpu()
            if sum(map(len, between)) * 16 <= here:
                between.append(inside)
        passing = above
        if together is not None:
            passing, counts = _added(passing, counts, together)
        reached = passing + counts.flip(0).cumsum(0)
        if keep <= passing:
            low, high = high + 1, limits.max
        elif keep > reached[-1]:
            low, high = limits.min, low - 1
        else:
            place = int(torch.searchsorted(reached, keep))
            if not shift:
                cut = torch.tensor(last - place, dtype=integer(dtype))
                return _flip(cut).view(dtype).item(), keep - int(reached[place - 1] if place else passing)
            bucket = last - place << shift
            low, high = max(low, bucket), min(high, bucket + (1 << shift) - 1)
            if sum(map(len, between)) * 16 <= here:
                held, passed = between, above


def _added(above: int, counts: Tensor, together: Together) -> tuple[int, Tensor]:
    total = together.add(torch.cat((torch.tensor([above]), counts)))
    return int(total[0]), total[1:]


def _kind(tensors: list[Tensor], together: Together | None) -> tuple[torch.dtype, int]:
    """A dtype that is exact for all scores, and how many there are."""
    total = sum(t.numel() for t in tensors)
    there = [t.dtype for t in tensors] or [torch.float32]
    if together is not None:
        widths = [sum(t.numel() for t in tensors if t.dtype == dtype) for dtype in _ORDERED]
        *widths, total = together.add(torch.tensor([*widths, total])).tolist()
        there = [dtype for dtype, n in zip(_ORDERED, widths, strict=True) if n] or there
    # half precisions of two kinds need a third that holds both; all ranks must see the same
    return reduce(torch.promote_types, there), total


_ORDERED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _guess(tensors: list[Tensor], dtype: torch.dtype, fraction: float) -> tuple[int, int]:
    """Keys between which the score that this fraction of all reaches is likely to be."""
    limits = torch.iinfo(integer(dtype))
    step = min(_SAMPLE, sum(t.numel() for t in tensors) >> 13 | 1)
    keys = _keys((t.reshape(-1)[::step] for t in tensors), dtype, limits.min)
    sample = np.concatenate([torch.as_tensor(key).cpu().numpy() for key in keys])
    rank = (1 - fraction) * len(sample)
    margin = 4 + 4 * math.sqrt(rank * fraction)  # four standard deviations
    low, high = max(0, math.floor(rank - margin)), min(len(sample) - 1, math.ceil(rank + margin))
    order = np.partition(sample, (low, high))
    return int(order[low]) if low else limits.min, int(order[high]) if high < len(sample) - 1 else limits.max


def _compared(scores: Tensor, score: float, compare: Callable[[Keys, int], Keys]) -> Iterator[Keys]:
    """Which scores compare so with `score`, in pieces."""
    cut, dtype = _key(score, scores.dtype)
    return (compare(key, cut) for key in _keys([scores], dtype, cut))


def count_above(scores: Tensor, score: float, *, or_equal: bool = False) -> int:
    """How many of the scores are above `score`, without a temporary as large as the scores."""
    return sum(map(count, _compared(scores, score, operator.ge if or_equal else operator.gt)))


def keep_top(scores: Tensor, keep: int, near: float | None = None) -> Tensor:
    """The mask of the `keep` highest scores; of equal scores the one of the lower index (row-major) is kept.

    >>> keep_top(torch.tensor([1.0, 3.0, 1.0, 2.0]), keep=3)
    tensor([ True,  True, False,  True])

    Args:
        scores: a floating point tensor of any shape, without NaN.
        keep: 0 ... number of scores.
        near: a score that may separate the two sets exactly. It only saves time: the result is the same
            without it.
    """
    if not 0 <= keep <= scores.numel():
        raise ValueError(f"keep={keep}: allowed is 0 to {scores.numel()}, the number of scores.")
    if keep in (0, scores.numel()):
        return torch.full_like(scores, keep > 0, dtype=torch.bool, memory_format=torch.contiguous_format)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    flat = mask.view(-1)

    def fill(score: float, compare: Callable[[Keys, int], Keys]) -> int:
        start = 0
        for found in _compared(scores, score, compare):
            flat[start : start + len(found)] = torch.as_tensor(found)
            start += len(found)
        return count(flat)

    if near is not None:
        reached = fill(near, operator.ge)
        if reached == keep:
            return mask
        if reached < keep or count_above(scores, near) > keep:
            near = None
    cut = threshold([scores], keep)[0] if near is None else near
    ties, start = keep - fill(cut, operator.gt), 0
    for equal in _compared(scores, cut, operator.eq):
        here = torch.as_tensor(equal).nonzero().flatten()[:ties]
        flat[start + here] = True
        start, ties = start + len(equal), ties - len(here)
        if not ties:
            break
    return mask


def keep_top_of_rows(scores: Tensor, keep: Tensor) -> Tensor:
    """The mask of the `keep[i]` highest scores of each row i; of equal scores the earlier one is kept.

    >>> keep_top_of_rows(torch.tensor([[1.0, 3.0, 1.0], [5.0, 4.0, 6.0]]), torch.tensor([2, 1]))
    tensor([[ True,  True, False],
            [False, False,  True]])

    Args:
        scores: a floating point matrix, without NaN.
        keep: whole numbers, each 0 ... number of columns.
    """
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    width = scores.shape[1]
    if not mask.numel():
        return mask
    keep = keep.to(scores.device, torch.int64).unsqueeze(1)
    step = max(1, _PIECE // width)
    for start in range(0, len(scores), step):
        rows, counts = scores[start : start + step].detach(), keep[start : start + step]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # numpy has no bfloat16
        on_cpu = rows.device.type == "cpu"  # where numpy sorts ten times as fast as torch
        ordered = torch.from_numpy(np.sort(rows.numpy(), axis=1)) if on_cpu else rows.sort(1).values
        cut = ordered.gather(1, width - counts.clamp_min(1))
        chosen = torch.ge(rows, cut, out=mask[start : start + step])
        if len(tied := (chosen.sum(1, keepdim=True) > counts).flatten().nonzero().flatten()):
            rows, cut = rows[tied], cut[tied]
            above, equal = rows > cut, rows == cut
            spare = counts[tied] - above.sum(1, keepdim=True)
            chosen[tied] = above | equal & (equal.cumsum(1) <= spare)
    return mask
