"""Selection: the one place where masks are born.

A radix select on the bits of the scores: exact, linear, and without a copy of its input.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.masks import count, integer

Scores = dict[str, Tensor]
Keys = Any  # integers of the order of scores: on the CPU a numpy array, which compares faster than torch

# the score of a dead weight: below every score a weight can have, so it is never a candidate
DEAD = -math.inf

_PIECE = 1 << 18  # elements that selection looks at together: few enough for the processor's cache
_DIGIT = 12  # bits that a pass of selection decides
_SAMPLE = 129  # it guesses from every so many-th score where to look; odd: layers have even sizes


class Keep(dict[str, int]):
    """Survivors per tensor. A plain dict does as well.

    `near` is a score that separates survivors from losers in most of the tensors. An allocation that ranks
    all tensors by one threshold knows it, and saves `keep_top` the search for each tensor's own.
    """

    near: float | None = None


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


def threshold(scores: Iterable[Tensor], keep: int) -> tuple[float, int]:
    """The `keep`-th highest of all scores, and how many of those equal to it are among the `keep` highest.

    A radix select on the bits of the floats, mapped to integers of the same order: exact, linear, and without
    a copy of its input. It begins where a sample says that the score is, and elsewhere if it is not. The
    counts and histograms of several tensors simply add up.

    >>> threshold([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], keep=2)
    (2.0, 1)

    Args:
        scores: floating point tensors of any shapes, without NaN.
        keep: 1 ... number of scores.
    """
    tensors = list(scores)
    total = sum(t.numel() for t in tensors)
    if not 1 <= keep <= total:
        raise ValueError(f"keep={keep}: allowed is 1 to {total}, the number of scores.")
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    limits = torch.iinfo(integer(dtype))
    low, high = _guess(tensors, dtype, keep / total)
    held: list[Keys] | None = None  # the keys between the bounds, once they are few
    while True:  # the bounds enclose the key, or a pass shows on which side of them it is
        shift = max(0, (high - low).bit_length() - _DIGIT)
        first, last = low >> shift, high >> shift
        above, between, counts = 0, list[Keys](), torch.zeros(last - first + 1, dtype=torch.int64)
        for key in _keys(tensors, dtype, low) if held is None else held:
            is_above = key > high
            above += count(is_above)
            inside = key[is_above ^ (key >= low)]
            counts += torch.bincount(torch.as_tensor((inside >> shift) - first), minlength=len(counts)).cpu()
            if sum(map(len, between)) * 16 <= total:
                between.append(inside)
        reached = above + counts.flip(0).cumsum(0)
        if keep <= above:
            low, high = high + 1, limits.max
        elif keep > reached[-1]:
            low, high = limits.min, low - 1
        else:
            place = int(torch.searchsorted(reached, keep))
            if not shift:
                cut = torch.tensor(last - place, dtype=integer(dtype))
                return _flip(cut).view(dtype).item(), keep - int(reached[place - 1] if place else above)
            bucket = last - place << shift
            low, high = max(low, bucket), min(high, bucket + (1 << shift) - 1)
            if sum(map(len, between)) * 16 <= total:
                held, keep = between, keep - above


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
    return mask
