"""Layer-adaptive magnitude: how many of each tensor have the highest ratios of LAMP, without a sort.

The ratio of a score is its square over the sum of the squares of those scores of its tensor that are not
below it. Within a tensor it falls with the score, so that the scores in question lie between two bounds for
each tensor. Counts and sums of squares in buckets of scores say how many ratios are at least, and at most,
above another one, and so narrow the bounds from pass to pass. They add up, so that ranks that hold parts of
the tensors find the same. Sums are in float64, and ratios are rounded to 24 bits before they decide: in which
order one adds does not show.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import final

from lightning_prune.masks import integer
from lightning_prune.selection import DEAD, Keep, Together

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_PIECE = 1 << 18  # scores that are looked at together
_DIGIT = 8  # bits of a score that a pass decides, at most
_RANGE = 1e-70, 1e70  # of scores that count as they are; a ratio has a float64 then


@final
@dataclass(frozen=True)
class _Open:
    """The scores of a tensor of which nobody knows yet whether they are kept: those between two keys.

    The key of a score is its bits as an integer, which have its order, as no score counts as less than 0.

    Args:
        scores: of this rank, all that have such keys, and others.
        low: the lowest key.
        high: the highest key.
        above: how many scores have higher keys on all ranks: all of these are kept.
        squares: the sum of their squares.
    """

    scores: Tensor
    low: int
    high: int
    above: int = 0
    squares: float = 0.0

    @property
    def shift(self) -> int:
        """How many bits of a key do not tell its bucket."""
        return max(0, (self.high - self.low).bit_length() - _DIGIT)

    @property
    def buckets(self) -> int:
        return (self.high >> self.shift) - (self.low >> self.shift) + 1

    def histogram(self) -> Tensor:
        """Of each bucket, from the highest on, how many scores it has here, and the sum of their squares."""
        found = torch.zeros(2, self.buckets, dtype=torch.float64)
        for piece in map(_counting, self.scores.split(_PIECE)):
            keys = piece.view(integer(piece.dtype))
            inside = (keys >= self.low) & (keys <= self.high)
            places = ((self.high >> self.shift) - (keys[inside] >> self.shift)).long()
            squares = piece[inside].double().square()
            found[0] += torch.bincount(places, minlength=self.buckets).cpu()
            found[1] += torch.bincount(places, squares, minlength=self.buckets).cpu()
        return found

    def edges(self) -> tuple[Floats, Floats]:
        """The lowest and the highest square that a score of each bucket can have."""
        first = (self.high >> self.shift) - np.arange(self.buckets)
        lowest = np.maximum(first << self.shift, self.low)
        highest = np.minimum(((first + 1) << self.shift) - 1, self.high)
        return self._squares(lowest), self._squares(highest)

    def _squares(self, keys: Ints) -> Floats:
        bits = torch.from_numpy(keys).to(integer(self.scores.dtype))
        return bits.view(self.scores.dtype).double().square().numpy()

    def within(self, first: int, last: int, counts: Floats, squares: Floats) -> "_Open":
        """With the buckets from `first` to `last`, counted from the highest on; those before it are kept."""
        top = self.high >> self.shift
        low = max(self.low, (top - last) << self.shift)
        high = min(self.high, ((top - first + 1) << self.shift) - 1)
        scores = self.scores
        if counts[first : last + 1].sum() * 16 <= scores.numel():
            keys = _counting(scores).view(integer(scores.dtype))
            scores = scores[(keys >= low) & (keys <= high)]
        above, sum_above = self.above + int(counts[:first].sum()), self.squares + float(squares[:first].sum())
        return replace(self, scores=scores, low=low, high=high, above=above, squares=sum_above)


@final
@dataclass(frozen=True)
class _Buckets:
    """Buckets of scores of a tensor, from the highest on: what is known of the scores in each.

    Args:
        counts: how many there are.
        above: the sum of the squares of all higher scores, in other buckets.
        lowest: the lowest square that one can have.
        highest: the highest one.
    """

    counts: Floats
    above: Floats
    lowest: Floats
    highest: Floats

    def at_least(self, ratio: float) -> Floats:
        """How many of each bucket have a ratio from `ratio` on, whatever their scores in it are."""
        if not ratio:
            return self.counts
        return self._clipped(
            self.lowest, lambda squares: (squares / ratio - self.above) / _positive(self.highest)
        )

    def at_most(self, ratio: float) -> Floats:
        """How many can have one, for some of the scores that they may have."""
        if not ratio:
            return self.counts
        return self._clipped(
            self.highest,
            lambda squares: (squares / ratio - self.above - squares) / _positive(self.lowest) + 1,
        )

    def exactly(self, ratio: float) -> Floats:
        """How many have one, where each bucket has a single score."""
        low, high = np.zeros_like(self.counts), self.counts
        while (low < high).any():  # the last of them that has one, by bisection
            middle = np.ceil((low + high) / 2)
            sums = self.above + np.maximum(middle, 1) * self.lowest
            has = _rounded(self.lowest / _positive(sums)) >= ratio
            low, high = np.where(has, middle, low), np.where(has, high, middle - 1)
        return low

    def _clipped(self, squares: Floats, bound: Callable[[Floats], Floats]) -> Floats:
        with np.errstate(over="ignore"):  # to infinity, which is as good as all
            found = np.clip(np.floor(bound(squares)), 0, self.counts)
        return np.where(squares > 0, found, 0)  # the ratio of 0 is 0


def kept(scores: Mapping[str, Tensor], total: int, together: Together | None = None) -> Keep:
    """How many of each tensor are among the `total` highest ratios; of equal ones those of earlier tensors.

    >>> kept({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.1, 0.1, 0.1])}, total=3)
    {'a': 1, 'b': 2}

    Args:
        scores: minus infinity where there is no candidate.
        total: 0 ... number of candidates.
        together: over ranks that hold parts of the tensors.
    """
    still = {name: _all_of(s, together is None or together.counts(name)) for name, s in scores.items()}
    while left := total - sum(open_.above for open_ in still.values()):
        found = _histograms(still, together)
        buckets = {name: _buckets(open_, *found[name]) for name, open_ in still.items()}
        if not any(open_.shift for open_ in still.values()):
            return _shared_out(still, buckets, left)
        # between these two lies the last ratio that is kept; by a little more, as floats are rounded
        least = _ratio(_highest(left, [each.at_least for each in buckets.values()])) * (1 - 1e-6)
        most = _ratio(_highest(left, [each.at_most for each in buckets.values()])) * (1 + 1e-6)
        for name, each in buckets.items():
            last = int(np.flatnonzero(each.at_most(least)).max(initial=0))
            first = int(np.flatnonzero(each.at_least(most) < each.counts).min(initial=last))
            still[name] = still[name].within(first, last, *found[name])
    return Keep({name: open_.above for name, open_ in still.items()})


def _all_of(scores: Tensor, counts: bool) -> _Open:
    flat = scores.detach().reshape(-1)[: None if counts else 0]
    if flat.numel() and not bool(flat.amin() > DEAD):
        flat = flat[flat > DEAD]
    highest = torch.tensor([torch.finfo(flat.dtype).max], dtype=flat.dtype)
    return _Open(flat, 0, int(_counting(highest).view(integer(flat.dtype))))


def _counting(scores: Tensor) -> Tensor:
    """Scores as what they count, which is a number with a sign of +."""
    if scores.dtype != torch.float64:
        return scores.clamp_min(0) + 0.0
    least, most = _RANGE
    return torch.where(scores < least, 0.0, scores.clamp_max(most))


def _histograms(still: Mapping[str, _Open], together: Together | None) -> dict[str, tuple[Floats, Floats]]:
    here = [open_.histogram() for open_ in still.values()]
    joined = torch.cat([histogram.flatten() for histogram in here])
    if together is not None:
        joined = together.add(joined)
    parts = joined.split([histogram.numel() for histogram in here])
    both = (part.view(2, -1).numpy() for part in parts)
    return {name: (pair[0], pair[1]) for name, pair in zip(still, both, strict=True)}


def _buckets(open_: _Open, counts: Floats, squares: Floats) -> _Buckets:
    above = open_.squares + np.concatenate(([0.0], np.cumsum(squares)[:-1]))
    return _Buckets(counts, above, *open_.edges())


def _shared_out(still: Mapping[str, _Open], buckets: Mapping[str, _Buckets], left: int) -> Keep:
    """The last step, in which each bucket has a single score."""
    last = _highest(left, [each.exactly for each in buckets.values()])
    higher = {name: int(each.exactly(_ratio(last + 1)).sum()) for name, each in buckets.items()}
    equal = {name: int(each.exactly(_ratio(last)).sum()) - higher[name] for name, each in buckets.items()}
    spare = left - sum(higher.values())
    keep = Keep()
    for name, open_ in still.items():
        ties = min(spare, equal[name])
        keep[name], spare = open_.above + higher[name] + ties, spare - ties
    return keep


def _highest(enough: int, count_from: Sequence[Callable[[float], Floats]]) -> int:
    """The number of the highest ratio from which on there are enough; 0 if there is none."""
    low, high = 0, int(np.float64(1).view(np.int64)) >> _CUT
    while low < high:
        middle = (low + high + 1) // 2
        found = sum(count(_ratio(middle)).sum() for count in count_from)
        low, high = (middle, high) if found >= enough else (low, middle - 1)
    return low


_CUT = 29  # bits of float64 that float32 does not have


def _ratio(number: int) -> float:
    """The ratio of this number, of all that `_rounded` gives."""
    return float(np.int64(number << _CUT).view(np.float64))


def _rounded(ratios: Floats) -> Floats:
    """Ratios with as many bits as float32 has, and the range of float64."""
    return ((ratios.view(np.int64) + (1 << _CUT - 1)) >> _CUT << _CUT).view(np.float64)


def _positive(values: Floats) -> Floats:
    return np.maximum(values, np.finfo(np.float64).tiny)
